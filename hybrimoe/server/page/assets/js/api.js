// Requests to the server that the page came from. What goes wrong becomes a sentence that says what to do.
import { apiKey, askForKey } from "./key.js";

/** `message` is for people. status: of HTTP, 0 where no answer came. retrySeconds: when to come again, or null. */
export class ServerError extends Error {
  constructor(message, { status = 0, code = null, retrySeconds = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retrySeconds });
  }
}

const GONE = "The server does not answer. It may have been stopped: start it again (hybrimoe serve), then try again.";
const CUT = "The connection was cut before the reply was complete. What had arrived is kept.";

/** A request; the answer where it is a success. Raises ServerError, or AbortError where `signal` says so. */
export async function request(path, { body, signal, method = body === undefined ? "GET" : "POST" } = {}) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(GONE);
  }
  if (response.ok) return response;
  throw await refusal(response);
}

/** The answer of `request` as data. */
export async function json(path, options) {
  return (await request(path, options)).json();
}

/** The pieces of a streamed chat: {text}, {reasoning}, {finish} and {usage}, as they arrive. Raises as `request`. */
export async function* chat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { body: asked, signal });
  let complete = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(sentence(event.error.message), { code: event.error.code });
      yield* pieces(event);
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError(CUT);
  }
  if (!complete) throw new ServerError(CUT);
}

function* pieces(event) {
  for (const { delta, finish_reason: finish } of event.choices ?? []) {
    if (delta?.reasoning_content) yield { reasoning: delta.reasoning_content };
    if (delta?.content) yield { text: delta.content };
    if (finish) yield { finish };
  }
  if (event.usage) yield { usage: event.usage };
}

/** The data of server-sent events; comments are left out. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have ended already
  }
}

/** What an answer that is no success means. */
async function refusal(response) {
  const told = await response.json().catch(() => ({}));
  const said = sentence(told.error?.message ?? `the server answered with ${response.status}`);
  const after = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const retrySeconds = Number.isFinite(after) ? after : null;
  const about = { status: response.status, code: told.error?.code ?? null, retrySeconds };
  if (response.status === 401) askForKey(apiKey() ? "The server does not know this key." : "");
  return new ServerError(ADVICE[response.status]?.(said, retrySeconds) ?? said, about);
}

const ADVICE = {
  401: () => "This server needs an API key. Give it one, then try again.",
  413: (said) => `This is too much for one message. ${said}`,
  429: (said, seconds) => `Many people are being answered. ${said} A place should be free in ${counted(seconds ?? 5)}.`,
  500: (said) => `${said} The server's log says more.`,
};

function counted(seconds) {
  return seconds === 1 ? "a second" : `${seconds} seconds`;
}

/** The server's words as a sentence. */
function sentence(words) {
  const text = String(words).trim();
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
