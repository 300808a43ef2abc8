// The settings of a conversation: system prompt and sampling. What is left empty is not sent: the model's own holds.
import { byId, element, iconButton, remembered } from "./dom.js";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, hint: "0: always the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01, hint: "the likeliest tokens of so much probability" },
  { name: "top_k", label: "Top k", min: 0, max: 1000, step: 1, hint: "so many of the likeliest tokens" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "at least so likely beside the likeliest" },
  { name: "max_tokens", label: "Longest reply", min: 1, max: 1_000_000, step: 1, hint: "tokens" },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, hint: "the same seed, the same reply" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.1, max: 2, step: 0.05, hint: "above 1: fewer repetitions" },
];
const defaults = remembered("hybrimoe.settings", {});

/** What a new conversation begins with. */
export function defaultSettings() {
  return { ...defaults.get() };
}

/** The fields of a request that settings stand for. */
export function requested(settings) {
  const asked = Object.fromEntries(NUMBERS.filter(({ name }) => settings[name] != null).map(({ name }) => [name, settings[name]]));
  const stops = (settings.stop ?? "").split("\n").filter(Boolean);
  return stops.length ? { ...asked, stop: stops } : asked;
}

/** The drawer. `get()` gives the present settings, `change(settings)` is called with others. */
export class SettingsDrawer {
  constructor(get, change) {
    this.drawer = byId("settings");
    this.opener = byId("open-settings");
    this.get = get;
    this.change = change;
    this.opener.addEventListener("click", () => this.toggle());
    this.drawer.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.close();
    });
  }

  toggle() {
    if (this.drawer.hidden) this.open();
    else this.close();
  }

  open() {
    this.fill();
    this.drawer.hidden = false;
    this.opener.setAttribute("aria-expanded", "true");
    this.drawer.querySelector("textarea").focus();
  }

  close() {
    if (this.drawer.hidden) return;
    this.drawer.hidden = true;
    this.opener.setAttribute("aria-expanded", "false");
    this.opener.focus();
  }

  /** The form with the settings as they are. */
  fill() {
    const settings = this.get();
    const system = element("textarea", { rows: "5", placeholder: "You are a helpful assistant.", oninput: () => this.set("system", system.value) });
    system.value = settings.system ?? "";
    const stop = element("textarea", { rows: "2", placeholder: "one a line", oninput: () => this.set("stop", stop.value) });
    stop.value = settings.stop ?? "";
    const fields = NUMBERS.map((number) => this.field(number, settings[number.name]));
    const keep = element("button", { type: "button", class: "plain", onclick: () => {
      defaults.set({ ...this.get() });
      keep.textContent = "New conversations begin with these";
    } }, "Use for new conversations");
    const reset = element("button", { type: "button", class: "plain", onclick: () => {
      this.change({});
      this.fill();
    } }, "Clear");
    this.drawer.replaceChildren(
      element("header", { class: "bar" }, element("h2", {}, "Settings"), iconButton("close", "Close the settings", () => this.close())),
      element("div", { class: "fields" },
        element("label", { class: "field" }, element("span", {}, "System prompt"), system),
        element("div", { class: "numbers" }, ...fields),
        element("label", { class: "field" }, element("span", {}, "Stop texts"), stop),
        element("p", { class: "hint" }, "They hold from the next reply on. Empty fields are the model's own."),
        element("div", { class: "row" }, keep, reset)),
    );
  }

  field({ name, label, min, max, step, hint }, value) {
    const input = element("input", { type: "number", min, max, step: step === 1 ? 1 : "any", inputmode: "decimal", placeholder: "model's own", "aria-describedby": `hint-${name}` });
    input.value = value ?? "";
    input.addEventListener("input", () => {
      const number = input.valueAsNumber;
      const wrong = input.value !== "" && !input.checkValidity();
      input.setAttribute("aria-invalid", String(wrong || input.validity.badInput));
      if (!wrong && !input.validity.badInput) this.set(name, Number.isFinite(number) ? number : null);
    });
    return element("label", { class: "field" }, element("span", {}, label), input, element("small", { id: `hint-${name}` }, `${hint} (${min} to ${max > 1e9 ? "2⁵³" : max})`));
  }

  set(name, value) {
    this.change({ ...this.get(), [name]: value === "" ? null : value });
  }
}
