// The list of conversations: open, rename, delete. On a phone it covers the chat and closes when one is chosen.
import { byId, element, iconButton } from "./dom.js";
import { changeConversation, conversations, removeConversation } from "./store.js";

export class Sidebar {
  /** current(): the id of the conversation that is open. busy(id): whether a reply arrives in it. gone(id): deleted. */
  constructor({ current, busy, gone }) {
    Object.assign(this, { current, busy, gone });
    byId("open-sidebar").addEventListener("click", () => this.open(true));
    byId("close-sidebar").addEventListener("click", () => this.open(false));
    byId("shade").addEventListener("click", () => this.open(false));
    byId("sidebar").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !document.body.classList.contains("sidebar-open")) return;
      event.stopPropagation();
      this.open(false);
    });
    byId("sidebar").addEventListener("click", (event) => event.target.closest("a") && this.open(false));
  }

  /** Matters on narrow screens only. */
  open(on) {
    const narrow = matchMedia("(max-width: 760px)").matches;
    if (!narrow || document.body.classList.contains("sidebar-open") === on) return;
    document.body.classList.toggle("sidebar-open", on);
    byId("shade").hidden = !on;
    byId("open-sidebar").setAttribute("aria-expanded", String(on));
    (on ? byId("new-chat") : byId("open-sidebar")).focus();
  }

  async show() {
    const all = await conversations();
    const focused = document.activeElement?.closest("#conversations li")?.dataset.id;
    if (document.activeElement?.matches("#conversations input")) return; // a name is being written
    byId("conversations").replaceChildren(...all.map((one) => this.entry(one)));
    if (focused) byId("conversations").querySelector(`[data-id="${focused}"] a`)?.focus();
  }

  entry(one) {
    const here = one.id === this.current();
    const link = element("a", { href: `#/c/${one.id}`, "aria-current": here ? "page" : null, title: one.title }, one.title);
    if (this.busy(one.id)) link.append(element("span", { class: "dot", title: "A reply is arriving" }));
    const entry = element(
      "li", { "data-id": one.id }, link,
      iconButton("edit", `Rename ${one.title}`, () => this.rename(one, entry)),
      iconButton("delete", `Delete ${one.title}`, () => this.confirm(one, entry)),
    );
    return entry;
  }

  rename(one, entry) {
    const input = element("input", { value: one.title, "aria-label": "Name of the conversation", maxlength: "120" });
    let ended = false;
    const end = async (keep) => {
      if (ended) return; // taking the field away ends its focus, too
      ended = true;
      input.remove();
      if (keep && input.value.trim()) await changeConversation(one.id, (now) => ({ ...now, title: input.value.trim() }));
      await this.show();
      byId("conversations").querySelector(`[data-id="${one.id}"] a`)?.focus();
      this.renamed?.(one.id);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.stopPropagation();
      end(event.key === "Enter");
    });
    input.addEventListener("blur", () => end(true));
    entry.replaceChildren(input);
    input.select();
  }

  /** Deleting asks in place. */
  confirm(one, entry) {
    const really = element("button", { type: "button", class: "danger", onclick: async () => {
      await removeConversation(one.id);
      this.gone(one.id);
      await this.show();
      byId("new-chat").focus();
    } }, "Delete");
    const no = element("button", { type: "button", class: "plain", onclick: () => this.show() }, "Keep");
    entry.replaceChildren(really, no);
    really.focus();
  }
}
