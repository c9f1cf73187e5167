"use strict";
// The box beside the lanes: both tokens of a step, all their figures, and what else was likely.
const detail = (() => {
  const box = document.getElementById("detail");

  function show(state, pair, figures) {
    const { step, method } = state;
    const heads = lanes.SIDES.map((side) => head(pair, side, step, state.side));
    const title = page.element("h3", "", `Step ${step}`);
    const place = page.element("span", "muted small", placeOf(pair, step));
    title.append(" ", place);
    box.replaceChildren(title, row("heads", heads), values(pair, figures, method, step, state.metric));
    for (const side of lanes.SIDES) {
      const found = figures[side].alternatives?.[step];
      if (found) box.append(likely(pair, side, step, found));
    }
  }

  function row(className, children) {
    const made = page.element("div", className);
    made.append(...children);
    return made;
  }

  function placeOf(pair, step) {
    if (step >= pair.shared) return "past T: only one response has a token";
    if (step < pair.divergence) return "both responses are the same so far";
    if (step === pair.divergence) return "the responses differ from here on";
    return `both responses have steps 0 to ${pair.shared - 1}`;
  }

  function head(pair, side, step, chosenSide) {
    const made = page.element("div", `head ${side}${side === chosenSide ? " chosen-side" : ""}`);
    made.append(page.element("div", "lane-name", side));
    const text = page.element("div", "token");
    const word = pair[side].texts[step];
    if (word === undefined) text.append(page.element("span", "muted", "no token"));
    else text.append(texts.put(document.createElement("bdi"), word, { limit: 600, spaces: true }));
    made.append(text);
    const kind = { s: "special token", e: "ends the response", p: "part of a character" }[pair[side].kinds[step]];
    if (kind) made.append(page.element("div", "muted small", kind));
    return made;
  }

  function values(pair, figures, method, step, shown) {
    const table = page.element("table", "values");
    const head_ = table.createTHead().insertRow();
    for (const text of ["", ...lanes.SIDES]) {
      const cell = page.element(text ? "th" : "td", "number", text);
      if (text) cell.scope = "col";
      head_.append(cell);
    }
    const body = table.createTBody();
    for (const metric of store.metricsOf(method)) {
      const found = lanes.SIDES.map((side) => store.value(metric, method, pair, figures, side, step));
      if (found.every((value) => value === undefined)) continue;
      const line = body.insertRow();
      if (metric.key === shown) line.className = "shown";
      const name = page.element("th", "", metric.label);
      name.scope = "row";
      name.title = metric.help;
      line.append(name);
      if (metric.of === "step") {
        const cell = page.element("td", "number both", figure(found[0], metric.sign === "±"));
        cell.colSpan = 2;
        line.append(cell);
      } else {
        for (const value of found) line.append(page.element("td", "number", figure(value, metric.sign === "±")));
      }
    }
    return table;
  }

  function likely(pair, side, step, found) {
    const table = page.element("table", "likely");
    table.append(page.element("caption", "", `Likeliest at this state, ${side} response`));
    const head_ = table.createTHead().insertRow();
    for (const text of ["token", "policy", "reference"]) {
      const cell = page.element("th", text === "token" ? "" : "number", text);
      cell.scope = "col";
      head_.append(cell);
    }
    const body = table.createTBody();
    for (const [word, policy, reference] of found) {
      const line = body.insertRow();
      const text = store.view.words[word];
      if (text === pair[side].texts[step]) line.className = "shown";
      const name = page.element("td", "token");
      name.append(texts.put(document.createElement("bdi"), text, { limit: 40, spaces: true }));
      line.append(name, share(policy, "policy"), share(reference, "reference"));
    }
    return table;
  }

  // In thousandths.
  function share(thousandths, className) {
    const cell = page.element("td", `number share ${className}`);
    cell.style.setProperty("--share", `${thousandths / 10}%`);
    cell.append(page.element("span", "", thousandths < 1 ? "<0.1 %" : `${(thousandths / 10).toFixed(1)} %`));
    return cell;
  }

  return { show };
})();
