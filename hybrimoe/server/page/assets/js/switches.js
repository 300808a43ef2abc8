// Policy and number of slots, changed while the model runs. Where nothing can be changed, nothing is shown.
import { json } from "./api.js";
import { announce, element } from "./dom.js";

export class Switches {
  constructor() {
    this.said = element("p", { class: "hint", "aria-live": "polite" });
    this.element = element("form", { class: "switches", onsubmit: (event) => {
      event.preventDefault();
      this.apply();
    } });
    this.shown = null;
  }

  /** With the present values; what the user is about to change stays. */
  show({ switches, experts }) {
    this.now = { policy: experts.policy, slots: experts.n_slots };
    const key = JSON.stringify([switches, this.now]);
    if (key === this.shown) return;
    this.shown = key;
    this.policy = element("select", { id: "policy" }, ...switches.policies.map((name) => element("option", { selected: name === experts.policy }, name)));
    this.slots = element("input", { id: "slots", type: "range", min: 0, max: switches.most_slots, step: 1, oninput: () => this.told() });
    this.slots.value = experts.n_slots;
    this.most = switches.most_slots;
    this.slotsSaid = element("output", { for: "slots" });
    this.button = element("button", { type: "submit", class: "primary" }, "Apply");
    this.element.replaceChildren(
      element("label", { class: "field" }, element("span", {}, "Policy"), this.policy),
      element("label", { class: "field grow" }, element("span", {}, "Slots for experts ", this.slotsSaid), this.slots),
      this.button, this.said,
    );
    this.told();
  }

  told() {
    const slots = Number(this.slots.value);
    this.slotsSaid.textContent = `${slots} of ${this.most} experts (${Math.round((100 * slots) / this.most)} %)`;
  }

  async apply() {
    const asked = {};
    if (this.policy.value !== this.now.policy) asked.policy = this.policy.value;
    if (Number(this.slots.value) !== this.now.slots) asked.slots = Number(this.slots.value);
    if (!Object.keys(asked).length) {
      this.said.textContent = "That is what runs already.";
      return;
    }
    this.button.disabled = true;
    this.said.textContent = asked.policy ? "The policy is being made ready; replies go on meanwhile …" : "Between two steps …";
    try {
      const state = await json("hybrimoe/settings", { body: asked });
      this.said.textContent = `Now: ${state.experts.policy}, ${state.experts.n_slots} slots. The slots start over with the most used experts.`;
      announce(this.said.textContent);
    } catch (error) {
      this.said.textContent = error.message;
    }
    this.button.disabled = false;
  }
}
