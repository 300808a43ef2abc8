// The API key: asked for when the server refuses a request, kept for this tab, or in the browser if the user says so.
import { byId } from "./dom.js";

const KEY = "hybrimoe.key";
const listeners = [];

function read(storage) {
  try {
    return storage().getItem(KEY);
  } catch {
    return null; // a browser that keeps nothing
  }
}

let current = read(() => sessionStorage) ?? read(() => localStorage) ?? "";

export function apiKey() {
  return current;
}

/** `listener` is called when there is another key. */
export function onKey(listener) {
  listeners.push(listener);
}

/** Show the dialog; problem: why the present key will not do. */
export function askForKey(problem = "") {
  const dialog = byId("key-dialog");
  byId("key").hidden = false;
  if (dialog.open) return;
  if (problem) byId("key-problem").textContent = problem;
  byId("key-input").value = current;
  byId("key-keep").checked = read(() => localStorage) !== null;
  dialog.showModal();
  byId("key-input").select();
}

function use(key, keep) {
  current = key.trim();
  try {
    sessionStorage.setItem(KEY, current);
    if (keep) localStorage.setItem(KEY, current);
    else localStorage.removeItem(KEY);
  } catch { /* it holds until the page is closed */ }
  listeners.forEach((listener) => listener());
}

/** Once, when the page starts. */
export function startKey() {
  byId("key").hidden = !current;
  byId("key").addEventListener("click", () => askForKey());
  byId("key-dialog").addEventListener("close", () => {
    if (byId("key-dialog").returnValue === "use") use(byId("key-input").value, byId("key-keep").checked);
  });
  byId("key-input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // the first button of the form would be the one that cancels
    byId("key-dialog").close("use");
  });
}
