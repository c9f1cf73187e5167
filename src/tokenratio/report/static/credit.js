"use strict";
// The token-credit viewer: one state, kept in the address, and what is drawn from it.
(() => {
  const { view } = store;
  const by = (id) => document.getElementById(id);
  const state = {
    pair: 0, step: 0, side: "chosen", metric: "rho", method: 0, policy: view.policies.length - 1,
    layout: "aligned", spaces: false, sort: "number", descending: false, filter: "all",
  };
  let open = null; // the open pair: its tokens, its figures
  let cursors = [];
  let drawing = 0;

  // --- the address ----------------------------------------------------------------------------

  function written() {
    const address = new URLSearchParams({ pair: state.pair, metric: state.metric, step: state.step, side: state.side });
    address.set("method", view.methods[state.method].name);
    if (view.policies.length > 1) address.set("policy", view.policies[state.policy]);
    if (state.filter !== "all") address.set("filter", state.filter);
    if (state.sort !== "number") address.set("sort", `${state.descending ? "-" : ""}${state.sort}`);
    if (state.layout !== "aligned") address.set("layout", state.layout);
    return `#${address}`;
  }

  function within(text, limit, otherwise) {
    const number = Number.parseInt(text, 10);
    return Number.isInteger(number) && number >= 0 && number < limit ? number : otherwise;
  }

  function read() {
    const address = new URLSearchParams(location.hash.slice(1));
    const has = (key) => address.get(key) ?? "";
    state.pair = within(has("pair"), view.pairs.length, state.pair);
    state.step = within(has("step"), Infinity, state.step);
    if (lanes.SIDES.includes(has("side"))) state.side = has("side");
    const method = view.methods.findIndex(({ name }) => name === has("method"));
    if (method >= 0) state.method = method;
    const policy = view.policies.indexOf(has("policy"));
    if (policy >= 0) state.policy = policy;
    if (view.metrics.some(({ key }) => key === has("metric"))) state.metric = has("metric");
    // An address leaves these out where they are as at first.
    state.filter = Object.hasOwn(table.FILTERS, has("filter")) ? has("filter") : "all";
    const sort = has("sort").replace(/^-/, "");
    const isColumn = table.COLUMNS.some(({ key }) => key === sort);
    state.sort = isColumn ? sort : "number";
    state.descending = isColumn && has("sort").startsWith("-");
    state.layout = has("layout") === "text" ? "text" : "aligned";
  }

  function remember() {
    if (location.hash !== written()) history.replaceState(null, "", written());
  }

  // --- what is shown --------------------------------------------------------------------------

  const metric = () => view.metrics.find(({ key }) => key === state.metric);
  const place = () => store.place(metric(), state.method);

  function valueAt(side, step) {
    return store.value(metric(), state.method, open.pair, open.figures, side, step);
  }

  // Metrics depend on the method: one that it does not have gives way to ρ.
  function offer() {
    const offered = store.metricsOf(state.method);
    if (!offered.some(({ key }) => key === state.metric)) state.metric = "rho";
    by("metric").replaceChildren(...offered.map(({ key, label }) => new Option(label, key)));
    by("metric").value = state.metric;
    by("method").value = state.method;
    by("policy").value = state.policy;
    by("layout").value = state.layout;
    by("spaces").checked = state.spaces;
  }

  function paint() {
    const range = view.ranges[place()] ?? 0;
    lanes.paint(valueAt, range);
    const { label, unit, help, sign } = metric();
    const legend = by("legend");
    const bar = page.element("span", `bar-scale ${{ "±": "", "+": "high", "−": "low" }[sign]}`);
    bar.setAttribute("aria-hidden", "true");
    const ends = [sign === "+" ? "0" : `≤ ${figure(-range)}`, sign === "−" ? "0" : `≥ ${figure(range, true)}`];
    legend.replaceChildren(page.element("strong", "", label), page.element("span", "ends", ends[0]), bar,
      page.element("span", "ends", ends[1]), page.element("span", "muted", unit), page.element("span", "muted help", help));
    drawPositions();
  }

  function drawMargin() {
    const { pair, figures } = open;
    const sums = lanes.SIDES.map((side) => {
      let total = 0;
      return figures[side].rho.map((value) => (total += view.beta * (value ?? 0)));
    });
    const length = Math.max(sums[0].length, sums[1].length);
    const at = (values, step) => values[Math.min(step, values.length - 1)];
    const margin = Array.from({ length }, (_, step) => at(sums[0], step) - at(sums[1], step));
    return charts.draw(by("margin-chart"), {
      series: [
        { name: "chosen", className: "of-chosen", values: sums[0] },
        { name: "rejected", className: "of-rejected", values: sums[1] },
        { name: "margin", className: "of-margin", values: margin },
      ],
      marks: pair.shared < length ? [{ step: pair.shared, text: `T ${pair.shared}` }] : [],
      describe: `Rewards up to each step; at the end chosen ${figure(sums[0].at(-1))}, rejected ${figure(sums[1].at(-1))}, margin ${figure(margin.at(-1))}`,
      onStep: (step) => go({ step }),
    });
  }

  function drawPositions() {
    by("position-name").textContent = metric().of === "token" ? metric().label : `${metric().label}, ${view.methods[state.method].name}`;
    const found = view.positions[state.policy][place()] ?? {};
    const series = Object.entries(found).map(([side, values]) => ({
      name: side === "step" ? "both responses" : side, className: side === "step" ? "of-margin" : `of-${side}`, values,
    }));
    charts.draw(by("position-chart"), { series, describe: `Mean ${metric().label} by position` });
  }

  function flags() {
    const row = table.rowOf(state.pair, state);
    const found = [];
    if (row.margin < 0) found.push(["bad", "wrongly ordered"]);
    if (row.chosen < 0) found.push(["watch", "chosen displaced"]);
    if (row.pair.cut.some(Boolean)) found.push(["watch", "truncated"]);
    by("flags").replaceChildren(
      page.element("span", "muted", `margin ${figure(row.margin, true)} · ${row.pair.lengths.join(" / ")} tokens`),
      ...found.map(([className, text]) => page.element("span", `flag ${className}`, text)));
  }

  function drawPair() {
    const { pair } = open;
    by("pair-title").textContent = `Pair ${state.pair}`;
    by("pair-title").title = view.pairs[state.pair].origin;
    by("prompt").replaceChildren();
    texts.put(by("prompt"), pair.prompt, { breaks: true });
    const cut = pair.prompt_cut ? `, ${pair.prompt_cut} tokens cut on the left` : "";
    by("prompt-length").textContent = `${pair.prompt.length.toLocaleString("en")} characters${cut}`;
    lanes.draw(pair, { ...state, isLocal: view.methods[state.method].local });
    flags();
    paint();
    cursors = [drawMargin()];
  }

  function point(options = {}) {
    const most = Math.max(...lanes.SIDES.map((side) => open.pair[side].texts.length));
    state.step = Math.min(state.step, most - 1);
    if (state.step >= open.pair[state.side].texts.length) state.side = state.side === "chosen" ? "rejected" : "chosen";
    lanes.select(state.side, state.step, options);
    detail.show(state, open.pair, open.figures);
    for (const move of cursors) move?.(state.step);
  }

  // Everything that depends on what has changed.
  async function update(changed, options) {
    const turn = (drawing += 1);
    offer();
    if (changed.some((key) => ["sort", "descending", "filter", "policy", "method", "search"].includes(key))) table.draw(state);
    if (changed.includes("pair") || changed.includes("policy")) {
      const [pair, figures] = await Promise.all([store.pair(state.pair), store.figures(state.policy, state.pair)]);
      if (turn !== drawing && !changed.includes("first")) return; // another pair was opened meanwhile
      open = { pair, figures };
    }
    if (open === null) return;
    if (changed.some((key) => ["pair", "policy", "method", "layout", "spaces"].includes(key))) {
      drawPair();
      table.mark(state.pair);
    } else if (changed.includes("metric")) paint();
    point(options);
    remember();
  }

  function go(changes, options) {
    const changed = Object.keys(changes).filter((key) => state[key] !== changes[key]);
    if ("pair" in changes && changed.includes("pair") && !("step" in changes)) {
      changes = { ...changes, step: 0 };
    }
    Object.assign(state, changes);
    return update(changed, options);
  }

  // --- the reader -----------------------------------------------------------------------------

  function cycle(key, count, current) {
    return count < 2 ? undefined : go({ [key]: (current + 1) % count });
  }

  const KEYS = {
    ArrowRight: () => go({ step: state.step + 1 }, { focus: true }),
    ArrowLeft: () => go({ step: Math.max(0, state.step - 1) }, { focus: true }),
    ArrowUp: () => go({ side: "chosen" }, { focus: true }),
    ArrowDown: () => go({ side: "rejected" }, { focus: true }),
    Home: () => go({ step: 0 }, { focus: true }),
    End: () => go({ step: Infinity }, { focus: true }),
    j: () => go({ pair: table.beside(state.pair, 1) ?? state.pair }),
    k: () => go({ pair: table.beside(state.pair, -1) ?? state.pair }),
    m: () => {
      const keys = store.metricsOf(state.method).map(({ key }) => key);
      return go({ metric: keys[(keys.indexOf(state.metric) + 1) % keys.length] });
    },
    l: () => cycle("method", view.methods.length, state.method),
    c: () => cycle("policy", view.policies.length, state.policy),
    "/": () => table.search.focus(),
    "?": () => by("help").showModal(),
  };

  function pressed(event) {
    const { target, key } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || by("help").open) return;
    if (target.closest("input, select, textarea")) return;
    const moves = key.startsWith("Arrow") || key === "Home" || key === "End";
    // Elsewhere these keys scroll. The page itself does not scroll sideways.
    const isSideways = key === "ArrowLeft" || key === "ArrowRight";
    if (moves && !target.closest(".lanes") && !(isSideways && target === document.body)) return;
    if (!Object.hasOwn(KEYS, key) || open === null) return;
    event.preventDefault();
    KEYS[key]();
  }

  function start() {
    by("policy-label").hidden = view.policies.length < 2;
    view.methods.forEach(({ name, settings }, number) => by("method").append(new Option(settings ? `${name} (${settings})` : name, number)));
    view.policies.forEach((name, number) => by("policy").append(new Option(name, number)));
    table.build(({ sort }) => go({ sort, descending: state.sort === sort ? !state.descending : sort !== "number" && sort !== "prompt" }));
    by("metric").addEventListener("change", (event) => go({ metric: event.target.value }));
    by("method").addEventListener("change", (event) => go({ method: Number(event.target.value) }));
    by("policy").addEventListener("change", (event) => go({ policy: Number(event.target.value) }));
    by("layout").addEventListener("change", (event) => go({ layout: event.target.value }));
    by("spaces").addEventListener("change", (event) => go({ spaces: event.target.checked }));
    table.filter.addEventListener("change", (event) => go({ filter: event.target.value }));
    let waiting;
    table.search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(async () => {
        await table.find(table.search.value);
        table.draw(state);
      }, 150);
    });
    table.body.addEventListener("open", (event) => go({ pair: event.detail }));
    by("previous").addEventListener("click", KEYS.k);
    by("next").addEventListener("click", KEYS.j);
    by("help-open").addEventListener("click", KEYS["?"]);
    lanes.on("click", (token) => go(token));
    lanes.on("focusin", (token) => go(token));
    lanes.on("pointerover", ({ side, step }) => {
      detail.show({ ...state, side, step }, open.pair, open.figures);
      for (const move of cursors) move?.(step);
    });
    by("lanes").addEventListener("pointerleave", () => point());
    document.addEventListener("keydown", pressed);
    window.addEventListener("hashchange", () => {
      const before = { ...state };
      read();
      update(Object.keys(state).filter((key) => state[key] !== before[key]));
    });
    let resizing;
    window.addEventListener("resize", () => {
      clearTimeout(resizing);
      resizing = setTimeout(() => {
        if (open === null) return;
        cursors = [drawMargin()];
        drawPositions();
      }, 120);
    });
    if (window.innerWidth < 760) by("list-fold").open = false;
    read();
    table.draw(state);
    update(["pair", "first"]).catch((error) => {
      by("lanes").replaceChildren(page.element("p", "flag bad", `The pair cannot be unpacked: ${error.message}. A browser from 2023 or later is needed.`));
    });
  }

  start();
})();
