// A block of code: its language, a button that copies it, and colours once it is complete.
import { copyButton, element } from "./dom.js";

const LONGEST_COLOURED = 20_000; // characters; a longer one takes too long
let highlighter = null;

/** A block that text is added to. */
export class CodeBlock {
  constructor(language = "") {
    this.language = /^[\w+#.-]*/.exec(language)[0];
    this.code = element("code", this.language ? { class: `language-${this.language}` } : {});
    this.element = element(
      "figure", { class: "code" },
      element("figcaption", {}, element("span", {}, this.language || "text"), copyButton("Copy the code", () => this.text)),
      element("pre", { tabindex: "0", "aria-label": `Code${this.language ? ` in ${this.language}` : ""}` }, this.code),
    );
    this.text = "";
  }

  /** Show `text`; what is there already stays. */
  show(text) {
    if (text.startsWith(this.text)) this.code.append(text.slice(this.text.length));
    else this.code.textContent = text;
    this.text = text;
  }

  /** No more is added: colour it. */
  async settle() {
    if (!this.language || this.text.length > LONGEST_COLOURED) return;
    highlighter ??= import("../vendor/highlight.min.js").then((module) => module.default);
    const highlight = await highlighter.catch(() => null);
    if (highlight?.getLanguage(this.language)) colour(this.code, highlight, this.language, this.text);
  }
}

/** The colours as elements. Highlight.js answers in HTML, which is read as text and rebuilt: spans and nothing else. */
function colour(code, highlight, language, text) {
  const html = highlight.highlight(text, { language, ignoreIllegals: true }).value;
  const open = [document.createDocumentFragment()];
  for (const part of html.split(/(<span class="[\w\s-]*">|<\/span>)/)) {
    if (part === "</span>") open.pop();
    else if (part.startsWith("<span ")) {
      const span = element("span", { class: part.slice(13, -2) });
      open.at(-1).append(span);
      open.push(span);
    } else open.at(-1).append(plain(part));
  }
  code.replaceChildren(open[0]);
}

function plain(html) {
  const signs = { "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'", "&amp;": "&" };
  return html.replace(/&(lt|gt|quot|#x27|amp);/g, (sign) => signs[sign]);
}
