// The page: which of its parts is shown, and how they are joined.
import { Chat, anyBusy, busy } from "./chat.js";
import { Composer } from "./composer.js";
import { byId, element, notice } from "./dom.js";
import { startKey } from "./key.js";
import { LiveView } from "./live.js";
import { Pace } from "./pace.js";
import { SettingsDrawer } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { latest, loadingText, onState, startState, watch } from "./state.js";
import { onChangeElsewhere, openStore } from "./store.js";

const chat = new Chat({ changed: showBusy, opened: (id) => history.replaceState(null, "", `#/c/${id}`) });
const composer = new Composer({
  send: (text, files) => chat.send(text, files),
  stop: () => chat.stop(),
  editLast: () => chat.editLast(),
});
const sidebar = new Sidebar({ current: () => chat.conversation?.id ?? null, busy, gone: left });
const settings = new SettingsDrawer(() => chat.settings, (changed) => chat.changeSettings(changed));
const live = new LiveView();
sidebar.renamed = () => chat.reload();

/** The part that the address names: a conversation, the live view, or a new conversation. */
async function route() {
  const [, part, id] = location.hash.split("/");
  const isLive = part === "live";
  byId("chat").hidden = isLive;
  byId("live").hidden = !isLive;
  byId("to-live").toggleAttribute("aria-current", isLive);
  settings.drawer.hidden = true;
  live.show(isLive);
  if (isLive) document.title = "Live view · HybriMoE";
  else {
    const there = await chat.open(part === "c" ? id : null);
    notice(there ? "" : "This conversation is not in this browser any more.");
    showModels(latest());
    composer.focus();
  }
  showBusy();
}

function left(id) {
  if (chat.conversation?.id === id) location.hash = "#/";
}

function showBusy() {
  composer.setBusy(chat.running() !== null);
  sidebar.show();
  watch(anyBusy() || !byId("live").hidden);
}

/** Who answers, or why nobody does. */
function showServer(state, problem) {
  const badge = byId("server-state");
  badge.textContent = state ? state.model : problem.status === 401 ? "needs a key" : "no answer";
  badge.dataset.state = state ? state.status : "failed";
  badge.title = state ? { ok: "The model is ready", loading: loadingText(state), draining: "The server is about to end", failed: "The server has failed" }[state.status] : problem.message;
  showModels(state);
  byId("welcome").replaceChildren(
    element("h2", {}, state ? chat.settings.model ?? state.model : "HybriMoE"),
    element("p", {}, state ? described(state) : problem.message),
  );
}

function described({ status, experts, ...state }) {
  if (status === "loading") return loadingText({ status, ...state });
  if (!experts) return "Write a message to begin.";
  const { n_layers: layers, n_experts: n, lanes } = experts;
  const where = lanes.length > 1 ? `on the CPU and ${experts.accelerator} (${experts.n_slots} slots), policy ${experts.policy}` : "on the CPU";
  return `${n} experts in ${layers} layers, ${where}.`;
}

/** Which model answers, where the server has several; what is chosen holds for the conversation. */
function showModels(state) {
  const names = Object.keys(state?.models ?? {});
  const choice = byId("model");
  choice.hidden = names.length < 2;
  byId("server-state").textContent = names.length < 2 ? byId("server-state").textContent : "";
  if (choice.hidden || document.activeElement === choice) return;
  const words = { loaded: "in memory", loading: "being loaded", unloading: "leaving", failed: "could not be loaded" };
  choice.replaceChildren(...names.map((name) => element("option", { value: name }, words[state.models[name]] ? `${name} (${words[state.models[name]]})` : name)));
  choice.value = names.includes(chat.settings.model) ? chat.settings.model : state.model;
}

async function start() {
  startKey();
  if (!(await openStore())) notice("This browser does not let the page keep anything: conversations end with this tab.");
  onChangeElsewhere(async (id) => {
    sidebar.show();
    if (id === chat.conversation?.id && !(await chat.reload())) {
      notice("This conversation was deleted in another tab.");
    }
  });
  onState(showServer);
  new Pace();
  window.addEventListener("hashchange", route);
  byId("export").addEventListener("click", () => chat.save());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("key-dialog").open) chat.stop();
  });
  await route();
  startState();
  byId("model").addEventListener("change", () => chat.changeSettings({ ...chat.settings, model: byId("model").value }));
  document.documentElement.dataset.ready = "true";
}

start();
