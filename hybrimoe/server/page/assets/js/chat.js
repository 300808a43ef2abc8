// The conversation that is open: its messages in the page, and what can be done with them.
import { announce, byId, element, notice } from "./dom.js";
import { MessageView } from "./message.js";
import { Reply, interrupted, requestFor } from "./reply.js";
import { defaultSettings } from "./settings.js";
import { addConversation, addMessage, changeConversation, conversation, messages } from "./store.js";
import { answers, path } from "./tree.js";

const LONGEST_TITLE = 60;
const NEAR_PX = 80; // so near to the end, what arrives is followed
const LOOK_MS = 1000; // between two looks at replies that other tabs write
const replies = new Map(); // id of a message -> Reply, of this tab

/** Whether a reply arrives in the conversation, by this tab. */
export function busy(conversationId) {
  return [...replies.values()].some(({ message }) => message.conversation === conversationId);
}

export function anyBusy() {
  return replies.size > 0;
}

export class Chat {
  /** changed(): the list of conversations, or what is under way, is another. opened(id): a new conversation began. */
  constructor({ changed, opened }) {
    Object.assign(this, { changed, opened });
    this.conversation = null;
    this.messages = [];
    this.views = new Map();
    this.settings = defaultSettings();
    this.does = {
      edit: (message) => this.edit(message),
      again: (message) => this.again(message),
      branch: (message) => this.branch(message),
    };
    this.follow = true;
    const scroll = byId("scroll");
    scroll.addEventListener("scroll", () => {
      this.follow = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_PX;
    }, { passive: true });
    new ResizeObserver(() => this.toEnd()).observe(byId("messages"));
    setInterval(() => this.messages.some((one) => one.state === "arriving" && !replies.has(one.id)) && this.show(), LOOK_MS);
  }

  /** Show a conversation; null begins a new one. False where it is gone. */
  async open(id) {
    const found = id === null ? null : await conversation(id);
    if (found) this.settings = found.settings;
    else if (this.conversation) this.settings = defaultSettings(); // else those that were just set for a new one
    this.conversation = found;
    this.messages = found ? await this.read(id) : [];
    this.views.clear();
    byId("messages").replaceChildren();
    this.follow = true;
    this.show();
    this.toEnd();
    return id === null || found !== null;
  }

  /** What another tab has made of the conversation. */
  async reload() {
    const id = this.conversation?.id;
    const found = id && (await conversation(id));
    if (!found || this.conversation?.id !== id) return Boolean(found);
    const read = await this.read(id);
    if (this.conversation?.id !== id) return true;
    this.conversation = { ...found, chosen: { ...found.chosen, ...this.conversation.chosen } };
    this.settings = found.settings;
    this.messages = read;
    this.show();
    return true;
  }

  /** From the store; replies of this tab are further than what is written there. */
  async read(id) {
    return (await messages(id)).map((one) => replies.get(one.id)?.message ?? one);
  }

  get path() {
    return path(this.messages, this.conversation?.chosen ?? {});
  }

  show() {
    const shown = this.path;
    byId("title").textContent = this.conversation?.title ?? "New conversation";
    document.title = this.conversation ? `${this.conversation.title} · HybriMoE` : "HybriMoE";
    byId("welcome").hidden = shown.length > 0;
    byId("export").hidden = shown.length === 0;
    const list = byId("messages");
    const kept = new Set(shown.map(({ id }) => id));
    for (const [id, view] of this.views) {
      if (kept.has(id)) continue;
      view.element.remove();
      this.views.delete(id);
    }
    shown.forEach((message, index) => {
      const view = this.view(message);
      if (list.children[index] !== view.element) list.insertBefore(view.element, list.children[index] ?? null);
      view.show(asSeen(message), answers(this.messages, message.parent).map(asSeen));
    });
  }

  view(message) {
    if (!this.views.has(message.id)) this.views.set(message.id, new MessageView(message, this.does));
    return this.views.get(message.id);
  }

  toEnd() {
    if (this.follow) byId("scroll").scrollTop = byId("scroll").scrollHeight;
  }

  // What can be done ------------------------------------------------------------------------------------------------

  /** A new message at the end, and the reply to it. */
  async send(text, files) {
    notice("");
    if (!this.conversation) await this.begin(text || files[0].name);
    const last = this.path.at(-1) ?? null;
    await this.say(last?.id ?? null, text, files);
  }

  async begin(text) {
    const title = text.length > LONGEST_TITLE ? `${text.slice(0, LONGEST_TITLE).trimEnd()} …` : text;
    this.conversation = await addConversation({ title: title.replaceAll("\n", " "), settings: this.settings });
    this.opened(this.conversation.id);
  }

  async say(parent, text, files) {
    const mine = await this.add({ parent, role: "user", text, files });
    if (mine) await this.reply(mine);
  }

  /** Another version of a message of the user's; the conversation goes on from there. */
  edit(message) {
    this.view(message).edit(message, (text) => this.say(message.parent, text, message.files));
  }

  /** Edit the user's last message. */
  editLast() {
    const mine = this.path.findLast((message) => message.role === "user");
    if (mine) this.edit(mine);
  }

  /** Another reply to the same message. */
  async again(message) {
    const parent = this.messages.find((one) => one.id === message.parent);
    if (parent && !this.running()) await this.reply(parent);
  }

  branch(message) {
    if (!message) return;
    this.choose(message);
    changeConversation(this.conversation.id, (one) => ({ ...one, chosen: { ...one.chosen, [message.parent ?? ""]: message.id } }));
    this.show();
    this.view(message).element.querySelector(".branches button:not(:disabled)")?.focus();
  }

  /** The reply that arrives in this conversation, if this tab asked for it. */
  running() {
    const arriving = this.path.find((message) => replies.has(message.id));
    return arriving ? replies.get(arriving.id) : null;
  }

  stop() {
    this.running()?.stop();
  }

  changeSettings(settings) {
    this.settings = settings;
    if (this.conversation) {
      this.conversation = { ...this.conversation, settings };
      changeConversation(this.conversation.id, (one) => ({ ...one, settings }));
    }
  }

  // Replies ---------------------------------------------------------------------------------------------------------

  async reply(parent) {
    const body = requestFor({ ...this.conversation, settings: this.settings }, this.messages, parent);
    const message = await this.add({ parent: parent.id, role: "assistant", state: "arriving" });
    if (!message) return;
    const reply = new Reply(message, body, (one) => this.arrived(one));
    replies.set(message.id, reply);
    this.follow = true;
    this.show();
    this.changed();
    announce("A reply is on its way");
    await reply.run();
    replies.delete(message.id);
    announce(ending(message));
    this.changed();
    this.arrived(message);
  }

  arrived(message) {
    if (message.conversation !== this.conversation?.id) return;
    const shown = this.views.get(message.id);
    if (shown) shown.show(message, answers(this.messages, message.parent).map(asSeen));
  }

  async add(fields) {
    const made = await addMessage({ ...fields, conversation: this.conversation.id });
    if (!made) {
      notice("This conversation was deleted in another tab. Begin a new one.");
      return null;
    }
    this.messages = [...this.messages, made];
    this.choose(made);
    this.show();
    return made;
  }

  choose(message) {
    const chosen = { ...this.conversation.chosen, [message.parent ?? ""]: message.id };
    this.conversation = { ...this.conversation, chosen };
  }

  /** The conversation as a Markdown file. */
  save() {
    const parts = this.path.map((message) => `## ${message.role === "user" ? "You" : "Reply"}\n\n${message.text}\n`);
    const url = URL.createObjectURL(new Blob([`# ${this.conversation.title}\n\n`, ...parts.map((part) => `${part}\n`)], { type: "text/markdown" }));
    const link = element("a", { href: url, download: `${this.conversation.title.replace(/[^\p{L}\p{N} _-]/gu, "").trim() || "conversation"}.md` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }
}

/** A message as it is shown: one whose tab has gone has ended. */
function asSeen(message) {
  if (replies.has(message.id) || !interrupted(message)) return message;
  const sentence = "The page was closed while this reply arrived. What had arrived is kept.";
  return { ...message, state: "failed", problem: { sentence, retryAt: null } };
}

function ending({ state, text, problem }) {
  if (state === "failed") return problem.sentence;
  const n = text.split(/\s+/).filter(Boolean).length;
  return `${state === "stopped" ? "The reply was stopped" : "The reply is complete"}: ${n} words`;
}
