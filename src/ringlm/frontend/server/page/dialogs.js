// Settings, and the question for a key.

import { byId } from "./dom.js";
import { saveSettings, settings } from "./store.js";

/** The dialog of settings; `onKey` is called when the key has changed, `onDelete` to delete all chats. */
export function setUpSettings(onKey, onDelete) {
  const dialog = byId("settings");
  const form = dialog.querySelector("form");
  const problem = byId("settings-error");
  const fields = () => [...form.elements].filter((field) => field.name);
  byId("open-settings").addEventListener("click", () => {
    const known = settings();
    for (const field of fields()) field.value = known[field.name];
    problem.textContent = "";
    dialog.showModal();
  });
  byId("delete-all").addEventListener("click", () => {
    if (confirm("Delete all chats of this browser?")) {
      onDelete();
      dialog.close();
    }
  });
  form.addEventListener("submit", (event) => {
    if (event.submitter?.value !== "save") return;
    const given = Object.fromEntries(fields().map((field) => [field.name, field.value.trim()]));
    if (!isList(given.tools)) {
      event.preventDefault();
      problem.textContent = "Tools: this is no JSON list.";
      form.elements.tools.focus();
      return;
    }
    const changed = given.key !== settings().key;
    saveSettings(given);
    if (changed) onKey();
  });
}

/** Ask for a key, unless that is being done; `onKey` is called when one was given. */
export function askForKey(onKey) {
  const dialog = byId("ask-key");
  if (dialog.open || byId("settings").open) return;
  const form = dialog.querySelector("form");
  if (settings().key) byId("ask-key-why").textContent = "The key that this browser has was refused. Give another.";
  form.onsubmit = () => {
    saveSettings({ key: form.elements.key.value.trim() });
    form.reset();
    onKey();
  };
  dialog.showModal();
}

function isList(text) {
  try {
    return !text || Array.isArray(JSON.parse(text));
  } catch {
    return false;
  }
}
