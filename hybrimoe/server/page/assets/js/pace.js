// The line below a message while a reply arrives: tokens a second, hits, and how busy each lane is.
import { byId, element } from "./dom.js";
import { lanesOf } from "./lanes.js";
import { history, onState, rate } from "./state.js";

export class Pace {
  constructor() {
    onState(() => this.show());
  }

  show() {
    const [before, after] = history.slice(-2);
    const running = after?.state.requests.running ?? 0;
    const pace = after && rate(before, after, (state) => state.tokens.generated);
    if (!running || pace === null || pace === undefined) {
      byId("pace").replaceChildren();
      return;
    }
    const lanes = lanesOf(after.state).map((lane) => meter(lane, rate(before, after, lane.busyUs)));
    byId("pace").replaceChildren(element("span", {}, `${pace.toFixed(1)} tokens/s`), ...lanes);
  }
}

function meter(lane, busyUs) {
  const share = Math.min(1, (busyUs ?? 0) / 1e6);
  const level = element("i", {});
  level.style.width = `${100 * share}%`;
  return element("span", { class: `meter ${lane.kind}`, title: `${lane.title}: busy ${Math.round(100 * share)} %` }, lane.short, element("b", { "aria-hidden": "true" }, level));
}
