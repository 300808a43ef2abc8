// Where a message is written: Enter sends, Shift and Enter makes a new line, Escape stops, files become parts of it.
import { json } from "./api.js";
import { announce, byId, element, iconButton, size } from "./dom.js";
import { readFiles } from "./files.js";

const MOST_LINES_PX = 260;

/** Whether a model of this server takes images. */
async function sees() {
  const { data } = await json("v1/models");
  return data.some((model) => model.input_modalities?.includes("image"));
}

export class Composer {
  /** send(text, files): a message was written. stop(): no more of the reply. editLast(): the last message again. */
  constructor({ send, stop, editLast }) {
    Object.assign(this, { send, stop, editLast });
    this.prompt = byId("prompt");
    this.files = [];
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    byId("stop").addEventListener("click", () => stop());
    this.prompt.addEventListener("keydown", (event) => this.key(event));
    this.prompt.addEventListener("input", () => this.fit());
    byId("add-file").addEventListener("click", () => byId("file-input").click());
    byId("file-input").addEventListener("change", (event) => {
      this.add([...event.target.files]);
      event.target.value = "";
    });
    this.prompt.addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.add([...event.clipboardData.files]);
    });
    this.takeDrops();
  }

  key(event) {
    if (event.isComposing) return; // an input method is at work
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.submit();
    } else if (event.key === "ArrowUp" && this.prompt.value === "") {
      event.preventDefault();
      this.editLast();
    }
  }

  submit() {
    const text = this.prompt.value.trim();
    if ((!text && !this.files.length) || this.busy) return;
    const files = this.files;
    this.clear();
    this.send(text, files);
  }

  clear() {
    this.prompt.value = "";
    this.files = [];
    this.problem("");
    this.showFiles();
    this.fit();
  }

  /** busy: a reply is on its way, and can be stopped. */
  setBusy(busy) {
    const focused = document.activeElement === byId("stop") || document.activeElement === byId("send");
    this.busy = busy;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    if (focused) this.prompt.focus();
  }

  focus() {
    if (matchMedia("(pointer: fine)").matches) this.prompt.focus(); // a phone would cover half with its keyboard
  }

  fit() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${Math.min(this.prompt.scrollHeight, MOST_LINES_PX)}px`;
  }

  async add(files) {
    const { found, problems } = await readFiles(files, this.files, sees);
    this.files = [...this.files, ...found];
    this.problem(problems.join(" "));
    this.showFiles();
    if (found.length) announce(`${found.map(({ name }) => name).join(", ")} added`);
    this.prompt.focus();
  }

  problem(text) {
    byId("file-problem").textContent = text;
    byId("file-problem").hidden = !text;
  }

  showFiles() {
    const list = byId("files");
    list.hidden = !this.files.length;
    list.replaceChildren(...this.files.map((file) => element(
      "li", { class: "file" }, element("span", {}, file.name), element("small", {}, size(file.bytes ?? new Blob([file.text]).size)),
      iconButton("close", `Leave out ${file.name}`, () => {
        this.files = this.files.filter((other) => other !== file);
        this.showFiles();
        this.prompt.focus();
      }),
    )));
  }

  takeDrops() {
    const brings = (event) => event.dataTransfer?.types.includes("Files");
    const show = (on) => { byId("drop").hidden = !on; };
    window.addEventListener("dragover", (event) => {
      if (!brings(event)) return;
      event.preventDefault();
      show(true);
    });
    window.addEventListener("dragleave", (event) => event.relatedTarget === null && show(false));
    window.addEventListener("drop", (event) => {
      if (!brings(event)) return;
      event.preventDefault();
      show(false);
      this.add([...event.dataTransfer.files]);
    });
  }
}
