// Asks the server how the ring does: every second while something happens, less often while nothing does, and not at
// all while nobody looks. Knows no page.

import { ApiError, get } from "./api.js";

const BUSY_MS = 1000;
const IDLE_MS = 2500;

/** Calls `onReport` with what /v1/ring says, or `onSilence` with the ApiError. Returns what asks at once. */
export function watchRing(onReport, onSilence) {
  let timer = 0;
  let asking = false;
  const ask = async () => {
    clearTimeout(timer);
    if (asking || document.hidden) return;
    asking = true;
    let wait = IDLE_MS;
    try {
      const report = await get("v1/ring");
      if (report.running || report.waiting || report.state === "recovering") wait = BUSY_MS;
      onReport(report);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      onSilence(error);
    } finally {
      asking = false;
      timer = setTimeout(ask, wait);
    }
  };
  document.addEventListener("visibilitychange", ask);
  ask();
  return ask;
}
