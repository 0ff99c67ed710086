// The page: puts chats, composer, panels, settings and the ring together.

import { fillAnswer, newAnswer, underWay } from "./answering.js";
import { drawChats } from "./chatlist.js";
import { askForKey, setUpSettings } from "./dialogs.js";
import { announce, byId, h, icon } from "./dom.js";
import { setUpPanels } from "./panels.js";
import { RingView } from "./ring.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import { many } from "./units.js";
import { watchRing } from "./watch.js";

const IDEAS = ["Why is the sky blue?", "Write a haiku about a cable", "Three good names for a boat"];
const TITLE = 60; // characters of the first message that become a chat's name

const running = new Map(); // by chat's id: {chat, controller} of the answer under way
let chat = store.newChat();

const message = byId("message");
const ringView = new RingView();
const thread = new Thread(byId("thread"), byId("scroller"), {
  edit(index, text) {
    cutTo(index);
    ask({ role: "user", content: text });
  },
  again(index) {
    cutTo(index);
    answer();
  },
  results(texts) {
    const { calls } = chat.messages.at(-1);
    ask(...texts.map((content, index) => ({ role: "tool", tool_call_id: calls[index].id, content })));
  },
});

for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
const closePanel = setUpPanels();
const askRing = watchRing(
  (report) => {
    ringView.show(report);
    byId("served").textContent = `${report.model} answers, from ${many(report.world_size, "rank")}.`;
  },
  (error) => {
    ringView.silence(error);
    if (error.status === 401) askForKey(askRing);
  },
);
setUpSettings(askRing, () => {
  for (const each of store.chats()) remove(each.id);
});
setUpTheme();
setUpComposer();
byId("ideas").append(
  ...IDEAS.map((text) => h("button", { type: "button", onclick: () => ask({ role: "user", content: text }) }, text)),
);
byId("new-chat").addEventListener("click", () => open(store.newChat()));
store.onOthersChange(draw);
for (const leaving of ["beforeunload", "pagehide"]) {
  addEventListener(leaving, () => {
    for (const { chat: each, controller } of running.values()) {
      controller.abort(); // else it ends as if the server had broken off
      keep(each);
    }
  });
}
open(find(location.hash.slice(1)) ?? chat);

/** Show a chat. */
function open(next) {
  chat = running.get(next.id)?.chat ?? next;
  history.replaceState(null, "", chat.messages.length ? `#${chat.id}` : location.pathname + location.search);
  thread.show(chat.messages);
  closePanel();
  draw();
  if (matchMedia("(pointer: fine)").matches) message.focus(); // elsewhere that brings a keyboard up
}

/** All but the messages. */
function draw() {
  const title = chat.title || "New chat";
  byId("title").textContent = title;
  document.title = chat.title ? `${chat.title} – ringlm` : "ringlm";
  byId("welcome").hidden = chat.messages.length > 0;
  const busy = running.has(chat.id);
  byId("stop").hidden = !busy;
  byId("send").hidden = busy;
  drawChats(store.chats(), chat.id, running, {
    open: (id) => open(find(id) ?? store.newChat()),
    rename(id, text) {
      const renamed = id === chat.id ? chat : (running.get(id)?.chat ?? find(id));
      if (!renamed) return draw();
      renamed.title = text;
      keep(renamed);
      draw();
    },
    remove,
  });
}

/** A chat that is kept; another tab may have deleted it. */
function find(id) {
  return store.chats().find((each) => each.id === id);
}

function remove(id) {
  running.get(id)?.controller.abort();
  running.delete(id);
  store.remove(id);
  if (id === chat.id) open(store.newChat());
  else draw();
}

/** Leave out message `index` of the chat and all behind it. */
function cutTo(index) {
  running.get(chat.id)?.controller.abort();
  chat.messages = chat.messages.slice(0, index);
}

function ask(...messages) {
  chat.messages.push(...messages);
  chat.title ||= shortened(messages[0].content.replace(/\s+/g, " "));
  answer();
}

const shortened = (text) => (text.length > TITLE ? `${text.slice(0, TITLE - 1).trimEnd()}…` : text);

/** Have the chat answered. */
async function answer() {
  const own = chat;
  const controller = new AbortController();
  const next = newAnswer();
  own.messages.push(next);
  own.updated = Date.now();
  keep(own);
  running.set(own.id, { chat: own, controller });
  open(own);
  askRing();
  await fillAnswer(own.messages, next, store.settings(), controller.signal, () => {
    if (chat === own && own.messages.at(-1) === next) thread.grown();
  });
  if (running.get(own.id)?.controller !== controller) return; // it was answered again, or deleted, meanwhile
  running.delete(own.id);
  keep(own);
  if (chat === own) announce(next.state === "failed" ? next.note : `Answer: ${next.content}`);
  draw();
}

/** Keep a chat; what is still being written is kept as stopped. */
function keep(own) {
  const messages = own.messages.map((each) => (underWay(each) ? { ...each, state: "stopped", note: "" } : each));
  if (!store.save({ ...own, messages })) announce("This browser has no room to keep the chat.");
}

function setUpComposer() {
  const form = byId("composer");
  const fit = () => {
    message.style.height = "auto";
    message.style.height = `${message.scrollHeight}px`;
  };
  message.addEventListener("input", fit);
  message.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const content = message.value.trim();
    if (!content || running.has(chat.id)) return;
    message.value = "";
    fit();
    ask({ role: "user", content });
  });
  byId("stop").addEventListener("click", () => running.get(chat.id)?.controller.abort());
}

function setUpTheme() {
  const button = byId("theme");
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.replaceChildren(icon(isDark() ? "sun" : "moon"));
    button.setAttribute("aria-pressed", String(isDark()));
  };
  button.addEventListener("click", () => {
    const wanted = isDark() ? "light" : "dark";
    const own = wanted === (system.matches ? "dark" : "light") ? "" : wanted; // else it goes with the system's
    root.dataset.theme = own;
    localStorage.setItem("ringlm.theme", own);
    show();
  });
  system.addEventListener("change", show);
  show();
}
