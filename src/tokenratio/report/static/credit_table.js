"use strict";
// The list of pairs: sorted, filtered, searched.
const table = (() => {
  const { view } = store;
  const FILTERS = {
    all: { name: "all pairs", is: () => true },
    wrong: { name: "wrongly ordered", is: (row) => row.margin < 0 },
    displaced: { name: "chosen displaced", is: (row) => row.chosen < 0 },
    truncated: { name: "truncated", is: (row) => row.pair.cut.some(Boolean) },
    tail: { name: "with a tail past T", is: (row) => row.tail > 0 },
  };
  const COLUMNS = [
    { key: "number", name: "#", of: (row) => row.number, show: (row) => row.number },
    { key: "prompt", name: "prompt", text: true, of: (row) => row.pair.title },
    { key: "margin", name: "margin", help: "β (Σρ chosen − Σρ rejected): the pair is ordered wrongly below 0", of: (row) => row.margin, signed: true },
    { key: "chosen", name: "chosen", help: "β Σρ of the chosen response: below 0 it is less likely than to the reference (displaced)", of: (row) => row.chosen, signed: true },
    { key: "peak", name: "|log R|", help: "the largest |log R| of the pair's steps, for the method shown", of: (row) => row.peak },
    { key: "loss", name: "loss", help: "of the pair, for the method shown", of: (row) => row.loss },
    { key: "tail", name: "tail", help: "tokens past T", of: (row) => row.tail, show: (row) => row.tail },
  ];
  const filter = document.getElementById("filter");
  const search = document.getElementById("search");
  const body = document.querySelector("#pairs tbody");
  const headings = {};
  let order = []; // the pairs shown, by number
  let found = null; // the pairs with the text that is searched; null for all

  function rowOf(number, { policy, method }) {
    const pair = view.pairs[number];
    const [chosen, margin, losses, peaks] = view.figures[policy][number];
    return {
      number, pair, chosen, margin, loss: losses[method], peak: peaks[method],
      tail: Math.abs(pair.lengths[0] - pair.lengths[1]),
    };
  }

  function build(change) {
    for (const [key, { name }] of Object.entries(FILTERS)) filter.append(new Option(name, key));
    const line = document.querySelector("#pairs thead tr");
    for (const { key, name, help, text } of COLUMNS) {
      const cell = page.element("th", text ? "" : "number");
      cell.scope = "col";
      const button = page.element("button", "sort", name);
      button.type = "button";
      if (help) button.title = help;
      button.addEventListener("click", () => change({ sort: key }));
      cell.append(button);
      headings[key] = cell;
      line.append(cell);
    }
  }

  function draw(state) {
    const { sort, descending } = state;
    const column = COLUMNS.find(({ key }) => key === sort) ?? COLUMNS[0];
    const { is } = FILTERS[state.filter] ?? FILTERS.all;
    filter.value = state.filter;
    const rows = view.pairs.map((_, number) => rowOf(number, state))
      .filter((row) => is(row) && (found === null || found.has(row.number)));
    const sign = descending ? -1 : 1;
    const rank = (value) => (value === null || value === undefined ? -Infinity : value);
    rows.sort((a, b) => {
      const [one, other] = [column.of(a), column.of(b)];
      const by = column.text ? one.localeCompare(other) : rank(one) - rank(other);
      return sign * by || a.number - b.number;
    });
    order = rows.map(({ number }) => number);
    for (const [key, cell] of Object.entries(headings)) {
      if (key === sort) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    body.replaceChildren(...rows.map(line));
    const count = document.getElementById("list-count");
    count.textContent = rows.length === view.pairs.length ? `${rows.length}` : `${rows.length} of ${view.pairs.length}`;
    mark(state.pair);
  }

  function line(row) {
    const made = document.createElement("tr");
    made.dataset.number = row.number;
    for (const { of, show, text, signed } of COLUMNS) {
      const cell = made.insertCell();
      if (text) {
        const button = page.element("button", "open");
        button.type = "button";
        texts.put(button.appendChild(document.createElement("bdi")), row.pair.title || "(empty)", { limit: 90 });
        cell.append(button);
      } else {
        cell.className = "number";
        cell.textContent = show ? show(row) : figure(of(row), signed);
      }
    }
    if (row.margin < 0) made.classList.add("wrong");
    return made;
  }

  function mark(number) {
    for (const each of body.children) {
      const isOpen = Number(each.dataset.number) === number;
      each.classList.toggle("current", isOpen);
      if (isOpen) {
        each.setAttribute("aria-current", "true");
        const { parentElement: frame } = body.parentElement.closest("table");
        const top = each.offsetTop - body.parentElement.tHead.offsetHeight;
        if (top < frame.scrollTop || each.offsetTop + each.offsetHeight > frame.scrollTop + frame.clientHeight) {
          frame.scrollTop = top - 40;
        }
      } else each.removeAttribute("aria-current");
    }
  }

  // The pair before or after one in the list; the first if that is not in it.
  function beside(number, by) {
    const at = order.indexOf(number);
    if (at < 0) return order[0];
    return order[Math.min(order.length - 1, Math.max(0, at + by))];
  }

  async function find(text) {
    const wanted = text.trim().toLocaleLowerCase();
    if (!wanted) {
      found = null;
      return;
    }
    const matches = await Promise.all(view.pairs.map(async (_, number) => {
      const pair = await store.pair(number);
      pair.searched ??= [pair.prompt, pair.chosen.texts.join(""), pair.rejected.texts.join("")].join("\n").toLocaleLowerCase();
      return pair.searched.includes(wanted);
    }));
    found = new Set(matches.flatMap((is, number) => (is ? [number] : [])));
  }

  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row) body.dispatchEvent(new CustomEvent("open", { detail: Number(row.dataset.number) }));
  });

  return { build, draw, mark, beside, find, body, filter, search, rowOf, FILTERS, COLUMNS };
})();
