// One reply on its way: asked for, written down while it arrives, ended by its last token, by stop or by an error.
import { chat } from "./api.js";
import { joined, withFiles } from "./files.js";
import { requested } from "./settings.js";
import { latest, loadingText } from "./state.js";
import { changeMessage, keepUnsaved } from "./store.js";
import { before } from "./tree.js";

const SAVE_MS = 400; // between two times that arriving text is written down
const TOUCH_MS = 1000; // a reply that still arrives says so to other tabs at least so often
const STALE_MS = 5000; // one that has said nothing for so long has lost its tab
const LOADING_MS = 1000; // between two tries while the model is being loaded

/** Whether nobody writes a reply any more that has not ended: its tab was closed or reloaded. */
export function interrupted(message) {
  return message.state === "arriving" && Date.now() - message.touched > STALE_MS;
}

/** The request for a reply to the last of `messages` (the whole conversation's), which is `parent`. */
export function requestFor(conversation, messages, parent) {
  const told = [];
  for (const message of before(messages, parent)) {
    const content = message.role === "user" ? withFiles(message) : message.text;
    if (!content.length) continue; // a reply that failed before its first word
    if (told.at(-1)?.role === message.role) told.at(-1).content = joined(told.at(-1).content, content);
    else told.push({ role: message.role, content });
  }
  const system = conversation.settings.system?.trim();
  if (system) told.unshift({ role: "system", content: system });
  const model = conversation.settings.model ? { model: conversation.settings.model } : {};
  return { ...model, messages: told, ...requested(conversation.settings) };
}

export class Reply {
  /** message: the record, which is changed here. changed(message): called when there is more of it. */
  constructor(message, body, changed) {
    Object.assign(this, { message, body, changed });
    this.aborted = new AbortController();
    this.savedAt = performance.now();
    this.leaving = () => keepUnsaved(message);
  }

  stop() {
    this.aborted.abort();
  }

  /** To the end. Raises nothing: what goes wrong is in the message. */
  async run() {
    window.addEventListener("pagehide", this.leaving);
    const touching = setInterval(() => this.touch(), TOUCH_MS);
    this.beganAt = performance.now();
    try {
      const end = await this.ended();
      clearInterval(touching);
      Object.assign(this.message, end, { note: null });
      await this.save();
    } finally {
      clearInterval(touching);
      window.removeEventListener("pagehide", this.leaving); // not before the end is written
    }
    this.changed(this.message);
  }

  /** Tell other tabs that it still arrives, and whoever waits what it waits for. */
  touch() {
    if (performance.now() - this.savedAt > TOUCH_MS) this.save();
    if (this.firstAt) return;
    const { loading, requests } = latest() ?? {};
    const waits = requests?.waiting ? `${requests.waiting} requests wait for a place …` : null;
    this.message.note = loading ? loadingText(latest()) : waits;
    this.changed(this.message);
  }

  /** Fields of the message that say how it ended. */
  async ended() {
    for (;;) {
      try {
        await this.stream();
        return { state: "done", problem: null, usage: this.facts() };
      } catch (error) {
        if (error.name === "AbortError") return { state: "stopped", problem: null, usage: this.facts() };
        if (error.code !== "loading") return { state: "failed", problem: told(error) };
        this.message.note = loadingText(latest());
        this.changed(this.message);
        await new Promise((resolve) => setTimeout(resolve, LOADING_MS));
      }
    }
  }

  async stream() {
    for await (const piece of chat(this.body, this.aborted.signal)) {
      if (piece.usage) this.usage = piece.usage;
      if (!piece.text && !piece.reasoning) continue;
      this.firstAt ??= performance.now();
      this.lastAt = performance.now();
      this.message.text += piece.text ?? "";
      this.message.reasoning += piece.reasoning ?? "";
      this.message.note = null;
      if (performance.now() - this.savedAt > SAVE_MS) this.save();
      this.changed(this.message);
    }
  }

  async save() {
    this.savedAt = performance.now();
    const { id, text, reasoning, state, problem, usage } = this.message;
    const there = await changeMessage(id, { text, reasoning, state, problem, usage });
    if (!there) this.stop(); // its conversation was deleted
  }

  facts() {
    if (!this.usage) return null;
    const { completion_tokens: generated, prompt_tokens: prompt, prompt_tokens_details: details } = this.usage;
    const seconds = (this.lastAt - this.firstAt) / 1000;
    return {
      generated, prompt, cached: details?.cached_tokens ?? 0,
      firstMs: this.firstAt ? this.firstAt - this.beganAt : null,
      pace: generated > 1 && seconds > 0 ? (generated - 1) / seconds : null,
    };
  }
}

function told(error) {
  return {
    sentence: error.status === undefined ? `The page failed: ${error.message}.` : error.message,
    retryAt: error.retrySeconds === null || error.retrySeconds === undefined ? null : Date.now() + error.retrySeconds * 1000,
  };
}
