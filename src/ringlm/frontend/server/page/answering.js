// An answer on its way: what is asked of the server, and what its events add to a message. Knows no page.
//
// A message: {role: "user", content}, {role: "tool", tool_call_id, content} or
// {role: "assistant", content, reasoning, calls: [{id, name, arguments}], state, note, tokens, seconds}; `state` is
// "waiting" before the first token, "writing", "done", "stopped", "cut" at the longest length, or "failed"; `note` says
// more.

import { ApiError, streamChat } from "./api.js";

export const newAnswer = () => ({
  role: "assistant",
  content: "",
  reasoning: "",
  calls: [],
  state: "waiting",
  note: "",
});

/** Whether more is to come. */
export const underWay = (message) => message?.state === "waiting" || message?.state === "writing";

/** Fill `answer`, the last of `messages`; `onChange` is called after each change. Never throws. */
export async function fillAnswer(messages, answer, settings, signal, onChange) {
  let first = 0;
  try {
    await streamChat(request(messages.slice(0, -1), settings), {
      signal,
      onComment(text) {
        answer.note = text.startsWith("waiting for") ? text : answer.note;
        onChange();
      },
      onEvent(event) {
        answer.note = "";
        const [choice] = event.choices;
        if (event.usage) answer.tokens = event.usage.completion_tokens;
        if (choice) take(answer, choice);
        if (choice && !first && (answer.content || answer.reasoning)) first = performance.now();
        if (first) answer.seconds = (performance.now() - first) / 1000;
        onChange();
      },
    });
    answer.state = answer.state === "cut" ? "cut" : "done";
  } catch (error) {
    answer.note = "";
    if (error.name === "AbortError") answer.state = "stopped";
    else {
      answer.state = "failed";
      answer.note = error.message;
      if (!(error instanceof ApiError)) throw error;
    }
  } finally {
    onChange();
  }
}

function take(answer, { delta, finish_reason: reason }) {
  answer.content += delta.content ?? "";
  answer.reasoning += delta.reasoning_content ?? "";
  for (const { index, id, function: told } of delta.tool_calls ?? []) {
    const call = (answer.calls[index] ??= { id, name: "", arguments: "" });
    call.name += told.name ?? "";
    call.arguments += told.arguments ?? "";
  }
  answer.state = reason === "length" ? "cut" : "writing";
}

function request(messages, settings) {
  const body = { messages: messages.map(told) };
  if (settings.system.trim()) body.messages.unshift({ role: "system", content: settings.system });
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (settings[name] !== "") body[name] = Number(settings[name]);
  }
  if (settings.tools.trim()) body.tools = JSON.parse(settings.tools);
  return body;
}

/** A message as the API takes it: what the model thought is not told again. */
function told({ role, content, calls, tool_call_id }) {
  if (role === "tool") return { role, content, tool_call_id };
  if (!calls?.length) return { role, content };
  const tool_calls = calls.map((call) => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments },
  }));
  return { role, content, tool_calls };
}
