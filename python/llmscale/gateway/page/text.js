// How an answer is shown: plain text with code in it. Every character goes in as text, never as markup.

/** Cuts a text into {kind: "text" | "block" | "inline", text}. An open block runs to the end. */
export function piecesOf(source) {
  const pieces = [];
  const add = (kind, text) => { if (text) pieces.push({ kind, text }); };
  const blocks = source.split(/^```[^\n`]*\n?/m);
  blocks.forEach((part, index) => {
    if (index % 2 === 1) {
      add("block", part.replace(/\n$/, ""));
      return;
    }
    // A block has its own margins: the line ends around it would only double them.
    let plain = index > 0 ? part.replace(/^\n+/, "") : part;
    if (index < blocks.length - 1) plain = plain.replace(/\n+$/, "");
    plain.split(/`([^`\n]+)`/).forEach((text, place) => add(place % 2 === 1 ? "inline" : "text", text));
  });
  return pieces;
}

/** Replaces the content of an element with a text. */
export function show(element, source) {
  const nodes = piecesOf(source).map(({ kind, text }) => {
    if (kind === "text") return document.createTextNode(text);
    const code = document.createElement("code");
    code.textContent = text;
    if (kind === "inline") return code;
    const block = document.createElement("pre");
    block.append(code);
    return block;
  });
  element.replaceChildren(...nodes);
}

/** "42 tokens · 118 tokens/s · first after 23 ms". Times in milliseconds, null where nothing came. */
export function figures(tokens, firstMs, lastMs) {
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (firstMs !== null && lastMs > firstMs && tokens > 1) {
    const rate = ((tokens - 1) * 1000) / (lastMs - firstMs);
    parts.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`);
  }
  if (firstMs !== null) parts.push(`first after ${span(firstMs)}`);
  return parts.join(" · ");
}

/** "23 ms" or "1.2 s". */
export function span(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
