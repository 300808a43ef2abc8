// A model's Markdown as elements, while it arrives.
//
// Text is cut into blocks (paragraph, list, code, ...). All but the last are settled: made once and left alone. Only the
// last one, which still grows, is made again, and less often the longer that takes: a long reply stays responsive.
// Nothing of the text becomes an element that DOMPurify has not let through: no image, style, script or form.
import DOMPurify from "../vendor/purify.es.mjs";
import { Marked } from "../vendor/marked.esm.js";
import { CodeBlock } from "./code.js";
import { element } from "./dom.js";

const FASTEST_MS = 40; // between two looks at a reply that grows
const SHARE = 4; // of which a quarter at most is spent on making elements
const LONGEST_MARK = 10; // characters that may still become the number of a list's next entry
const KEPT_TAGS = /^<\/?(b|i|u|em|strong|kbd|mark|sub|sup|br|hr|details|summary)\s*\/?>$/i;
const SAFE = {
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "del", "details", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "kbd", "li",
    "mark", "ol", "p", "pre", "strong", "sub", "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => (KEPT_TAGS.test(text.trim()) ? text : escaped(text)), // other tags are shown as they are written
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)} (image)</a>`, // never loaded
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class" && !/^language-[\w+#.-]+$/.test(data.attrValue)) data.keepAttr = false;
});
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

function escaped(text) {
  const signs = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[&<>"']/g, (sign) => signs[sign]);
}

/** A reply's text in `element`. */
export class Markdown {
  constructor() {
    this.element = element("div", { class: "markdown" });
    this.text = "";
    this.complete = false;
    this.settledTo = 0; // characters of `text` that settled blocks stand for
    this.open = null; // the last block, as it was when it was last made
    this.timer = null;
    this.lastMs = 0;
  }

  /** Show `text`, soon; complete: nothing more comes, and it is shown at once. */
  show(text, complete = false) {
    const clean = text.replaceAll("\r\n", "\n");
    if (this.complete && clean === this.text) return;
    if (this.complete || !clean.startsWith(this.text)) this.reset();
    Object.assign(this, { text: clean, complete });
    if (complete) this.make();
    else this.timer ??= setTimeout(() => this.make(), Math.max(FASTEST_MS, SHARE * this.lastMs));
  }

  reset() {
    this.element.replaceChildren();
    Object.assign(this, { text: "", settledTo: 0, open: null });
  }

  make() {
    clearTimeout(this.timer);
    this.timer = null;
    const began = performance.now();
    const rest = this.text.slice(this.settledTo);
    const tokens = marked.lexer(rest);
    const wholly = tokens.reduce((sum, token) => sum + token.raw.length, 0) === rest.length;
    const settled = this.complete ? tokens.length : wholly ? nUnchanging(tokens) : 0;
    tokens.slice(0, settled).forEach((token) => this.settle(token));
    this.grow(tokens.slice(settled));
    this.lastMs = performance.now() - began;
  }

  /** A block that no later text changes. */
  settle(token) {
    if (token.type !== "space") {
      this.blockFor(token).show(token, true);
      this.open = null;
    }
    this.settledTo += token.raw.length;
  }

  /** The blocks that may still change. The first of them stays one element. */
  grow(tokens) {
    const token = tokens.find((one) => one.type !== "space");
    if (token) this.blockFor(token).show(token, false);
  }

  /** The last block, or a new one in its place where it has turned out to be something else. */
  blockFor(token) {
    if (this.open?.type !== token.type) {
      this.open?.element.remove();
      this.open = token.type === "code" ? new OpenCode() : new OpenText(token.type);
      this.element.append(this.open.element);
    }
    return this.open;
  }
}

/** How many of the blocks no later text changes: all but the last, and but a list that the last may turn out to go on. */
function nUnchanging(tokens) {
  const blocks = [...tokens.keys()].filter((at) => tokens[at].type !== "space");
  const [before, last] = [blocks.at(-2), blocks.at(-1)];
  const mayGoOn = before !== undefined && tokens[before].type === "list" && tokens[last].raw.length <= LONGEST_MARK;
  return (mayGoOn ? before : last) ?? 0;
}

/** Any block but code. */
class OpenText {
  constructor(type) {
    this.type = type;
    this.element = element("div", { class: "block" });
  }

  show(token, settled) {
    const fragment = DOMPurify.sanitize(marked.parser([token]), SAFE);
    for (const code of fragment.querySelectorAll("pre > code")) {
      const block = new CodeBlock((code.getAttribute("class") ?? "").replace("language-", ""));
      block.show(code.textContent);
      code.parentNode.replaceWith(block.element);
      if (settled) block.settle();
    }
    for (const table of fragment.querySelectorAll("table")) {
      const scroller = element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
      table.replaceWith(scroller);
      scroller.append(table);
    }
    this.element.replaceChildren(fragment);
  }
}

/** A block of code, which text is added to. */
class OpenCode {
  constructor() {
    this.type = "code";
    this.element = element("div", { class: "block" });
    this.block = null;
  }

  show(token, settled) {
    const language = token.lang ?? "";
    if (this.block === null || this.language !== language) { // the language may come letter by letter
      this.language = language;
      this.block = new CodeBlock(language);
      this.element.replaceChildren(this.block.element);
    }
    this.block.show(token.text);
    if (settled) this.block.settle();
  }
}
