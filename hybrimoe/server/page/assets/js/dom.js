// Small helpers around the document: elements, icons, announcements, the clipboard, names that nobody else uses.

/** An element with attributes and children. `on...` are listeners; true and false set and leave out an attribute. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

/** One of the symbols in index.html. */
export function icon(name) {
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  drawn.setAttribute("aria-hidden", "true");
  drawn.append(use);
  return drawn;
}

/** A button that shows an icon and says what it does. */
export function iconButton(name, label, onclick) {
  return element("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick }, icon(name));
}

export function byId(id) {
  return document.getElementById(id);
}

/** Tell users of screen readers. */
export function announce(text) {
  byId("status").textContent = text;
}

/** A banner above the messages, until it is called with nothing. */
export function notice(text) {
  byId("notice").textContent = text || "";
  byId("notice").hidden = !text;
}

/** A button that copies what `text()` gives and says for a moment that it has. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const done = await copied(text());
    button.replaceChildren(icon(done ? "check" : "copy"));
    announce(done ? "Copied" : "Copying is not possible here");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Put a text on the clipboard. Pages that do not come by https or from this machine have only the old way. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const before = document.activeElement;
    const area = element("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}

/** A new name for a record. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** 1536 -> "1.5 KiB". */
export function size(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  const power = bytes < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(bytes) / 10));
  const value = bytes / 1024 ** power;
  return `${power && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

/** A value of localStorage, and a way to set it; browsers that keep nothing give the value that was set last. */
export function remembered(key, otherwise) {
  let current = otherwise;
  try {
    current = JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch { /* nothing was kept, or not by us */ }
  return {
    get: () => current,
    set: (value) => {
      current = value;
      try {
        localStorage.setItem(key, JSON.stringify(value));
      } catch { /* it holds until the page is closed */ }
    },
  };
}
