// Files: what is dropped, pasted or chosen becomes part of the message, texts as text and images, where the model sees, as
// images. Anything else is refused.
import { size } from "./dom.js";
import { imageUrl, isImage } from "./images.js";

const MOST_BYTES = 1 << 20; // of a text; a model reads a token from three or four of them
const MOST_FILES = 10;

/** {name, text} of a file, {name, text: "", image, bytes} of an image. Raises an Error whose message is for people. */
export async function readFile(file, sees) {
  if (isImage(file)) {
    if (!(await sees())) throw new Error(`${file.name} is an image, and this model takes text only.`);
    return { name: file.name, text: "", image: await imageUrl(file), bytes: file.size };
  }
  if (file.size > MOST_BYTES) {
    throw new Error(`${file.name} has ${size(file.size)}; at most ${size(MOST_BYTES)} of a file fit a message. Take the part that matters.`);
  }
  const bytes = new Uint8Array(await file.arrayBuffer().catch(() => {
    throw new Error(`${file.name} cannot be read. A folder cannot be added; choose the files in it.`);
  }));
  const text = decoded(bytes);
  if (text === null) {
    throw new Error(`${file.name} is not text. Save it as text first (of a PDF or an office document: export or copy its text).`);
  }
  return { name: file.name, text };
}

/** Files beside those that are there already: what they hold, and what is wrong with the others. sees(): whether the
 *  model takes images. */
export async function readFiles(files, already, sees) {
  const found = [];
  const problems = [];
  for (const file of files) {
    if (already.length + found.length >= MOST_FILES) {
      problems.push(`At most ${MOST_FILES} files fit a message; ${file.name} was left out.`);
      continue;
    }
    try {
      found.push(await readFile(file, sees));
    } catch (error) {
      problems.push(error.message);
    }
  }
  return { found, problems };
}

/** UTF-8, or UTF-16 that says so; null for anything else. */
function decoded(bytes) {
  const marks = { "255,254": "utf-16le", "254,255": "utf-16be" };
  try {
    const text = new TextDecoder(marks[bytes.slice(0, 2).join()] ?? "utf-8", { fatal: true }).decode(bytes);
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}

/** What the model is told of a message with files: a text, or parts where some are images. */
export function withFiles(message) {
  const images = message.files.filter(({ image }) => image);
  const text = withTexts(message);
  if (!images.length) return text;
  const parts = images.map(({ image }) => ({ type: "image_url", image_url: { url: image } }));
  return text ? [...parts, { type: "text", text }] : parts;
}

/** Two contents, as `withFiles` gives them, one after the other. */
export function joined(first, second) {
  if (typeof first === "string" && typeof second === "string") return `${first}\n\n${second}`;
  return [first, second].flatMap((content) => (typeof content === "string" ? [{ type: "text", text: content }] : content));
}

function withTexts(message) {
  const parts = message.files.filter(({ image }) => !image).map(({ name, text }) => `File ${name}:\n${fence(text)}\n${text}\n${fence(text)}`);
  return [...parts, message.text].filter(Boolean).join("\n\n");
}

/** A fence that the text does not have. */
function fence(text) {
  const longest = Math.max(2, ...[...text.matchAll(/`{3,}/g)].map(([run]) => run.length));
  return "`".repeat(longest + 1);
}
