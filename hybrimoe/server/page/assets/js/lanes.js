// What each lane (CPU, accelerator, link) did over the last minutes: one strip a lane, with the same time below all.
import uPlot from "../vendor/uPlot.esm.js";
import { element } from "./dom.js";
import { history, rate } from "./state.js";

const SHOWN_S = 120;
const SYNC = uPlot.sync("live");
const TITLES = { cpu: "CPU", accel: "Accelerator", link: "Link", disk: "Disk" };
const TOPS = [0.1, 0.25, 0.5, 1]; // ends of the scale of a share
const SHORT = { cpu: "CPU", accel: "accel", link: "link", disk: "disk" };

/** The lanes of a state: {name, kind, title, short, busyUs(state)}. */
export function lanesOf(state) {
  return (state?.experts?.lanes ?? []).map(({ name, kind, device }) => {
    const number = name.split(":")[1];
    const title = `${TITLES[kind]}${number ? ` ${Number(number) + 1}` : ""}`;
    return {
      name, kind, title, short: SHORT[kind], note: { cpu: "experts only", accel: device, link: "experts to slots", disk: "experts to memory" }[kind],
      busyUs: (one) => one.experts?.lanes.find((lane) => lane.name === name)?.busy_us ?? null,
    };
  });
}

/** The colour that a kind of series has in the present theme. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** A value over time, drawn as an area. `value(before, after)` of two readings; `shown(value)` in words. */
export class Strip {
  constructor({ title, note, kind, value, shown, most }) {
    Object.assign(this, { value, shown, most, kind });
    this.figure = element("output", { class: "figure" });
    this.place = element("div", { class: "plot" });
    this.element = element("div", { class: `strip ${kind}` },
      element("div", { class: "strip-title" }, element("strong", {}, title), note ? element("small", {}, note) : null, this.figure), this.place);
    this.plot = null;
  }

  /** With the latest readings. */
  show() {
    const [times, values] = this.data();
    const last = values.at(-1);
    this.figure.textContent = last == null ? "–" : this.shown(last);
    if (!this.place.clientWidth) return;
    this.plot ??= this.made();
    if (this.plot.width !== this.place.clientWidth) this.plot.setSize({ width: this.place.clientWidth, height: this.place.clientHeight });
    const now = times.at(-1) ?? Date.now() / 1000;
    this.plot.setData([times, values], false);
    this.plot.setScale("x", { min: now - SHOWN_S, max: now });
  }

  data() {
    const [times, values] = [[], []];
    for (let at = 1; at < history.length; at += 1) {
      times.push(history[at].at);
      values.push(this.value(history[at - 1], history[at]));
    }
    return [times, values];
  }

  made() {
    const line = colour(this.kind);
    const top = (max) => (this.most === 1 ? TOPS.find((one) => (max ?? 0) <= one) ?? 1 : Math.max(1, 1.15 * (max ?? 1)));
    const scale = (self, min, max) => [0, top(max)];
    return new uPlot({
      width: this.place.clientWidth, height: this.place.clientHeight, padding: [6, 0, 2, 0], legend: { show: false },
      cursor: { sync: { key: SYNC.key }, y: false, points: { size: 6 }, drag: { x: false, y: false } },
      scales: { x: { time: true }, y: { range: scale } },
      axes: [
        { show: false },
        { show: true, size: 34, stroke: colour("faint"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui", splits: (self, axis, min, max) => [0, max / 2], values: (self, marks) => marks.map((mark) => (mark ? this.shown(mark) : "")) },
      ],
      series: [{}, { stroke: line, fill: `color-mix(in srgb, ${line} 22%, transparent)`, width: 1.5, points: { show: false }, spanGaps: false }],
      hooks: { setCursor: [(self) => {
        const value = self.cursor.idx == null ? null : self.data[1][self.cursor.idx];
        if (value != null) this.figure.textContent = this.shown(value);
      }] },
    }, [[], []], this.place);
  }

  /** Anew in the colours of another theme. */
  repaint() {
    this.plot?.destroy();
    this.plot = null;
  }
}

/** A strip of a lane: the share of each second in which it works. */
export function laneStrip(lane) {
  return new Strip({
    title: lane.title, note: lane.note, kind: lane.kind, most: 1,
    value: (before, after) => {
      const busy = rate(before, after, lane.busyUs);
      return busy === null ? null : Math.min(1, busy / 1e6);
    },
    shown: (share) => `${Math.round(100 * share)} %`,
  });
}
