// The list of chats: open one, give it another name, delete it. Knows titles, no messages.

import { byId, h, iconButton } from "./dom.js";

/** Draw the list; `actions`: {open(id), rename(id, title), remove(id)}. */
export function drawChats(chats, current, running, actions) {
  byId("chat-list").replaceChildren(
    ...chats.map((chat) => item(chat, chat.id === current, running.has(chat.id), actions)),
  );
}

function item(chat, isCurrent, isRunning, actions) {
  const title = chat.title || "New chat";
  const row = h("li", { class: isCurrent ? "current" : null });
  const rename = () => {
    const input = h("input", { value: title, maxlength: 100, "aria-label": "Name of the chat" });
    let done = false;
    const leave = (keep) => {
      if (done) return;
      done = true;
      actions.rename(chat.id, (keep && input.value.trim()) || title);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") leave(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        leave(false);
      }
    });
    input.addEventListener("blur", () => leave(true));
    row.replaceChildren(input);
    input.select();
  };
  const remove = () => confirm(`Delete “${title}”?`) && actions.remove(chat.id);
  row.append(
    h(
      "button",
      {
        type: "button",
        class: "open",
        "aria-current": isCurrent ? "true" : null,
        onclick: () => actions.open(chat.id),
      },
      isRunning ? h("span", { class: "pulse", "aria-label": "being answered", role: "img" }) : null,
      h("span", {}, title),
    ),
    iconButton("pencil", `Rename “${title}”`, rename),
    iconButton("trash", `Delete “${title}”`, remove),
  );
  return row;
}
