// Dark or light: what the system prefers, or what the switch says. Runs before the first paint, so nothing flashes.
(() => {
  const KEY = "hybrimoe.theme";
  const ORDER = ["auto", "light", "dark"];
  const WORDS = { auto: "Auto", light: "Light", dark: "Dark" };

  function stored() {
    try {
      const value = localStorage.getItem(KEY);
      return ORDER.includes(value) ? value : "auto";
    } catch {
      return "auto"; // a browser that keeps nothing
    }
  }

  function show(theme) {
    document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (!button) return;
    button.querySelector("span").textContent = WORDS[theme];
    button.setAttribute("aria-label", `Colours: ${WORDS[theme]}. Change`);
  }

  function next() {
    const theme = ORDER[(ORDER.indexOf(document.documentElement.dataset.theme) + 1) % ORDER.length];
    try {
      localStorage.setItem(KEY, theme);
    } catch { /* it holds until the page is closed */ }
    show(theme);
    window.dispatchEvent(new Event("themechange"));
  }

  show(stored());
  document.addEventListener("DOMContentLoaded", () => {
    show(stored());
    document.getElementById("theme").addEventListener("click", next);
  });
  window.addEventListener("storage", (event) => event.key === KEY && show(stored()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    window.dispatchEvent(new Event("themechange"));
  });
})();
