// What is behind the gateway: the state in the bar and, on request, every replica with its worker.

import { killWorker, readFleet } from "/page/client.js";

const byId = (id) => document.getElementById(id);
const CALM_MS = 3000;
const BUSY_MS = 500;

export class Fleet {
  #settings;
  #listener;
  #timer = 0;
  #restarts = new Map();
  #recovering = new Set();
  state = "unknown";
  /** State of each served model by its name. */
  models = new Map();
  busy = false;

  /** `listener` is told whenever the fleet was asked, and of every worker that was replaced. */
  constructor(settings, listener) {
    this.#settings = settings;
    this.#listener = listener;
    byId("fleet-button").addEventListener("click", () => { byId("fleet").showModal(); this.refresh(); });
    byId("fleet").addEventListener("click", (event) => { if (event.target === byId("fleet")) byId("fleet").close(); });
    document.addEventListener("visibilitychange", () => this.refresh());
    this.refresh();
  }

  /** Asks now, and again after a while: often while something happens, never in a hidden tab. */
  async refresh() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    try {
      this.#show(await readFleet(this.#settings.apiKey));
    } catch (error) {
      this.#setState(error.status === 401 ? "key needed" : "unreachable");
    }
    const often = this.busy || this.state !== "ready" || byId("fleet").open;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.refresh(), often ? BUSY_MS : CALM_MS);
  }

  /** Whether a worker of this model is being replaced now. */
  isRecovering(model) {
    return this.#recovering.has(model);
  }

  #setState(state) {
    this.state = state;
    byId("fleet-button").dataset.state = state;
    byId("fleet-state").textContent = state;
    this.#listener({ state });
  }

  #show(fleet) {
    this.models = new Map(fleet.models.map((model) => [model.name, model.state]));
    // The gateway names each model's best replica; a worker that is being replaced is worth showing beside a healthy one.
    const recovering = fleet.replicas.filter((replica) => replica.state === "recovering");
    this.#recovering = new Set(recovering.map((replica) => replica.model));
    this.#setState(fleet.state === "ready" && this.#recovering.size ? "recovering" : fleet.state);
    const models = this.models.size > 1 ? ` of ${this.models.size} models` : "";
    byId("fleet-summary").textContent =
      `${fleet.replicas.length} ${fleet.replicas.length === 1 ? "replica" : "replicas"}${models}, ` +
      `${fleet.live_requests} live and ${fleet.queued_requests} queued requests`;
    for (const replica of fleet.replicas) {
      if (replica.state === "down") continue;
      const before = this.#restarts.get(replica.node);
      if (before !== undefined && replica.worker_restarts > before) this.#listener({ replaced: replica });
      this.#restarts.set(replica.node, replica.worker_restarts);
    }
    if (byId("fleet").open) byId("replicas").replaceChildren(...fleet.replicas.map((replica) => this.#row(replica, fleet.may_kill)));
  }

  #row(replica, mayKill) {
    const item = row(replica);
    if (!this.models.has(replica.model)) item.querySelector(".state").textContent = "not served here";
    const button = item.querySelector(".kill");
    button.hidden = !mayKill || !replica.worker_pid;
    button.addEventListener("click", () => this.#kill(replica.worker_pid, button));
    return item;
  }

  async #kill(pid, button) {
    button.disabled = true;
    try {
      await killWorker(pid, this.#settings.apiKey);
    } catch (error) {
      byId("fleet-summary").textContent = error.message;
    }
    this.refresh();
  }
}

function row(replica) {
  const item = byId("replica-template").content.cloneNode(true).firstElementChild;
  const put = (name, text) => { item.querySelector(`.${name}`).textContent = text; };
  item.dataset.state = replica.state;
  put("name", replica.model);
  item.querySelector(".name").title = replica.node;
  // One that answers badly gets no work for a while: its state alone would look as if nothing were wrong.
  put("state", replica.trust === "trusted" ? replica.state : `${replica.state}, ${replica.trust}`);
  item.dataset.trust = replica.trust;
  put("pid", replica.worker_pid || "none");
  // One that cannot be heard says nothing of these; what stands in its place is not a measurement.
  const known = replica.state !== "down";
  const tell = (name, text) => put(name, known ? text : "-");
  tell("restarts", replica.worker_restarts);
  tell("running", replica.running);
  tell("waiting", replica.waiting);
  tell("steps", replica.steps.toLocaleString());
  tell("preemptions", replica.preemptions);
  const used = known && replica.total_blocks ? 1 - replica.free_blocks / replica.total_blocks : 0;
  tell("used", `${Math.round(used * 100)} %`);
  item.querySelector("progress").value = used;
  return item;
}
