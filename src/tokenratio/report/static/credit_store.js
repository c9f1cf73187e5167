"use strict";
// What the page holds: overviews at once, a pair's tokens and figures when it is opened.
const store = (() => {
  const view = page.data("view");
  let packs = null; // parsed after the first paint
  const kept = new Map();

  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function get(kind, number, make) {
    packs ??= page.data("packs");
    const key = `${kind}/${number}`;
    if (!kept.has(key)) kept.set(key, make());
    return kept.get(key);
  }

  // A pair's figures under a policy, with what else was likely where the page holds it.
  async function figures(policy, number) {
    const found = await unpacked(packs.policies[policy][number]);
    const more = packs.alternatives[policy][number];
    const likely = more === null ? {} : await unpacked(more);
    for (const side of ["chosen", "rejected"]) found[side].alternatives = likely[side];
    return found;
  }

  // The metrics of a method: those of every token, and those that only it has.
  function metricsOf(method) {
    return view.metrics.filter(({ key, of }) => of === "token" || view.methods[method].metrics.includes(key));
  }

  // What ranges and means of a metric are filed under.
  function place(metric, method) {
    return metric.of === "token" ? metric.key : `${view.methods[method].name}/${metric.key}`;
  }

  return {
    view,
    metricsOf,
    place,
    pair: (number) => get("pair", number, () => unpacked(packs.pairs[number])),
    figures: (policy, number) => get(policy, number, () => figures(policy, number)),
    // The value of a metric at a step of a side; undefined where there is none.
    value(metric, method, pair, figures, side, step) {
      if (metric.of === "token") return (figures[side][metric.key] ?? pair[side][metric.key])?.[step];
      const found = figures.methods[method][metric.key];
      return metric.of === "step" ? found?.[step] : found?.[side]?.[step];
    },
  };
})();

// A figure in the space of a cell.
function figure(value, signed = false) {
  if (value === undefined || value === null) return "–";
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size < 0.001) text = size.toExponential(1);
  else text = size.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1);
  if (value < 0) return `−${text}`;
  return signed && value > 0 ? `+${text}` : text;
}
