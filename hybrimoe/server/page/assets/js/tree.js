// A conversation is a tree of messages: an edited message and a reply that was asked for again are further branches.
// The conversation's `chosen` says for each message (or "" for the beginning) which of its answers is shown.

/** The answers to a message (null: the first messages), the oldest first. */
export function answers(messages, parent) {
  return messages.filter((message) => message.parent === parent);
}

/** The messages that are shown, from the first to the last. */
export function path(messages, chosen) {
  const shown = [];
  for (let next = pick(messages, null, chosen); next; next = pick(messages, next.id, chosen)) shown.push(next);
  return shown;
}

function pick(messages, parent, chosen) {
  const found = answers(messages, parent);
  return found.find((message) => message.id === chosen[parent ?? ""]) ?? found.at(-1) ?? null;
}

/** The messages that lead to one, with it. */
export function before(messages, message) {
  const led = [message];
  while (led[0].parent !== null) led.unshift(messages.find((one) => one.id === led[0].parent));
  return led;
}
