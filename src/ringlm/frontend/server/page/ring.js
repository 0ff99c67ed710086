// The ring beside the chat: the picture, figures, and a line for each rank and link. Knows reports, no server.

import { announce, byId, h, s } from "./dom.js";
import { Drawing } from "./drawing.js";
import { bytes, many, perSecond, time } from "./units.js";

const REMEMBERED = 60; // rates in the curve

export class RingView {
  constructor() {
    this.drawing = new Drawing(byId("drawing"));
    this.rates = [];
    this.lost = null;
  }

  /** What the server has said. */
  show(report) {
    const busy = report.running > 0 && report.lost === null;
    const rate = busy ? report.tokens_per_s : 0;
    this.rates = [...this.rates, rate].slice(-REMEMBERED);
    this.tell(report);
    const ranks = many(report.world_size, "rank");
    if (report.lost !== null) {
      this.brief("bad", `rank ${report.lost} lost`);
      this.drawing.update(report, busy, `rank ${report.lost}`, "is awaited");
    } else {
      this.brief(
        report.ranks.some((each) => each.slow) ? "warn" : "good",
        busy ? `${ranks} · ${rate.toFixed(1)} tok/s` : ranks,
      );
      this.drawing.update(report, busy, busy ? rate.toFixed(1) : "idle", busy ? "tokens a second" : "");
    }
    const times = report.recoveries === 1 ? "once" : `${report.recoveries} times`;
    const again = report.recoveries ? ` · formed again ${times}` : "";
    byId("ring-state").textContent = (report.state === "ready" ? "ready" : "waiting for a rank") + again;
    byId("figures").replaceChildren(...this.figures(report));
    byId("ranks").replaceChildren(...rankRows(report));
    byId("links").replaceChildren(...linkRows(report, busy));
    byId("links-title").hidden = !report.links.length;
  }

  /** The server does not answer, or not as it should. */
  silence(error) {
    this.brief("bad", error.status ? "not well" : "no answer");
    byId("ring-state").textContent = error.message;
  }

  brief(state, text) {
    byId("show-ring").querySelector(".dot").className = `dot ${state}`;
    byId("brief").textContent = text;
  }

  tell(report) {
    if (report.lost !== this.lost) {
      announce(
        report.lost === null
          ? "The ring is whole again."
          : `Rank ${report.lost} is lost. Answers go on once it is back.`,
      );
    }
    this.lost = report.lost;
  }

  figures(report) {
    const { step, cache } = report;
    const all = (report.running ?? 0) + (report.waiting ?? 0);
    const running = report.lost === null ? (report.running ?? 0) : 0; // without a ring all wait
    const waiting = all - running;
    const [rate, most] = [this.rates.at(-1), Math.max(...this.rates)];
    const ring = step ? step.ring_s / step.seconds : 0;
    return [
      ...figure(
        "Tokens a second",
        curve(this.rates),
        most ? [h("b", {}, rate.toFixed(1)), ` now, ${most.toFixed(1)} at most`] : "none lately",
      ),
      ...figure(
        "A step",
        step &&
          bar([
            ["compute", 1 - ring],
            ["links", ring],
          ]),
        step
          ? [
              h("b", {}, time(step.seconds)),
              ` = computing ${time(step.seconds - step.ring_s)} + ring ${time(step.ring_s)}`,
            ]
          : "none lately",
      ),
      ...figure("Requests", null, [h("b", {}, running), " running · ", h("b", {}, waiting), " waiting"]),
      ...figure(
        "Cache",
        cache &&
          bar([
            ["used", cache.in_use / cache.blocks],
            ["kept", cache.cached / cache.blocks],
          ]),
        cache ? `${cache.in_use} of ${many(cache.blocks, "block")} in use, ${cache.cached} kept` : "unused so far",
      ),
    ];
  }
}

function figure(name, picture, words) {
  return [h("dt", {}, name), h("dd", {}, picture, h("span", { class: "words" }, words))];
}

/** Parts of a whole, side by side; what they are stands beside it in words. */
function bar(parts) {
  const element = h(
    "div",
    { class: "bar-of", "aria-hidden": "true" },
    parts.map(([name]) => h("i", { class: name })),
  );
  parts.forEach(([, share], index) => (element.children[index].style.width = `${(100 * share).toFixed(1)}%`));
  return element;
}

function curve(rates) {
  const most = Math.max(...rates, 1);
  const points = rates.map(
    (rate, index) => `${(REMEMBERED - rates.length + index).toFixed(0)},${(23 - (21 * rate) / most).toFixed(1)}`,
  );
  const attributes = {
    viewBox: `0 0 ${REMEMBERED - 1} 24`,
    preserveAspectRatio: "none",
    class: "curve",
    "aria-hidden": "true",
  };
  return s("svg", attributes, s("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" }));
}

function rankRows(report) {
  const whole = report.ranks.reduce((sum, rank) => sum + rank.weights_bytes, 0) || 1;
  return report.ranks.map((rank) => {
    const share = rank.weights_bytes / whole;
    const lost = rank.rank === report.lost;
    const state = lost ? "bad" : rank.slow ? "warn" : "good";
    const health = lost ? "lost" : rank.slow ? `${rank.slow.toFixed(1)} times slower` : "well";
    return h(
      "li",
      { class: state },
      h(
        "div",
        {},
        h("span", { class: `dot ${state}` }),
        h("b", {}, `Rank ${rank.rank}`),
        h("span", { class: "health" }, health),
      ),
      h("div", { class: "soft" }, [rank.host, rank.device, many(rank.threads, "thread")].filter(Boolean).join(" · ")),
      bar([["used", share]]),
      h(
        "div",
        { class: "soft" },
        `${Math.round(100 * share)}% · ${bytes(rank.weights_bytes)} of weights · ${bytes(rank.peak_bytes)} at most`,
      ),
    );
  });
}

function linkRows(report, busy) {
  return report.links.map((link) => {
    const [one, other] = link.ranks;
    const broken = link.ranks.includes(report.lost);
    const moves = busy && link.there_per_s + link.back_per_s > 0;
    const moved = moves ? `${perSecond(link.there_per_s)} there, ${perSecond(link.back_per_s)} back` : "quiet";
    const trip = link.round_trip_s && !broken ? time(link.round_trip_s) : "";
    return h(
      "li",
      { class: broken ? "bad" : null },
      h(
        "div",
        {},
        h("b", {}, `${one} – ${other}`),
        h("span", { class: "soft" }, broken ? "broken" : moved),
        h("span", { class: "health" }, trip),
      ),
    );
  });
}
