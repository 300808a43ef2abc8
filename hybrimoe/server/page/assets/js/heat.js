// Slots by layer and expert: how often each expert was used lately, and which experts are in a slot.
import { json } from "./api.js";
import { element } from "./dom.js";
import { colour } from "./lanes.js";

const FADES = 0.85; // of what was used before, a reading later
const LABEL_PX = 26;
const WIDEST_PX = 34;
const TALLEST_PX = 22;
const SMALLEST_PX = 4;
const FLATTEST_PX = 10;
const HEIGHT_PX = 340; // of all rows, where they can be as flat

export class HeatMap {
  constructor() {
    this.canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": "Slots by layer and expert; arrow keys move over them" });
    this.reading = element("output", { class: "reading", "aria-live": "polite" });
    this.element = element("div", { class: "heat" }, element("div", { class: "scroller" }, this.canvas), this.reading);
    this.layers = [];
    this.recent = [];
    this.at = null;
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("mouseleave", () => this.look(null));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    this.canvas.addEventListener("blur", () => this.look(null));
  }

  /** With what the server says now. */
  async read() {
    const { layers } = await json("hybrimoe/experts");
    const first = this.layers.length !== layers.length;
    const before = first ? layers : this.layers;
    this.recent = layers.map(({ uses }, layer) => uses.map((n, expert) => {
      const since = Math.max(0, n - before[layer].uses[expert]);
      return since + FADES * (this.recent[layer]?.[expert] ?? 0);
    }));
    this.layers = layers;
    this.canvas.hidden = !layers.length;
    if (!layers.length) this.reading.textContent = "No expert has a slot now: all run on the CPU.";
    else if (!this.at) this.reading.textContent = "";
    this.draw();
  }

  get shape() {
    return [this.layers.length, Math.max(0, ...this.layers.map(({ uses }) => uses.length))];
  }

  draw() {
    const [rows, columns] = this.shape;
    const room = this.element.clientWidth - LABEL_PX;
    if (!rows || room <= 0) return;
    const wide = Math.max(SMALLEST_PX, Math.min(WIDEST_PX, Math.floor(room / columns)));
    this.cell = { width: wide, height: Math.max(FLATTEST_PX, Math.min(TALLEST_PX, Math.floor(HEIGHT_PX / rows))) };
    const [width, tall] = [LABEL_PX + columns * wide, rows * this.cell.height];
    const scale = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * scale, height: tall * scale });
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${tall}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    this.paint(pen);
  }

  paint(pen) {
    const inks = { idle: colour("cell"), cpu: colour("cpu"), accel: colour("accel"), faint: colour("faint"), text: colour("text") };
    const { width, height } = this.cell;
    const gap = width > 6 ? 1.5 : 0.5;
    pen.font = "11px system-ui";
    pen.textBaseline = "middle";
    this.layers.forEach(({ slots }, layer) => {
      const most = Math.max(1, ...this.recent[layer]);
      pen.globalAlpha = 1;
      pen.fillStyle = inks.faint;
      if (height >= 14 || layer % 2 === 0) pen.fillText(String(layer), 0, (layer + 0.5) * height);
      slots.forEach((slot, expert) => {
        const [x, y] = [LABEL_PX + expert * width, layer * height];
        const heat = this.recent[layer][expert] / most;
        pen.globalAlpha = slot >= 0 ? 0.35 + 0.65 * heat : heat > 0.02 ? 0.25 + 0.75 * heat : 1;
        pen.fillStyle = slot >= 0 ? inks.accel : heat > 0.02 ? inks.cpu : inks.idle;
        pen.beginPath();
        pen.roundRect(x + gap / 2, y + gap / 2, width - gap, height - gap, width > 8 ? 3 : 1);
        pen.fill();
        if (this.at?.layer === layer && this.at.expert === expert) {
          pen.globalAlpha = 1;
          pen.strokeStyle = inks.text;
          pen.stroke();
        }
      });
    });
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - box.left - LABEL_PX) / this.cell.width);
    const layer = Math.floor((event.clientY - box.top) / this.cell.height);
    this.look(this.layers[layer]?.uses[expert] === undefined ? null : { layer, expert });
  }

  move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step || !this.layers.length) return;
    event.preventDefault();
    const [rows, columns] = this.shape;
    const { layer, expert } = this.at ?? { layer: 0, expert: -1 };
    this.look({ layer: within(layer + step[0], rows), expert: within(expert + step[1], columns) });
  }

  look(at) {
    this.at = at;
    this.reading.textContent = at ? this.described(at) : "";
    if (this.layers.length) this.draw();
  }

  described({ layer, expert }) {
    const { uses, slots, path } = this.layers[layer];
    const total = uses.reduce((sum, n) => sum + n, 0) || 1;
    const where = slots[expert] >= 0 ? `in slot ${slots[expert]}` : "in host memory";
    return `Layer ${layer}, expert ${expert}: ${where}, used in ${uses[expert].toLocaleString("en")} calls (${((100 * uses[expert]) / total).toFixed(1)} % of ${path})`;
  }
}

function within(value, n) {
  return Math.max(0, Math.min(n - 1, value));
}
