// The chat page: a conversation in memory, one answer at a time.

import { GatewayError, listModels, streamChat } from "/page/client.js";
import { Fleet } from "/page/fleet.js";
import { Settings } from "/page/settings.js";
import { figures, show, span } from "/page/text.js";

const byId = (id) => document.getElementById(id);
const SUGGESTIONS = ["What is 23 + 45?", "Convert 3 km to m.", "Sort these numbers: 9, 4, 17, 1.", "Tell me a short story about a fox."];

/** @type {{role: string, content: string}[]} */
let conversation = [];
let running = null;

const settings = new Settings(() => { loadModels(); fleet.refresh(); });
const fleet = new Fleet(settings, fleetChanged);

function setNotice(text, kind = "plain") {
  // Screen readers read a status again whenever it is written.
  if (byId("notice").textContent === text) return;
  byId("notice").textContent = text;
  byId("notice").dataset.kind = kind;
  byId("notice").hidden = !text;
}

function fleetChanged({ state, replaced }) {
  if (replaced) {
    if (running?.model === replaced.model) running.workerReplaced();
    return;
  }
  if (state === "unreachable") setNotice("The gateway cannot be reached. Trying again …", "bad");
  else if (state === "key needed") setNotice("This gateway needs an API key: see the settings.", "bad");
  // What happens to one model is no news for an answer of another.
  else if (running && fleet.isRecovering(running.model)) setNotice("A worker is being replaced. The answer goes on from where it is.");
  else if (!fleet.isRecovering(byId("model").value)) { setNotice(""); if (!byId("model").value) loadModels(); }
  for (const option of byId("model").options) {
    const own = fleet.models.get(option.value) ?? "ready";
    const label = own === "ready" ? option.value : `${option.value} (${own})`;
    // An open list closes in some browsers when it is written to.
    if (option.textContent !== label) option.textContent = label;
  }
}

function modelChanged() {
  byId("welcome-model").textContent = byId("model").value || "the model";
  document.title = `${byId("model").value} · llmscale`;
  composerChanged();
}

async function loadModels() {
  try {
    const names = await listModels(settings.apiKey);
    const chosen = byId("model").value;
    byId("model").replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(chosen)) byId("model").value = chosen;
    modelChanged();
  } catch (error) {
    if (error.status === 401) settings.ask("api-key");
    composerChanged();
  }
}

/** One answer on the page. */
class Answer {
  #element = byId("answer-template").content.cloneNode(true).firstElementChild;
  #part = (name) => this.#element.querySelector(`.${name}`);
  #started = performance.now();
  #frame = 0;
  #stop = new AbortController();
  #first = null;
  #last = 0;
  #pause = 0;
  #survived = false;
  #tokens = 0;
  #severalModels = byId("model").options.length > 1;
  model = byId("model").value;
  text = "";

  constructor() {
    this.#element.classList.add("waiting");
    this.#part("copy").addEventListener("click", () => this.#copy());
    // Browsers give the clipboard to secure pages only.
    this.#part("copy").hidden = !navigator.clipboard;
    this.#part("again").addEventListener("click", () => answerAgain(this));
    byId("log").append(this.#element);
  }

  get element() { return this.#element; }

  stop() { this.#stop.abort(); }

  /** A short remark beside the figures. */
  note(text) {
    this.#part("badge").textContent = text;
    this.#part("badge").hidden = false;
  }

  /** A worker of its model was replaced. A stream that was hit has said so itself, and that says more. */
  workerReplaced() { if (!this.#survived) this.note("worker replaced"); }

  /** Streams the answer to these messages. */
  async run(messages) {
    const request = { model: this.model, messages, ...settings.request() };
    try {
      for await (const news of streamChat(request, settings.apiKey, this.#stop.signal)) this.#take(news);
    } catch (error) {
      if (error.name !== "AbortError") this.#fail(error);
      else this.note("stopped");
    }
    cancelAnimationFrame(this.#frame);
    this.#element.classList.remove("waiting", "writing");
    this.#draw();
  }

  #take(news) {
    if (news.text !== undefined) {
      const now = performance.now() - this.#started;
      if (this.#first !== null) this.#pause = Math.max(this.#pause, now - this.#last);
      this.#last = now;
      this.#first ??= now;
      this.#tokens += 1;
      this.text += news.text;
      this.#element.classList.replace("waiting", "writing");
      // One drawing per frame, however fast the tokens come.
      if (!this.#frame) this.#frame = requestAnimationFrame(() => { this.#frame = 0; this.#draw(); });
    }
    if (news.restarts !== undefined) {
      this.#survived = true;
      this.note(news.restarts === 1 ? "survived a restart" : `survived ${news.restarts} restarts`);
    }
    if (news.finish === "length") this.note("cut off at the token limit");
    if (news.usage) this.#tokens = news.usage.completion_tokens;
  }

  #draw() {
    const scroller = byId("scroller");
    const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
    show(this.#part("text"), this.text);
    const parts = this.#tokens ? [figures(this.#tokens, this.#first, this.#last)] : [];
    if (this.#severalModels) parts.unshift(this.model);
    if (this.#survived) parts.push(`longest pause ${span(this.#pause)}`);
    this.#part("figures").textContent = parts.join(" · ");
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  }

  #fail(error) {
    const failure = this.#part("failure");
    const known = error instanceof GatewayError;
    failure.textContent = known ? error.message : "The gateway cannot be reached.";
    if (known && error.retryAfter) failure.textContent += ` (retry in ${error.retryAfter} s)`;
    failure.hidden = false;
    if (known && error.status === 401) settings.ask("api-key");
  }

  async #copy() {
    await navigator.clipboard.writeText(this.text);
    this.#part("copy").textContent = "Copied";
    setTimeout(() => { this.#part("copy").textContent = "Copy"; }, 1500);
  }
}

async function answer() {
  const made = new Answer();
  running = made;
  fleet.busy = true;
  fleet.refresh();
  composerChanged();
  byId("scroller").scrollTop = byId("scroller").scrollHeight;
  await made.run([...settings.systemMessages(), ...conversation]);
  if (running === made) {
    if (made.text) conversation.push({ role: "assistant", content: made.text });
    running = null;
    fleet.busy = false;
    composerChanged();
    byId("prompt").focus({ preventScroll: true });
  }
}

function answerAgain(previous) {
  if (running) return;
  // Everything after the question goes: the new answer continues from there.
  const place = [...byId("log").children].indexOf(previous.element);
  const questions = [...byId("log").children].slice(0, place).filter((turn) => turn.classList.contains("user")).length;
  while (byId("log").children.length > place) byId("log").lastElementChild.remove();
  let seen = 0;
  conversation = conversation.filter((message) => {
    if (message.role === "user") seen += 1;
    return seen < questions || (seen === questions && message.role === "user");
  });
  answer();
}

function send(content) {
  if (running || !content || !byId("model").value) return;
  byId("welcome").hidden = true;
  const question = byId("question-template").content.cloneNode(true).firstElementChild;
  question.querySelector(".text").textContent = content;
  byId("log").append(question);
  conversation.push({ role: "user", content });
  answer();
}

function composerChanged() {
  const prompt = byId("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  byId("send").disabled = !prompt.value.trim() || !byId("model").value;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
}

function newChat() {
  running?.stop();
  running = null;
  fleet.busy = false;
  conversation = [];
  byId("log").replaceChildren();
  byId("welcome").hidden = false;
  setNotice("");
  composerChanged();
  byId("prompt").focus();
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = byId("prompt").value.trim();
  if (!content || running) return;
  byId("prompt").value = "";
  send(content);
  composerChanged();
});
byId("prompt").addEventListener("input", composerChanged);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.stop());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.stop();
});
byId("new-chat").addEventListener("click", newChat);
byId("model").addEventListener("change", modelChanged);
byId("suggestions").append(
  ...SUGGESTIONS.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => send(text));
    return button;
  }),
);
loadModels();
