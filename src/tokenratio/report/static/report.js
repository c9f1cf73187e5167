"use strict";
// Draws the figures when they come into view, in the theme in force; follows a run in progress.
(() => {
  const MOST_ROWS = 200;
  const POLL = 2000; // milliseconds
  const touches = window.matchMedia("(pointer: coarse)").matches;
  let figures = byName(page.data("figures"));
  const drawn = new Set();

  function byName(list) {
    return new Map(list.map((figure) => [figure.name, figure]));
  }

  const places = () => [...document.querySelectorAll("[data-figure]")];
  const plotOf = (place) => place.querySelector(".plot");

  // --- drawing ---------------------------------------------------------------------------------

  function layoutOf(figure) {
    const [ink, line, paper] = ["--ink", "--line", "--paper"].map(page.colour);
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    const { xaxis, yaxis, ...rest } = figure.layout;
    return {
      paper_bgcolor: "rgba(0, 0, 0, 0)",
      plot_bgcolor: "rgba(0, 0, 0, 0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
      margin: { l: 48, r: 12, t: 8, b: 36 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hovermode: "x unified",
      hoverlabel: { bgcolor: paper, bordercolor: line, font: { color: ink } },
      dragmode: touches ? false : "zoom",
      uirevision: figure.name, // a zoom stays when a run goes on
      ...rest,
      xaxis: { ...axis, ...xaxis },
      yaxis: { ...axis, ...yaxis },
    };
  }

  // Those of the palette that are dim on black, brighter.
  const ON_BLACK = { "#0072b2": "#4ba7e3", "#d55e00": "#f28542", "#009e73": "#34c497" };

  function onBlack(style) {
    return { ...style, color: ON_BLACK[style.color] ?? style.color };
  }

  function tracesOf(figure) {
    const raw = document.getElementById("raw");
    const shown = !raw || raw.checked;
    return figure.data.map((trace) => {
      const made = trace.meta === "raw" ? { ...trace, visible: shown } : { ...trace };
      if (page.isDark()) {
        for (const part of ["line", "marker", "error_x", "error_y"]) {
          if (made[part]) made[part] = onBlack(made[part]);
        }
      }
      return made;
    });
  }

  function draw(place) {
    const figure = figures.get(place.dataset.figure);
    drawn.add(place);
    Plotly.react(plotOf(place), tracesOf(figure), layoutOf(figure), {
      displayModeBar: false,
      responsive: true,
    });
  }

  const redraw = () => drawn.forEach(draw);

  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting && !drawn.has(target)) draw(target);
      }
    },
    { rootMargin: "300px" },
  );

  // --- the values of a figure as a table -------------------------------------------------------

  function valuesOf(figure) {
    if (figure.layout.hovermode === "closest") {
      const rows = figure.data.flatMap((trace) =>
        trace.x.map((x, i) => [trace.text?.[i] ?? trace.name, x, trace.y[i]]),
      );
      const titles = [figure.layout.xaxis, figure.layout.yaxis].map((axis) => axis.title.text);
      return { header: ["", ...titles], rows };
    }
    const raw = new Set(figure.data.filter((t) => t.meta === "raw").map((t) => t.name));
    const kept = figure.data.filter((trace) => !raw.has(`${trace.name}, each step`));
    const steps = [...new Set(kept.flatMap((trace) => trace.x))].sort((a, b) => a - b);
    const at = kept.map((trace) => new Map(trace.x.map((x, i) => [x, trace.y[i]])));
    const rows = steps.map((step) => [step, ...at.map((values) => values.get(step) ?? "")]);
    return { header: ["step", ...kept.map((trace) => trace.name)], rows };
  }

  const DECODED = { "&lt;": "<", "&amp;": "&" };
  const plain = (text) => String(text).replace(/&(lt|amp);/g, (found) => DECODED[found]);

  function fillValues(details) {
    details.querySelector(".scroll")?.remove();
    const { header, rows } = valuesOf(figures.get(details.closest("figure").dataset.figure));
    const every = Math.ceil(rows.length / MOST_ROWS);
    const scroll = page.element("div", "scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "group");
    scroll.setAttribute("aria-label", "Values of the figure");
    const table = page.element("table");
    if (every > 1) {
      const words = `Every ${every}th of ${rows.length} rows.`;
      table.append(page.element("caption", "", words));
    }
    const head = table.createTHead().insertRow();
    for (const text of header) {
      const cell = page.element("th", "number", plain(text));
      cell.scope = "col";
      head.append(cell);
    }
    const body = table.createTBody();
    rows.forEach((row, index) => {
      if (index % every) return;
      const line = body.insertRow();
      row.forEach((value) => line.append(page.element("td", "number", plain(value))));
    });
    scroll.append(table);
    details.append(scroll);
  }

  // --- a run in progress -----------------------------------------------------------------------

  function parts(root) {
    return new Map([...root.querySelectorAll("[data-part]")].map((p) => [p.dataset.part, p]));
  }

  function replaceParts(markup) {
    const now = parts(new DOMParser().parseFromString(markup, "text/html"));
    for (const [name, part] of parts(document)) {
      const next = now.get(name);
      if (part.innerHTML === next.innerHTML) continue;
      const open = [...part.querySelectorAll("details")].map((each) => each.open);
      part.replaceChildren(...document.importNode(next, true).childNodes);
      part.querySelectorAll("details").forEach((each, i) => (each.open = Boolean(open[i])));
    }
  }

  function isSameShape(state) {
    const now = parts(new DOMParser().parseFromString(state.body, "text/html"));
    const names = (of) => [...of.keys()].join("\n");
    return names(now) === names(parts(document)) &&
      names(byName(state.figures)) === names(figures);
  }

  const live = document.getElementById("live");
  let version = live && page.data("version");

  async function follow() {
    try {
      const response = await fetch(`state?version=${version}`, { cache: "no-store" });
      if (response.status === 200) {
        const state = await response.json();
        if (!isSameShape(state)) {
          location.reload();
          return;
        }
        version = state.version;
        figures = byName(state.figures);
        replaceParts(state.body);
        redraw();
        live.textContent = `live · ${new Date().toLocaleTimeString()}`;
      } else if (response.status !== 204) {
        live.textContent = await response.text();
      }
    } catch {
      live.textContent = "the server has ended";
    }
    setTimeout(follow, POLL);
  }

  // --- set up ----------------------------------------------------------------------------------

  places().forEach((place) => watcher.observe(place));
  document.addEventListener("themechange", redraw);
  document.getElementById("raw")?.addEventListener("change", redraw);
  document.querySelectorAll("details.values").forEach((details) => {
    details.addEventListener("toggle", () => details.open && fillValues(details));
  });
  window.addEventListener("beforeprint", () => {
    places().forEach((place) => drawn.has(place) || draw(place));
  });
  if (live) follow();
})();
