// What this browser keeps: chats, each under a key of its own so that two tabs do not overwrite each other's, settings
// and the choice of colours. Bounded; the oldest chats go first. Knows no page and no server.

const CHAT = "ringlm.chat.";
const SETTINGS = "ringlm.settings";
const MOST_CHATS = 200;
const MOST_CHARACTERS = 4_000_000; // browsers keep 5 MB or so of a site

export const DEFAULTS = { system: "", temperature: "0.7", top_p: "", max_tokens: "", seed: "", tools: "", key: "" };

/** A chat: {id, title, updated, messages}; a message: {role, content, …} as thread.js draws it. */
export function newChat() {
  return {
    id: `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`,
    title: "",
    updated: Date.now(),
    messages: [],
  };
}

/** All of them, the newest first. What cannot be read is left out. */
export function chats() {
  return Object.keys(localStorage)
    .filter((name) => name.startsWith(CHAT))
    .map((name) => read(name))
    .filter((chat) => chat && typeof chat.id === "string" && Array.isArray(chat.messages))
    .sort((one, other) => other.updated - one.updated);
}

/** Keep `chat`, and of the others what there is room for. False where it could not be kept. */
export function save(chat) {
  const text = JSON.stringify(chat);
  const others = chats().filter((other) => other.id !== chat.id);
  let room = MOST_CHARACTERS - text.length;
  others.forEach((other, index) => {
    room -= localStorage.getItem(CHAT + other.id)?.length ?? 0;
    if (index >= MOST_CHATS - 1 || room < 0) remove(other.id);
  });
  for (;;) {
    try {
      localStorage.setItem(CHAT + chat.id, text);
      return true;
    } catch (error) {
      const oldest = others.pop(); // the browser keeps less than was thought
      if (!oldest) return false;
      remove(oldest.id);
    }
  }
}

export function remove(id) {
  localStorage.removeItem(CHAT + id);
}

export function settings() {
  return { ...DEFAULTS, ...read(SETTINGS) };
}

export function saveSettings(changes) {
  localStorage.setItem(SETTINGS, JSON.stringify({ ...settings(), ...changes }));
}

/** Call `listener` when another tab has changed something. */
export function onOthersChange(listener) {
  addEventListener("storage", (event) => event.key?.startsWith(CHAT) && listener());
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}
