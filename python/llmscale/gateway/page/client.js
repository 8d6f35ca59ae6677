// The gateway's API as the page needs it: models, fleet, and one streamed chat answer.

import { eventsOf } from "/page/events.js";

/** An error that the gateway explained. `retryAfter` is in seconds, null when retrying is not a matter of time. */
export class GatewayError extends Error {
  constructor(status, error, retryAfter) {
    super(error?.message ?? `the gateway answered ${status}`);
    this.status = status;
    this.code = error?.code ?? "unknown";
    this.retryAfter = retryAfter;
  }
}

function headers(apiKey, extra = {}) {
  return apiKey ? { ...extra, authorization: `Bearer ${apiKey}` } : extra;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const after = Number(response.headers.get("retry-after"));
  return new GatewayError(response.status, body?.error, Number.isFinite(after) && after > 0 ? after : null);
}

async function get(path, apiKey) {
  const response = await fetch(path, { headers: headers(apiKey), cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** The ids of the served models. */
export async function listModels(apiKey) {
  return (await get("/v1/models", apiKey)).data.map((model) => model.id);
}

/** State of the machines behind the gateway. */
export function readFleet(apiKey) {
  return get("/fleet", apiKey);
}

/** Kills a worker, where the operator has allowed it. */
export async function killWorker(pid, apiKey) {
  const response = await fetch(`/fleet/kill/${pid}`, { method: "POST", headers: headers(apiKey) });
  if (!response.ok) throw await refusal(response);
}

/**
 * Streams one answer. Yields {text}, {restarts}, {finish} and {usage}; throws GatewayError, or AbortError when stopped.
 */
export async function* streamChat(request, apiKey, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers(apiKey, { "content-type": "application/json" }),
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true }, priority: "interactive" }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  for await (const event of eventsOf(response)) {
    if (event.kind === "comment") {
      const restarts = /^restarts (\d+)$/.exec(event.text);
      if (restarts) yield { restarts: Number(restarts[1]) };
      continue;
    }
    if (event.text === "[DONE]") return;
    const chunk = JSON.parse(event.text);
    if (chunk.error) throw new GatewayError(response.status, chunk.error, null);
    const choice = chunk.choices[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
  }
  throw new GatewayError(0, { message: "the connection ended before the answer did", code: "connection_lost" }, null);
}
