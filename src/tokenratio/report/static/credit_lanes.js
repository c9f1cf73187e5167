"use strict";
// The two lanes of the open pair: step t of the chosen response above step t of the rejected one.
const lanes = (() => {
  const SIDES = ["chosen", "rejected"];
  const KINDS = { t: "", p: "part", s: "special", e: "end" };
  const LONGEST = 40;
  const box = document.getElementById("lanes");
  let cells = { chosen: [], rejected: [] };
  let active = null;

  function cell(pair, side, step, spaces) {
    const { texts: words, kinds } = pair[side];
    const made = page.element("button", `cell ${side} ${KINDS[kinds[step]]}`);
    made.type = "button";
    made.tabIndex = -1;
    made.dataset.side = side;
    made.dataset.step = step;
    if (!words[step].replaceAll(" ", "") && !spaces) made.setAttribute("aria-label", "space");
    made.append(texts.put(document.createElement("bdi"), words[step], { limit: LONGEST, spaces }));
    cells[side].push(made);
    return made;
  }

  // Where a side has no token: its cut, once, or nothing.
  function gap(pair, side, step) {
    const { cut, texts: words } = pair[side];
    if (cut && step === words.length) {
      const made = page.element("span", "cell cut", `✂ ${cut}`);
      made.title = `${cut} tokens cut at max_length`;
      return made;
    }
    return page.element("span", "cell none");
  }

  function draw(pair, { layout, spaces, isLocal }) {
    cells = { chosen: [], rejected: [] };
    active = null;
    box.className = `lanes ${layout}`;
    const made = layout === "text" ? running(pair, spaces) : aligned(pair, spaces, isLocal);
    box.replaceChildren(...made);
    if (layout === "aligned") name(pair);
  }

  function aligned(pair, spaces, isLocal) {
    const made = [];
    const lengths = SIDES.map((side) => pair[side].texts.length + (pair[side].cut ? 1 : 0));
    for (let step = 0; step < Math.max(...lengths); step += 1) {
      if (step === pair.shared) {
        const mark = page.element("span", "boundary", `T ${pair.shared}`);
        mark.title = `From step ${pair.shared} on only one response has tokens`;
        made.push(mark);
      }
      const column = page.element("div", "step");
      if (step >= pair.shared) column.classList.add(isLocal ? "unseen" : "tail");
      if (step === pair.divergence) column.classList.add("diverges");
      if (step % 10 === 0) column.dataset.tick = step;
      for (const side of SIDES) {
        const has = step < pair[side].texts.length;
        column.append(has ? cell(pair, side, step, spaces) : gap(pair, side, step));
      }
      made.push(column);
    }
    return made;
  }

  function running(pair, spaces) {
    return SIDES.map((side) => {
      const block = page.element("div", "block");
      block.append(page.element("div", "lane-name", side));
      const text = page.element("p", "run");
      text.dir = "auto";
      pair[side].texts.forEach((word, step) => {
        const made = cell(pair, side, step, spaces);
        if (step >= pair.shared) made.classList.add("late");
        if (step === pair.divergence) made.classList.add("first-difference");
        text.append(made);
        if (word.endsWith("\n")) text.append(document.createElement("br"));
      });
      if (pair[side].cut) text.append(gap(pair, side, pair[side].texts.length));
      block.append(text);
      return block;
    });
  }

  // The names of the lanes at the left of every line of steps.
  function name() {
    box.querySelectorAll(".line-name").forEach((each) => each.remove());
    const tops = new Set();
    for (const column of box.querySelectorAll(".step")) tops.add(column.offsetTop);
    for (const top of tops) {
      const label = page.element("div", "line-name");
      label.setAttribute("aria-hidden", "true");
      label.style.top = `${top}px`;
      for (const side of SIDES) {
        const each = page.element("span", "", side);
        each.dataset.short = side[0].toUpperCase();
        label.append(each);
      }
      box.append(label);
    }
  }

  // Colours every token by its value; `range` is the largest size that has a colour of its own.
  function paint(valueAt, range) {
    for (const side of SIDES) {
      cells[side].forEach((each, step) => {
        const value = valueAt(side, step);
        const isKnown = value !== undefined && value !== null;
        const share = isKnown && range > 0 ? Math.min(1, Math.abs(value) / range) : 0;
        each.style.setProperty("--share", share.toFixed(3));
        each.classList.toggle("negative", isKnown && value < 0);
        each.classList.toggle("unknown", !isKnown);
      });
    }
  }

  // Marks a token as the one the detail box is about.
  function select(side, step, { focus = false } = {}) {
    active?.classList.remove("active");
    if (active) active.tabIndex = -1;
    active = cells[side]?.[step] ?? null;
    if (!active) return;
    active.classList.add("active");
    active.tabIndex = 0;
    if (focus) active.focus({ preventScroll: true });
    active.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function tokenAt(event) {
    const found = event.target.closest?.("button.cell");
    return found && box.contains(found) ? { side: found.dataset.side, step: Number(found.dataset.step) } : null;
  }

  function on(name_, handler) {
    box.addEventListener(name_, (event) => {
      const token = tokenAt(event);
      if (token) handler(token, event);
    });
  }

  let width = 0;
  new ResizeObserver(() => {
    if (box.clientWidth !== width && box.classList.contains("aligned")) name();
    width = box.clientWidth;
  }).observe(box);

  return { SIDES, draw, paint, select, on };
})();
