// Conversations, kept in this browser (IndexedDB).
//
// Each message is a record of its own, so that two tabs which write at once add to a conversation and do not overwrite
// it; a change reads the record and writes it in one transaction. Text is written while it arrives; when the page is
// closed in the middle, the last of it goes to localStorage, which takes it at once, and is taken up at the next start.
import { newId } from "./dom.js";

const NAME = "hybrimoe";
const UNSAVED = "hybrimoe.unsaved.";
const channel = "BroadcastChannel" in window ? new BroadcastChannel(NAME) : null;
const listeners = [];
let database = null;

/** Before anything else. False where the browser keeps nothing: conversations then end with the tab. */
export async function openStore() {
  try {
    database = await opened();
    await takeUpUnsaved();
    return true;
  } catch {
    database = inMemory();
    return false;
  }
}

/** `listener(conversationId)` is called when another tab has changed a conversation. */
export function onChangeElsewhere(listener) {
  listeners.push(listener);
}
channel?.addEventListener("message", (event) => listeners.forEach((listener) => listener(event.data)));

/** All conversations, the latest first. */
export async function conversations() {
  const found = await database.all("conversations");
  return found.sort((a, b) => b.updated - a.updated);
}

export async function conversation(id) {
  return database.get("conversations", id);
}

/** The messages of a conversation, the oldest first. */
export async function messages(conversationId) {
  const found = await database.all("messages", conversationId);
  return found.sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

export async function addConversation(fields) {
  const made = { id: newId(), title: "New conversation", created: Date.now(), updated: Date.now(), settings: {}, chosen: {}, ...fields };
  await database.put("conversations", made);
  tell(made.id);
  return made;
}

/** Changes fields of a conversation as it is now, whatever another tab made of it; null where it is gone. */
export async function changeConversation(id, change) {
  const changed = await database.change("conversations", id, change);
  if (changed) tell(id);
  return changed;
}

/** Adds a message; null where its conversation is gone. */
export async function addMessage(fields) {
  const made = {
    id: newId(), parent: null, text: "", reasoning: "", files: [], state: "done", problem: null, usage: null, created: Date.now(),
    touched: Date.now(), ...fields,
  };
  if (!(await database.get("conversations", made.conversation))) return null;
  await database.put("messages", made);
  await changeConversation(made.conversation, (one) => ({
    ...one, updated: Date.now(), chosen: { ...one.chosen, [made.parent ?? ""]: made.id },
  }));
  return made;
}

/** Writes fields of a message; false where it is gone. */
export async function changeMessage(id, fields) {
  const changed = await database.change("messages", id, (one) => ({ ...one, ...fields, touched: Date.now() }));
  if (changed) tell(changed.conversation);
  return changed !== null;
}

export async function removeConversation(id) {
  await database.remove(id);
  tell(id);
}

/** When the page is about to go: what has not been written yet. */
export function keepUnsaved(message) {
  try {
    const { text, reasoning, state, problem, usage } = message;
    localStorage.setItem(UNSAVED + message.id, JSON.stringify({ text, reasoning, state, problem, usage }));
  } catch { /* full, or nothing is kept: what was written before stays */ }
}

async function takeUpUnsaved() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(UNSAVED));
  for (const key of keys) {
    const { text, reasoning, state, problem, usage } = JSON.parse(localStorage.getItem(key));
    const end = state === "arriving" ? {} : { state, problem, usage };
    await database.change("messages", key.slice(UNSAVED.length), (one) => ({
      ...one,
      ...(one.state === "arriving" ? end : {}),
      text: text.length > one.text.length ? text : one.text,
      reasoning: reasoning.length > one.reasoning.length ? reasoning : one.reasoning,
    }));
    localStorage.removeItem(key);
  }
}

function tell(conversationId) {
  channel?.postMessage(conversationId);
}

/** The database as four operations. */
async function opened() {
  const asked = indexedDB.open(NAME, 1);
  asked.onupgradeneeded = () => {
    asked.result.createObjectStore("conversations", { keyPath: "id" });
    asked.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
  };
  const db = await answer(asked);
  const table = (name, mode = "readonly") => db.transaction(name, mode).objectStore(name);
  return {
    get: async (name, id) => (await answer(table(name).get(id))) ?? null,
    all: (name, owner) => answer(owner === undefined ? table(name).getAll() : table(name).index("conversation").getAll(owner)),
    put: (name, record) => answer(table(name, "readwrite").put(record)),
    change: async (name, id, change) => {
      const records = table(name, "readwrite");
      const before = await answer(records.get(id));
      if (!before) return null;
      const after = change(before);
      await answer(records.put(after));
      return after;
    },
    remove: async (id) => {
      const both = db.transaction(["conversations", "messages"], "readwrite");
      both.objectStore("conversations").delete(id);
      const own = await answer(both.objectStore("messages").index("conversation").getAllKeys(id));
      own.forEach((key) => both.objectStore("messages").delete(key));
      await new Promise((resolve, reject) => Object.assign(both, { oncomplete: resolve, onabort: () => reject(both.error) }));
    },
  };
}

function answer(asked) {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

/** The same operations for a browser that keeps nothing. */
function inMemory() {
  const tables = { conversations: new Map(), messages: new Map() };
  return {
    get: async (name, id) => tables[name].get(id) ?? null,
    all: async (name, owner) => [...tables[name].values()].filter((one) => owner === undefined || one.conversation === owner),
    put: async (name, record) => void tables[name].set(record.id, record),
    change: async (name, id, change) => {
      const before = tables[name].get(id);
      if (!before) return null;
      tables[name].set(id, change(before));
      return tables[name].get(id);
    },
    remove: async (id) => {
      tables.conversations.delete(id);
      for (const message of [...tables.messages.values()]) if (message.conversation === id) tables.messages.delete(message.id);
    },
  };
}
