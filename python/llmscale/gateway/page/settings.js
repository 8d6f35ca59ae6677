// The settings dialog. Values live in this tab only; the API key survives a reload of it.

const byId = (id) => document.getElementById(id);
const KEY = "llmscale-api-key";

export class Settings {
  #temperature;

  constructor(changed) {
    byId("temperature").value = "0.7";
    byId("temperature").addEventListener("input", () => { this.#temperature = Number(byId("temperature").value); });
    byId("api-key").value = sessionStorage.getItem(KEY) ?? "";
    byId("settings-button").addEventListener("click", () => byId("settings").showModal());
    byId("settings").addEventListener("click", (event) => { if (event.target === byId("settings")) byId("settings").close(); });
    byId("settings").addEventListener("input", () => this.#show());
    byId("settings").addEventListener("close", () => {
      sessionStorage.setItem(KEY, this.apiKey);
      changed();
    });
    this.#show();
  }

  get apiKey() {
    return byId("api-key").value.trim();
  }

  /** Opens the dialog at the field that needs a value. */
  ask(field) {
    if (!byId("settings").open) byId("settings").showModal();
    byId(field).focus();
  }

  /** The part of a request that the settings decide. */
  request() {
    const whole = (id) => (/^-?\d+$/.test(byId(id).value.trim()) ? Number(byId(id).value) : undefined);
    // Until somebody moves it, the temperature is what the model's author recommends.
    return { temperature: this.#temperature, max_tokens: whole("max-tokens"), seed: whole("seed") };
  }

  /** Messages that go before the conversation. */
  systemMessages() {
    const content = byId("system").value.trim();
    return content ? [{ role: "system", content }] : [];
  }

  #show() {
    byId("temperature-value").textContent = this.#temperature?.toFixed(2) ?? "as the model's author recommends";
  }
}
