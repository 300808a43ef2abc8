// What the server says of itself: asked once a second while something happens or the live view is open, else seldom.
// The last minutes are kept, so that the live view begins with what was before it was opened.
import { ServerError, json } from "./api.js";
import { onKey } from "./key.js";

const BUSY_MS = 1000;
const IDLE_MS = 5000;
const KEPT = 300; // samples

const listeners = [];
let now = null; // the latest answer; null before the first
let problem = null; // why there is none
let timer = null;
let watched = false;

/** Readings of the state over time, the oldest first: {at (s since 1970), state}. */
export const history = [];

/** The latest state, or null. */
export function latest() {
  return now;
}

/** `listener(state, problem)` is called with each answer; one of both is null. */
export function onState(listener) {
  listeners.push(listener);
}

/** Ask often (the live view is open, or a reply arrives), or seldom. */
export function watch(often) {
  if (often === watched) return;
  watched = often;
  ask();
}

/** How far a model is that is being loaded, in a sentence. */
export function loadingText(state) {
  const loading = state?.loading;
  if (!loading?.what) return "The model is being loaded …";
  const share = loading.total ? `, ${Math.floor((100 * loading.done) / loading.total)} %` : "";
  return `The model is being loaded: ${loading.what}${share} …`;
}

/** Once, when the page starts. */
export function startState() {
  document.addEventListener("visibilitychange", () => !document.hidden && ask());
  onKey(ask);
  ask();
}

async function ask() {
  clearTimeout(timer);
  try {
    now = await json("hybrimoe/state");
    problem = null;
    history.push({ at: Date.now() / 1000, state: now });
    if (history.length > KEPT) history.shift();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    [now, problem] = [null, error];
  }
  listeners.forEach((listener) => listener(now, problem));
  clearTimeout(timer);
  if (problem?.status === 401) return; // until there is a key
  const moving = watched || now?.status === "loading" || now?.requests.running > 0;
  timer = setTimeout(ask, moving && !document.hidden ? BUSY_MS : IDLE_MS);
}

/** A value's change a second between two readings; null where there are no two. */
export function rate(before, after, of) {
  if (!before || !after) return null;
  const seconds = after.state.time_s - before.state.time_s;
  const [first, last] = [of(before.state), of(after.state)];
  return seconds > 0 && first != null && last != null && last >= first ? (last - first) / seconds : null;
}
