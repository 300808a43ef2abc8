// One decode step in detail: what ran when on which lane, and why each expert ran where it did.
import { json } from "./api.js";
import { announce, element } from "./dom.js";
import { colour } from "./lanes.js";

const ROW_PX = 26;
const LABEL_PX = 58;
const INKS = { cpu_expert: "cpu", accel_expert: "accel", transfer: "link", prefetch: "ahead", read: "disk" };
const WORDS = { cpu_expert: "expert on the CPU", accel_expert: "expert in a slot", transfer: "transfer that was waited for", prefetch: "transfer ahead of time", read: "read from disk" };
const SHOWN_ALTERNATIVES = 5;
const GAP_SHARE = 0.02; // of the time in which any lane works: no gap between two tasks is drawn longer

export class StepView {
  constructor() {
    this.button = element("button", { type: "button", class: "primary", onclick: () => this.record() }, "Record the next step");
    this.said = element("p", { class: "hint", "aria-live": "polite" }, "The next step of a reply, task by task, and why each expert ran where it did.");
    this.found = element("div", {});
    this.element = element("div", { class: "step" }, element("div", { class: "row" }, this.button, this.said), this.found);
    this.step = null;
  }

  async record() {
    this.button.disabled = true;
    this.said.textContent = "Waiting for a step: it comes with the next token of a reply …";
    try {
      this.step = await json("hybrimoe/step", { method: "POST" });
      [this.tasks, this.workingUs, this.drawnUs] = withoutGaps(this.step.tasks);
      this.layer = 0;
      this.show();
      announce("A step was recorded");
    } catch (error) {
      this.said.textContent = error.message;
    }
    this.button.disabled = false;
  }

  show() {
    const { us, kind, policy, n_tokens: tokens, layers, tasks } = this.step;
    const cpu = layers.flatMap((layer) => layer.decisions).filter(({ lane }) => lane === "cpu").length;
    const all = layers.flatMap((layer) => layer.decisions).length;
    this.said.textContent = `${(us / 1000).toFixed(2)} ms (${kind}), of which a lane works on experts in ${(this.workingUs / 1000).toFixed(2)} ms; policy ${policy}, ${tokens === 1 ? "one token" : `${tokens} tokens`}: ${cpu} of ${all} experts ran on the CPU, ${tasks.filter((task) => task.kind === "transfer").length} were waited for.`;
    this.canvas = element("canvas", { role: "img", "aria-label": "Tasks of the step by lane" });
    this.found.replaceChildren(element("div", { class: "gantt" }, this.canvas), legend(tasks), this.why());
    this.draw();
  }

  draw() {
    if (!this.step || !this.canvas) return;
    const lanes = [...new Set(this.tasks.map(({ lane }) => lane))].sort((a, b) => rank(a) - rank(b));
    const width = Math.max(260, this.canvas.parentElement.clientWidth);
    const height = lanes.length * ROW_PX + 22;
    const scale = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * scale, height: height * scale });
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = "11px system-ui";
    pen.textBaseline = "middle";
    this.paint(pen, lanes, (width - LABEL_PX) / this.drawnUs, height);
  }

  paint(pen, lanes, perUs, height) {
    this.begins().forEach(([layer, us]) => {
      const x = LABEL_PX + us * perUs;
      pen.fillStyle = colour("line");
      pen.fillRect(x, 0, 1, height - 16);
      pen.fillStyle = colour("faint");
      pen.fillText(`layer ${layer}`, x + 2, height - 8);
    });
    lanes.forEach((lane, row) => {
      pen.fillStyle = colour("faint");
      pen.fillText(lane.replace("cpu", "CPU"), 0, (row + 0.5) * ROW_PX);
      for (const task of this.tasks.filter((one) => one.lane === lane)) {
        pen.fillStyle = colour(INKS[task.kind] ?? "faint");
        const wide = Math.max(1.5, (task.end_us - task.start_us) * perUs - 0.75);
        pen.beginPath();
        pen.roundRect(LABEL_PX + task.start_us * perUs, row * ROW_PX + 4, wide, ROW_PX - 8, Math.min(3, wide / 2));
        pen.fill();
      }
    });
  }

  /** [layer, us] where each layer begins, as far as there is room for its name. */
  begins() {
    const first = new Map();
    for (const task of this.tasks) {
      if (task.kind !== "prefetch") first.set(task.layer, Math.min(first.get(task.layer) ?? Infinity, task.start_us));
    }
    const room = this.drawnUs / 14;
    let free = -Infinity;
    return [...first].sort((a, b) => a[1] - b[1]).filter(([, us]) => {
      if (us < free || us + room > this.drawnUs) return false;
      free = us + room;
      return true;
    });
  }

  /** The decisions of a layer, to be chosen. */
  why() {
    const choice = element("select", { "aria-label": "Layer", onchange: () => {
      this.layer = choice.selectedIndex;
      body.replaceChildren(...this.layerTable());
    } }, ...this.step.layers.map(({ layer }) => element("option", {}, `Layer ${layer}`)));
    choice.selectedIndex = this.layer;
    const body = element("div", {}, ...this.layerTable());
    return element("section", { class: "why", "aria-label": "Why" }, element("div", { class: "row" }, element("h3", {}, "Why"), choice), body);
  }

  layerTable() {
    const { decisions, alternatives, expected_us: expected, prefetched } = this.step.layers[this.layer];
    const head = ["expert", "in a slot", "CPU µs", "slot µs", "transfer µs", "ran on"];
    const rows = decisions.map((one) => element("tr", { class: one.lane }, ...[
      one.expert, one.resident ? "yes" : "no", Math.round(one.cpu_us), Math.round(one.accel_us), one.resident ? "" : Math.round(one.transfer_us), one.lane === "cpu" ? "CPU" : "accelerator",
    ].map((value) => element("td", {}, String(value)))));
    const others = alternatives.slice(0, SHOWN_ALTERNATIVES).map(({ policy, makespan_us: us }) => `${policy} ${Math.round(us)}`).join(", ");
    const ahead = prefetched.map(([layer, expert]) => `expert ${expert} of layer ${layer}`).join(", ");
    return [
      element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Decisions" }, element("table", {}, element("thead", {}, element("tr", {}, ...head.map((word) => element("th", { scope: "col" }, word)))), element("tbody", {}, ...rows))),
      element("p", { class: "hint" }, `Expected ${Math.round(expected)} µs. Balance policies by themselves, µs: ${others}.${ahead ? ` Fetched ahead: ${ahead}.` : ""}`),
    ];
  }
}

/** The tasks moved together where no lane works (attention, norms); us in which any works; us that are drawn. */
function withoutGaps(tasks) {
  const sorted = [...tasks].sort((a, b) => a.start_us - b.start_us);
  const busy = [];
  for (const { start_us: start, end_us: end } of sorted) {
    if (busy.length && start <= busy.at(-1)[1]) busy.at(-1)[1] = Math.max(busy.at(-1)[1], end);
    else busy.push([start, end]);
  }
  const workingUs = busy.reduce((sum, [start, end]) => sum + end - start, 0);
  const shifts = [];
  let moved = 0;
  busy.forEach(([start], at) => {
    if (at) moved += Math.max(0, start - busy[at - 1][1] - GAP_SHARE * workingUs);
    shifts.push([start, moved]);
  });
  const shifted = sorted.map((task) => {
    const [, by] = shifts.findLast(([start]) => start <= task.start_us);
    return { ...task, start_us: task.start_us - by, end_us: task.end_us - by };
  });
  return [shifted, workingUs, Math.max(...shifted.map(({ end_us: end }) => end))];
}

function rank(lane) {
  return ["cpu", "accel", "link", "disk"].indexOf(lane.split(":")[0]) + Number(lane.split(":")[1] ?? 0) / 100;
}

function legend(tasks) {
  const kinds = Object.keys(WORDS).filter((kind) => tasks.some((task) => task.kind === kind));
  return element("p", { class: "legend" }, ...kinds.map((kind) => element("span", { class: INKS[kind] }, WORDS[kind])));
}
