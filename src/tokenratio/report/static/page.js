"use strict";
// What every page has: its data, and the theme: the system's until the reader chooses one.
const page = (() => {
  const THEMES = ["auto", "light", "dark"];
  const SIGNS = { auto: "◐", light: "☀", dark: "☾" };
  const WORDS = { auto: "as the system", light: "light", dark: "dark" };
  const KEY = "tokenratio-theme";
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const probe = document.createElement("span");

  function stored() {
    try {
      const found = localStorage.getItem(KEY);
      return THEMES.includes(found) ? found : "auto";
    } catch {
      return "auto"; // storage may be forbidden for files
    }
  }

  let chosen = stored();

  function isDark() {
    return chosen === "auto" ? system.matches : chosen === "dark";
  }

  function apply() {
    root.dataset.theme = isDark() ? "dark" : "light";
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = SIGNS[chosen];
      button.title = `Theme: ${WORDS[chosen]}`;
      button.setAttribute("aria-label", button.title);
    }
    document.dispatchEvent(new CustomEvent("themechange", { detail: { dark: isDark() } }));
  }

  function next() {
    chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
    try {
      localStorage.setItem(KEY, chosen);
    } catch {
      // it holds until the page is closed
    }
    apply();
  }

  apply(); // before anything is painted
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", next);
    apply();
  });

  return {
    isDark,
    // The value of the JSON that the page holds under this name.
    data: (name) => JSON.parse(document.getElementById(`data-${name}`).textContent),
    // A colour of the theme in force, such as --ink, as rgb(…).
    colour(name) {
      probe.hidden = true;
      probe.style.color = `var(${name})`;
      document.body.append(probe);
      return getComputedStyle(probe).color;
    },
    // An element with a class and text; text is never read as markup.
    element(tag, className, text) {
      const made = document.createElement(tag);
      if (className) made.className = className;
      if (text !== undefined) made.textContent = text;
      return made;
    },
  };
})();
