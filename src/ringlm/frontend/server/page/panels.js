// The two panels beside the chat: where there is room they stand there, else they lie over it, one at a time, until
// closed.

import { byId } from "./dom.js";

const PANELS = [
  { panel: byId("chats"), opener: byId("show-chats"), beside: matchMedia("(min-width: 47rem)") },
  { panel: byId("ring"), opener: byId("show-ring"), beside: matchMedia("(min-width: 70rem)"), folds: true },
];

/** Make the panels work; returns what closes the one that lies over the chat. */
export function setUpPanels() {
  let over = null; // the one that lies over the chat
  const folded = new Set(); // those put away where there is room
  const draw = () => {
    for (const each of PANELS) {
      if (each === over && each.beside.matches) over = null;
      each.panel.hidden = each.beside.matches ? folded.has(each) : each !== over;
      each.panel.classList.toggle("over", each === over);
      each.opener.setAttribute("aria-expanded", String(!each.panel.hidden));
      each.opener.hidden = each.beside.matches && !each.folds;
    }
    for (const each of PANELS) each.panel.inert = over !== null && each !== over;
    byId("main").inert = over !== null;
    byId("shade").hidden = over === null;
  };
  const close = () => {
    const from = over;
    over = null;
    draw();
    from?.opener.focus();
  };
  for (const each of PANELS) {
    each.opener.addEventListener("click", () => {
      if (!each.beside.matches) {
        over = each;
      } else if (!folded.delete(each)) {
        folded.add(each);
      }
      draw();
      if (over === each) each.panel.querySelector(".closer").focus();
    });
    each.panel.querySelector(".closer").addEventListener("click", close);
    each.beside.addEventListener("change", draw);
  }
  byId("shade").addEventListener("click", close);
  addEventListener("keydown", (event) => event.key === "Escape" && over && close());
  draw();
  return close;
}
