// The server's API: JSON and streams of events, with the key where there is one. Knows no page.

import { settings } from "./store.js";

/** What the server says is wrong, or that it cannot be reached (status 0). */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The JSON at `path`, which is relative to this page. */
export async function get(path) {
  return (await ask(path, {})).json();
}

/**
 * The next turn of a conversation, as a stream: `onEvent` gets each event, `onComment` what the server says beside
 * them. Ends when the answer does; throws an ApiError, or an AbortError once `signal` says so.
 */
export async function streamChat(body, { signal, onEvent, onComment }) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const line of lines(response.body)) {
    if (line.startsWith(":")) onComment(line.slice(1).trim());
    else if (line === "data: [DONE]") return;
    else if (line.startsWith("data: ")) {
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(event.error.message, 200);
      onEvent(event);
    }
  }
  throw new ApiError("The server broke off before the end of the answer.", 0);
}

async function ask(path, options) {
  const { key } = settings();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.", 0);
  }
  if (!response.ok) {
    const said = await response.json().catch(() => null);
    throw new ApiError(said?.error?.message ?? `The server answered ${response.status}.`, response.status);
  }
  return response;
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server broke off before the end of the answer.", 0);
    }
    if (part.done) return;
    const found = (rest + part.value).split("\n");
    rest = found.pop();
    yield* found;
  }
}
