// How one message looks: what was said, what the model thought before, what went wrong, and what can be done with it.
import { copyButton, element, icon, iconButton, size } from "./dom.js";
import { thumbnail } from "./images.js";
import { Markdown } from "./markdown.js";

const LONGEST_SHOWN = 20_000; // characters of a file or of a user's text that are shown

/** A message in the list. `does`: {edit, again, branch} are called with the message. */
export class MessageView {
  constructor(message, does) {
    this.does = does;
    this.mine = message.role === "user";
    this.element = element("article", { class: `message ${this.mine ? "user" : "assistant"}`, "data-id": message.id, "aria-label": this.mine ? "You" : "Reply" });
    this.body = element("div", { class: "body" });
    this.tools = element("div", { class: "tools" });
    this.element.append(this.body, this.tools);
    if (!this.mine) this.makeReply();
    this.message = message;
    this.shown = "";
    this.shownTools = "";
  }

  makeReply() {
    this.markdown = new Markdown();
    this.thoughts = new Markdown();
    this.summary = element("summary", {}, "Thinking");
    this.reasoning = element("details", { class: "reasoning", hidden: true }, this.summary, this.thoughts.element);
    this.waiting = element("p", { class: "waiting", hidden: true }, element("span", { class: "dots", "aria-hidden": "true" }), element("span", {}));
    this.problem = element("div", { class: "problem", role: "alert", hidden: true });
    this.body.append(this.reasoning, this.markdown.element, this.waiting, this.problem);
  }

  /** Show the message as it is now. siblings: it and the other answers to the same message. */
  show(message, siblings) {
    this.message = message;
    const { text, reasoning, state, problem, note, usage } = message;
    const content = JSON.stringify([text.length, reasoning.length, state, problem, note]);
    if (content !== this.shown) (this.mine ? this.showMine(message) : this.showReply(message));
    this.shown = content;
    const tools = JSON.stringify([Boolean(text), state, usage, siblings.map(({ id }) => id)]);
    if (tools !== this.shownTools) this.showTools(message, siblings); // buttons stay while text arrives
    this.shownTools = tools;
  }

  showMine(message) {
    this.body.replaceChildren(
      ...message.files.map((file) => (file.image ? thumbnail(file.image, file.name) : element(
        "details", { class: "attached" },
        element("summary", {}, icon("file"), file.name, element("small", {}, size(new Blob([file.text]).size))),
        element("pre", {}, shortened(file.text)),
      ))),
      ...(message.text ? [element("p", { class: "said" }, shortened(message.text))] : []),
    );
  }

  showReply(message) {
    const arriving = message.state === "arriving";
    this.element.setAttribute("aria-busy", String(arriving));
    this.markdown.show(message.text, !arriving);
    if (message.reasoning) {
      this.thoughts.show(message.reasoning, !arriving || Boolean(message.text));
      this.reasoning.hidden = false;
      this.summary.textContent = arriving && !message.text ? "Thinking …" : "What the model thought";
    }
    this.waiting.hidden = !arriving || Boolean(message.text);
    this.waiting.lastChild.textContent = message.note ?? "";
    this.showProblem(message);
  }

  showProblem(message) {
    clearInterval(this.countdown);
    const problem = message.state === "stopped" ? null : message.problem;
    this.problem.hidden = !problem;
    if (!problem) return;
    const again = element("button", { type: "button", class: "plain", onclick: () => this.does.again(message) }, "Try again");
    this.problem.replaceChildren(element("p", {}, problem.sentence), again);
    const free = (problem.retryAt ?? 0) - Date.now();
    if (free > 0) this.countDown(again, problem.retryAt);
  }

  countDown(button, until) {
    const tick = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      button.textContent = left > 0 ? `Try again (in ${left} s)` : "Try again";
      if (left <= 0) clearInterval(this.countdown);
    };
    tick();
    this.countdown = setInterval(tick, 500);
  }

  showTools(message, siblings) {
    const tools = [];
    if (siblings.length > 1) tools.push(this.branches(message, siblings));
    if (message.text) tools.push(copyButton("Copy", () => this.message.text));
    if (this.mine) tools.push(iconButton("edit", "Edit: the conversation goes on from here anew", () => this.does.edit(this.message)));
    else if (message.state !== "arriving") tools.push(iconButton("again", "Another reply", () => this.does.again(this.message)));
    if (message.state === "stopped") tools.push(element("span", { class: "facts" }, "stopped"));
    if (message.usage) tools.push(element("span", { class: "facts" }, facts(message.usage)));
    this.tools.replaceChildren(...tools);
  }

  branches(message, siblings) {
    const at = siblings.indexOf(message);
    const step = (by, name, label) => {
      const button = iconButton(name, label, () => this.does.branch(siblings[at + by]));
      button.disabled = !siblings[at + by];
      return button;
    };
    return element("span", { class: "branches" }, step(-1, "left", "The version before"), element("span", {}, `${at + 1} / ${siblings.length}`), step(1, "right", "The next version"));
  }

  /** The text to be edited in the message's place. done(text): it is to be sent. */
  edit(message, done) {
    const area = element("textarea", { "aria-label": "Your message, edited", rows: "3" });
    const close = () => {
      this.element.classList.remove("editing");
      this.showMine(message);
      this.tools.hidden = false;
    };
    const send = () => {
      const text = area.value.trim();
      close();
      if (text || message.files.length) done(text);
    };
    area.value = message.text;
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    this.tools.hidden = true;
    this.element.classList.add("editing");
    this.body.replaceChildren(area, element(
      "div", { class: "row end" },
      element("button", { type: "button", class: "plain", onclick: close }, "Cancel"),
      element("button", { type: "button", class: "primary", onclick: send }, "Send"),
    ));
    area.focus();
    area.style.height = `${Math.min(area.scrollHeight + 2, 320)}px`;
  }
}

function shortened(text) {
  return text.length <= LONGEST_SHOWN ? text : `${text.slice(0, LONGEST_SHOWN)}\n… (${(text.length - LONGEST_SHOWN).toLocaleString("en")} more characters, which the model gets)`;
}

/** What a reply took. */
function facts({ generated, prompt, cached, firstMs, pace }) {
  const parts = [`${generated} tokens`];
  if (pace) parts.push(`${pace.toFixed(1)} tokens/s`);
  if (firstMs != null) parts.push(`first after ${(firstMs / 1000).toFixed(1)} s`);
  if (prompt) parts.push(`prompt ${prompt}${cached ? ` (${cached} reused)` : ""}`);
  return parts.join(" · ");
}
