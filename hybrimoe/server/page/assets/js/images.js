// Images of a message: made smaller where that loses nothing for the model, kept as data: URLs, shown as small pictures.
const KINDS = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"]);
const LONGEST_SIDE_PX = 2048; // models see no more of an image at once
const MOST_BYTES = 3 << 20; // of a file that is sent as it is; requests have a limit
const JPEG_QUALITY = 0.9;
const THUMBNAIL_PX = 240;

export function isImage(file) {
  return KINDS.has(file.type);
}

/** A data: URL of an image. Raises an Error whose message is for people. */
export async function imageUrl(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name} cannot be read as an image. Save it again, as PNG or JPEG.`);
  });
  const scale = LONGEST_SIDE_PX / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && file.size <= MOST_BYTES) return dataUrl(file);
  const canvas = drawn(bitmap, Math.min(1, scale));
  return dataUrl(await new Promise((done) => canvas.toBlob(done, "image/jpeg", JPEG_QUALITY)));
}

/** A small picture of a data: URL, as an element that is filled when it is decoded. */
export function thumbnail(url, name) {
  const shown = document.createElement("canvas");
  shown.className = "thumbnail";
  shown.setAttribute("role", "img");
  shown.setAttribute("aria-label", name);
  createImageBitmap(blobOf(url)).then((bitmap) => {
    const scale = Math.min(1, THUMBNAIL_PX / Math.max(bitmap.width, bitmap.height));
    const small = drawn(bitmap, scale);
    shown.width = small.width;
    shown.height = small.height;
    shown.getContext("2d").drawImage(small, 0, 0);
  }).catch(() => shown.remove());
  return shown;
}

function drawn(bitmap, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function blobOf(url) {
  const [head, body] = url.split(",", 2);
  const bytes = Uint8Array.from(atob(body), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: head.slice("data:".length).split(";")[0] });
}

function dataUrl(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("The image cannot be read."));
    reader.readAsDataURL(blob);
  });
}
