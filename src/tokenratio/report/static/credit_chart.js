"use strict";
// Small line charts, one point a step.
const charts = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;

  function node(name, attributes, parent) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent?.append(made);
    return made;
  }

  function label(text, attributes, parent) {
    node("text", attributes, parent).textContent = text;
  }

  function path(values, x, y) {
    let drawn = "", pen = "M";
    values.forEach((value, step) => {
      if (value === null || value === undefined) {
        pen = "M";
        return;
      }
      drawn += `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    });
    return drawn;
  }

  // series: {name, className, values}; marks: {step, text}; describe: the chart in words.
  function draw(target, { series, marks = [], describe, onStep }) {
    target.replaceChildren();
    const all = series.flatMap(({ values }) => values.filter((value) => value !== null && value !== undefined));
    const last = Math.max(1, ...series.map(({ values }) => values.length - 1));
    if (!all.length) {
      target.append(page.element("p", "muted small", "Nothing to draw."));
      return null;
    }
    const width = Math.max(260, target.clientWidth), height = 132;
    const low = all.reduce((a, b) => Math.min(a, b), 0), high = all.reduce((a, b) => Math.max(a, b), 0);
    const span = high - low || 1;
    const x = (step) => LEFT + (step / last) * (width - LEFT - RIGHT);
    const y = (value) => TOP + ((high - value) / span) * (height - TOP - BOTTOM);
    const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": describe });
    for (const value of new Set([low, 0, high])) {
      const isNear = value !== 0 && Math.abs(y(value) - y(0)) < 11;
      node("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: value === 0 ? "zero" : "grid" }, svg);
      if (!isNear) label(figure(value), { x: LEFT - 6, y: y(value) + 4, class: "axis", "text-anchor": "end" }, svg);
    }
    for (const step of ticks(last)) {
      label(step, { x: x(step), y: height - 5, class: "axis", "text-anchor": "middle" }, svg);
    }
    for (const { step, text } of marks) {
      node("line", { x1: x(step), x2: x(step), y1: TOP, y2: height - BOTTOM, class: "mark" }, svg);
      const atEnd = x(step) > width - 60;
      label(text, { x: x(step) + (atEnd ? -4 : 4), y: height - BOTTOM - 4, class: "axis", "text-anchor": atEnd ? "end" : "start" }, svg);
    }
    for (const { values, className } of series) node("path", { d: path(values, x, y), class: `line ${className}` }, svg);
    const cursor = node("line", { y1: TOP, y2: height - BOTTOM, class: "cursor" }, svg);
    if (onStep) {
      svg.addEventListener("click", (event) => {
        const at = (event.clientX - svg.getBoundingClientRect().left) * (width / svg.clientWidth);
        onStep(Math.min(last, Math.max(0, Math.round(((at - LEFT) / (width - LEFT - RIGHT)) * last))));
      });
    }
    const names = page.element("p", "names small");
    for (const { name, className } of series) {
      const entry = page.element("span", `name ${className}`);
      const swatch = node("svg", { viewBox: "0 0 22 8", width: 22, height: 8, "aria-hidden": "true" }, entry);
      node("path", { d: "M0 4L22 4", class: `line ${className}` }, swatch);
      entry.append(name);
      names.append(entry);
    }
    target.append(svg, names);
    return (step) => {
      cursor.setAttribute("x1", x(step));
      cursor.setAttribute("x2", x(step));
      cursor.classList.toggle("on", step <= last);
    };
  }

  function ticks(last) {
    const sizes = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
    const size = sizes.find((each) => last / each <= 8) ?? 2000;
    return Array.from({ length: Math.floor(last / size) + 1 }, (_, index) => index * size);
  }

  return { draw };
})();
