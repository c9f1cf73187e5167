"use strict";
// Texts of data and models: what is invisible, or would reorder the line, is written out.
const texts = (() => {
  const HIDDEN = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
  const PIECES = /([\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs})/u;
  const SIGNS = { "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };

  function sign(character) {
    return SIGNS[character] ?? `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  }

  // Appends a text to an element; `limit` in characters, `breaks` keeps line ends as such.
  function put(target, text, { limit = Infinity, breaks = false, spaces = false } = {}) {
    let shown = text;
    if (text.length > limit) {
      shown = Array.from(text.slice(0, 2 * limit)).slice(0, limit).join("");
    }
    const rest = text.length - shown.length;
    if (/^\p{M}/u.test(shown)) shown = `◌${shown}`; // it would sit on the token before
    for (const piece of shown.split(PIECES)) {
      if (piece === "") continue;
      if (HIDDEN.test(piece)) {
        target.append(page.element("span", "esc", sign(piece)));
        if (breaks && piece === "\n") target.append("\n");
      } else {
        target.append(spaces ? piece.replaceAll(" ", "·") : piece);
      }
    }
    if (rest > 0) target.append(page.element("span", "esc", `…+${rest.toLocaleString("en")}`));
    return target;
  }

  return { put };
})();
