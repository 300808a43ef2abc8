// The live view: what the model does now, what lies where, what may be changed, and one step in detail.
import { request } from "./api.js";
import { announce, byId, element, icon, size } from "./dom.js";
import { HeatMap } from "./heat.js";
import { Strip, laneStrip, lanesOf } from "./lanes.js";
import { history, latest, loadingText, onState, rate } from "./state.js";
import { StepView } from "./step.js";
import { Switches } from "./switches.js";

const WINDOW = 30; // readings that the hit rate looks back
const SAMPLE_TOKENS = 400;
const WATCH = "Generate something to watch";
const TIERS = { slots: "Slots", experts: "Experts", disk: "Experts on disk", keys_and_values: "Keys and values", prefix_cache: "Prefix cache", prefix_cache_disk: "Prefix cache on disk", process: "This process" };

export class LiveView {
  constructor() {
    this.place = byId("live");
    this.made = "";
    this.sample = new Sample();
    onState((state, problem) => this.told(state, problem));
    window.addEventListener("themechange", () => this.repaint());
    new ResizeObserver(() => this.update()).observe(this.place);
  }

  show(on) {
    this.on = on;
    if (on) this.update();
  }

  told(state, problem) {
    this.problem = problem;
    if (this.on) this.update();
  }

  repaint() {
    this.strips?.forEach((strip) => strip.repaint());
    this.update();
  }

  /** The parts for what this model has; then their values. */
  update() {
    if (!this.on) return;
    const state = latest();
    const lanes = lanesOf(state);
    const parts = JSON.stringify([state?.status === "ok", lanes.map(({ name }) => name), Boolean(state?.switches.most_slots), Boolean(state?.experts)]);
    if (!state || state.status === "loading") {
      this.made = "";
      this.place.replaceChildren(this.header(), element("p", { class: "empty" }, state ? loadingText(state) : this.problem?.message ?? "Asking the server …"));
      return;
    }
    if (parts !== this.made) this.make(state, lanes);
    this.made = parts;
    this.values(state);
  }

  header() {
    return element("header", { class: "bar" },
      element("a", { class: "quiet button", href: "#/", "aria-label": "Back to the chat", title: "Back to the chat" }, icon("left")),
      element("h1", {}, "Live view"), this.about = element("span", { class: "about" }), this.sample.button);
  }

  make(state, lanes) {
    const planned = Boolean(state.switches.most_slots);
    this.tiles = element("div", { class: "tiles" });
    this.strips = [
      ...lanes.map(laneStrip),
      new Strip({ title: "Tokens/s", kind: "pace", value: (a, b) => rate(a, b, (one) => one.tokens.generated), shown: (value) => (value < 10 ? value.toFixed(1) : Math.round(value)) }),
      ...(planned ? [new Strip({ title: "Hit rate", kind: "hits", most: 1, value: hitRate, shown: (share) => `${Math.round(100 * share)} %` })] : []),
    ];
    this.memory = element("div", { class: "memory" });
    this.queue = element("div", { class: "queue" });
    [this.heat, this.step, this.switches] = planned ? [new HeatMap(), new StepView(), new Switches()] : [null, null, null];
    const grid = [
      card("Lanes", "how busy each is, of every second", element("div", { class: "strips" }, ...this.strips.map((strip) => strip.element)), "wide"),
      planned ? card("Slots by layer and expert", "", element("div", {}, this.heat.element, heatLegend()), "wide") : null,
      planned ? card("Policy and slots", "", this.switches.element, "half") : card("What runs where", "", element("p", {}, nothingPlanned(state)), "half"),
      card("Memory", "", this.memory, "half"),
      card("Requests", "", this.queue, "half"),
      planned ? card("A step in detail", "", this.step.element, "wide") : null,
    ];
    this.place.replaceChildren(this.header(), element("div", { class: "live-scroll" }, this.tiles, element("div", { class: "grid" }, ...grid.filter(Boolean))));
  }

  values(state) {
    const { experts, requests } = state;
    this.about.textContent = experts ? `${state.model} · ${experts.policy}${experts.lossy ? ` · ${experts.lossy} (lossy)` : ""}${experts.n_slots && experts.accelerator_kind === "emulated" ? " · times of accelerator and link are emulated" : ""}` : state.model;
    const pace = paceOver(3);
    const hits = experts?.n_slots ? hitRate(history.at(-WINDOW) ?? history[0], history.at(-1)) ?? total(experts) : null;
    this.tiles.replaceChildren(...[
      tile("Tokens a second", pace === null ? "–" : pace.toFixed(1), `${state.tokens.generated.toLocaleString("en")} since the start`),
      experts?.n_slots ? tile("Hit rate", hits === null ? "–" : `${Math.round(100 * hits)} %`, `${experts.hits.toLocaleString("en")} of ${experts.activated.toLocaleString("en")} experts were in a slot`) : null,
      experts?.n_slots ? tile("Slots", `${experts.n_slots}`, `of ${experts.n_experts} experts (${Math.round((100 * experts.n_slots) / experts.n_experts)} %)`) : experts ? tile("Experts", experts.n_experts, `in ${experts.n_layers} layers, all on the CPU`) : null,
      experts?.n_slots ? tile("Over the link", size(experts.transfer_bytes), `${experts.transfers.toLocaleString("en")} waited for, ${experts.prefetches.toLocaleString("en")} ahead of time`) : null,
      tile("Replies", `${requests.running}`, requests.waiting ? `${requests.waiting} wait` : "nobody waits"),
    ].filter(Boolean));
    this.strips.forEach((strip) => strip.show());
    this.memory.replaceChildren(...state.memory.map(tier));
    this.queue.replaceChildren(...queue(requests));
    if (!this.heat) return;
    this.switches.show(state);
    this.heat.read().catch(() => {}); // the state tells of a server that is gone
    this.step.draw();
  }
}

/** A reply that nobody reads: something to watch. */
class Sample {
  constructor() {
    this.button = element("button", { type: "button", class: "plain", onclick: () => this.toggle() }, WATCH);
    this.aborted = null;
  }

  async toggle() {
    if (this.aborted) {
      this.aborted.abort();
      return;
    }
    this.aborted = new AbortController();
    this.button.textContent = "Stop it";
    const body = { prompt: "It was a bright morning, and", max_tokens: SAMPLE_TOKENS, ignore_eos: true };
    try {
      await request("v1/completions", { body, signal: this.aborted.signal });
    } catch (error) {
      if (error.name !== "AbortError") announce(error.message);
    }
    this.aborted = null;
    this.button.textContent = WATCH;
  }
}

function card(title, note, content, width) {
  return element("section", { class: `card ${width}`, "aria-label": title }, element("h2", {}, title, note ? element("small", {}, note) : null), content);
}

function tile(title, figure, note) {
  return element("div", { class: "tile" }, element("span", {}, title), element("strong", {}, String(figure)), element("small", {}, note));
}

function heatLegend() {
  return element("p", { class: "legend" }, element("span", { class: "accel" }, "in a slot"), element("span", { class: "cpu" }, "used from host memory"), element("span", { class: "cell" }, "not used lately"), element("span", { class: "words" }, "the stronger, the more often lately"));
}

function paceOver(readings) {
  return rate(history.at(-1 - readings) ?? history[0], history.at(-1), (state) => state.tokens.generated);
}

/** Of the experts that were activated between two readings; null where none was. */
function hitRate(before, after) {
  const [hits, all] = ["hits", "activated"].map((name) => rate(before, after, (state) => state.experts?.[name]));
  return all ? hits / all : null;
}

function total({ hits, activated }) {
  return activated ? hits / activated : null;
}

function nothingPlanned({ experts }) {
  if (!experts) return "This model has no experts that HybriMoE runs: everything runs as transformers made it.";
  return `There is no accelerator with slots: all ${experts.n_experts} experts of ${experts.n_layers} layers run on the CPU, so nothing is moved and nothing is decided. `
    + "With an accelerator, or started with --accelerator emulated --slots 0.25, this view shows three lanes, the slots, and why each expert ran where it did.";
}

function tier({ name, device, bytes, of_bytes: of }) {
  const share = of ? Math.min(1, bytes / of) : null;
  const level = element("i", {});
  level.style.width = `${100 * (share ?? 1)}%`;
  return element("div", { class: `tier ${name}` }, element("span", {}, TIERS[name], element("small", {}, device)), element("b", { "aria-hidden": "true" }, level), element("span", {}, of ? `${size(bytes)} of ${size(of)}` : size(bytes)));
}

function queue({ running, waiting, parallel, queue_length: most, in_turn: inTurn }) {
  const places = Array.from({ length: parallel }, (_, place) => element("i", { class: place < running ? "taken" : "" }));
  return [
    element("div", { class: "places", role: "img", "aria-label": `${running} of ${parallel} places are taken` }, ...places),
    element("p", {}, `${running} of ${parallel} places answer, ${waiting} of at most ${most} requests wait.`),
    parallel > 1 && inTurn ? element("p", { class: "hint" }, `Replies get their tokens one after another: ${inTurn}.`) : null,
  ].filter(Boolean);
}
