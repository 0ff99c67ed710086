// Draws a conversation: messages, thoughts, calls of tools, and what can be done with each. Knows no server; what its
// user wants it tells `actions`: {edit(index, text), again(index), results(texts)}.

import { copyButton, h, icon, iconButton } from "./dom.js";
import { underWay } from "./answering.js";
import { Markdown } from "./markdown.js";

const STICK_PX = 80; // who is so near the end wants to stay there
const DRAW_MS = 80; // between two drawings of a text that grows

export class Thread {
  constructor(list, scroller, actions) {
    this.list = list;
    this.scroller = scroller;
    this.actions = actions;
    this.views = [];
    this.timer = 0;
  }

  /** All of a conversation, from its end. */
  show(messages) {
    clearTimeout(this.timer);
    this.timer = 0;
    this.messages = messages;
    this.views = messages.map((message, index) =>
      message.role === "assistant" ? new Answer(message, index, messages, this.actions) : this.question(message, index),
    );
    this.list.replaceChildren(...this.views.map((view) => view.element));
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** The last message has grown; it is drawn soon, and at once when it has ended. */
  grown() {
    if (!underWay(this.messages.at(-1))) {
      clearTimeout(this.timer);
      this.timer = 0;
      this.draw();
    } else {
      this.timer ||= setTimeout(() => {
        this.timer = 0;
        this.draw();
      }, DRAW_MS);
    }
  }

  draw() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.views.at(-1)?.draw?.();
    if (scrollHeight - scrollTop - clientHeight < STICK_PX) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  question(message, index) {
    const element = h("li", { class: message.role });
    const show = () => {
      const tools = h(
        "div",
        { class: "tools" },
        copyButton("Copy the message", () => message.content),
        message.role === "user" ? iconButton("pencil", "Edit the message", edit) : null,
      );
      const from = h("span", { class: "unseen" }, message.role === "user" ? "You: " : "Result: ");
      element.replaceChildren(h("div", { class: "said" }, from, message.content), tools);
    };
    const edit = () => {
      const area = h("textarea", { rows: 3, "aria-label": "Edit the message" });
      area.value = message.content;
      const leave = () => {
        show();
        element.querySelector("[title^=Edit]").focus();
      };
      const send = () => area.value.trim() && this.actions.edit(index, area.value.trim());
      area.addEventListener("keydown", (event) => {
        if (event.key === "Escape") leave();
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          send();
        }
      });
      element.replaceChildren(
        h(
          "div",
          { class: "editing" },
          area,
          h(
            "div",
            { class: "ends" },
            h("button", { type: "button", class: "plain", onclick: leave }, "Cancel"),
            h("button", { type: "button", class: "main", onclick: send }, "Send"),
          ),
        ),
      );
      area.focus();
    };
    show();
    return { element };
  }
}

/** A message of the model's, which may grow. */
class Answer {
  constructor(message, index, messages, actions) {
    this.message = message;
    this.thoughts = h("div", { class: "thought" });
    this.summary = h("summary");
    this.reasoning = h("details", {}, this.summary, this.thoughts);
    this.body = h("div", { class: "text" });
    this.calls = h("div", { class: "calls" });
    this.status = h("p", { class: "status" });
    this.tools = h(
      "div",
      { class: "tools" },
      copyButton("Copy the answer", () => message.content),
      iconButton("again", "Answer again", () => actions.again(index)),
      (this.figures = h("span", { class: "soft" })),
    );
    this.markdown = new Markdown(this.body);
    this.thinking = new Markdown(this.thoughts);
    const from = h("span", { class: "unseen" }, "Answer: ");
    this.element = h(
      "li",
      { class: "assistant" },
      from,
      this.reasoning,
      this.body,
      this.calls,
      this.status,
      this.tools,
    );
    this.open = index === messages.length - 1; // for results of what it calls
    this.actions = actions;
    this.draw();
  }

  draw() {
    const { content, reasoning, calls, state, note, tokens, seconds } = this.message;
    const busy = underWay(this.message);
    this.element.classList.toggle("busy", busy);
    this.reasoning.hidden = !reasoning;
    this.summary.textContent = busy && !content ? "Thinking…" : "Thoughts";
    this.thinking.show(reasoning);
    this.markdown.show(content);
    if (calls.length && (!busy || this.calls.childElementCount !== calls.length)) {
      this.calls.replaceChildren(...this.drawnCalls(calls, !busy && this.open));
    }
    this.status.className = state === "failed" ? "status error" : "status";
    this.status.replaceChildren(
      ...{
        waiting: [h("span", { class: "pulse", "aria-hidden": "true" }), note || "reading"],
        writing: note ? [h("span", { class: "pulse", "aria-hidden": "true" }), note] : [],
        done: content || reasoning || calls.length ? [] : ["The model said nothing."],
        stopped: ["Stopped."],
        cut: ["Cut off at the longest length."],
        failed: [note],
      }[state],
    );
    this.tools.hidden = busy;
    this.figures.textContent =
      tokens > 1 && seconds > 0 ? `${tokens} tokens, ${((tokens - 1) / seconds).toFixed(1)} a second` : "";
  }

  drawnCalls(calls, open) {
    const drawn = calls.map((call) =>
      h(
        "figure",
        { class: "code" },
        h(
          "figcaption",
          {},
          h("span", {}, `calls ${call.name}`),
          copyButton("Copy the arguments", () => call.arguments),
        ),
        h("pre", { tabindex: "0" }, h("code", {}, pretty(call.arguments))),
        open
          ? h("input", { class: "result", placeholder: "what it gives", "aria-label": `Result of ${call.name}` })
          : null,
      ),
    );
    if (!open) return drawn;
    const send = () => this.actions.results([...this.calls.querySelectorAll("input")].map((input) => input.value));
    return [...drawn, h("button", { type: "button", class: "main", onclick: send }, icon("up"), "Give the results")];
  }
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
