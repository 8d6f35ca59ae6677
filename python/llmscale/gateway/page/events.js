// Server-sent events of a fetch response: an async generator of events and comments, in order, however the network cuts them.

/** Splits the text of a stream into events. `push` returns those that are complete. */
export class EventParser {
  #rest = "";

  push(text) {
    const blocks = (this.#rest + text).split("\n\n");
    this.#rest = blocks.pop();
    const found = [];
    for (const block of blocks) {
      for (const line of block.split("\n")) {
        if (line.startsWith("data: ")) found.push({ kind: "data", text: line.slice(6) });
        else if (line.startsWith(": ")) found.push({ kind: "comment", text: line.slice(2) });
      }
    }
    return found;
  }
}

/** Yields the events of a response until its body ends. */
export async function* eventsOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.releaseLock();
  }
}
