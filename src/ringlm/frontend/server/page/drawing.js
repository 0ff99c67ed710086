// The ring as a picture: a circle of ranks, each with an arc as long as its share, and links as wide as what they
// carry. Made once for a number of ranks, then changed as reports come. Knows reports, no server.

import { s } from "./dom.js";
import { perSecond, time } from "./units.js";

const [X, Y, RADIUS] = [170, 128, 92];
const MOST_LABELS = 4; // more ranks than these have their links in the list only

export class Drawing {
  constructor(svg) {
    this.svg = svg;
    this.ranks = 0;
  }

  /** `number` and its `unit` stand in the middle. Links move while the ring is `busy`. */
  update(report, busy, number, unit) {
    if (report.ranks.length !== this.ranks) this.make(report.ranks.length);
    const lost = report.lost;
    const whole = report.ranks.reduce((sum, rank) => sum + rank.weights_bytes, 0) || 1;
    for (const rank of report.ranks) {
      const node = this.nodes[rank.rank];
      node.group.setAttribute("class", `node ${rank.rank === lost ? "lost" : rank.slow ? "slow" : "well"}`);
      node.arc.setAttribute("stroke-dasharray", `${(100 * rank.weights_bytes) / whole} 100`);
      node.device.textContent = rank.rank === lost ? "lost" : rank.device;
    }
    for (const link of this.links) {
      const told = report.links.find(({ ranks: [one, other] }) => one === link.ranks[0] && other === link.ranks[1]);
      const rates = told && {
        there: told.there_per_s,
        back: told.back_per_s,
        both: told.there_per_s + told.back_per_s,
      };
      const rate = busy && told ? rates[link.way] : 0;
      const broken = link.ranks.includes(lost);
      link.path.setAttribute("class", `link ${broken ? "broken" : rate > 0 ? "flows" : "still"}`);
      link.path.style.strokeWidth = width(rate);
      if (link.label) {
        const trip = told?.round_trip_s && link.way === "both" ? time(told.round_trip_s) : "";
        const [first, second] = link.label.children;
        first.textContent = broken ? "" : rate ? perSecond(rate) : trip;
        second.textContent = broken || !rate ? "" : trip;
      }
    }
    this.trip.textContent = this.ranks === 2 && lost === null ? roundTrip(report) : "";
    this.number.textContent = number;
    this.unit.textContent = unit;
    this.number.setAttribute("class", lost === null ? "number" : "number lost");
    this.title.textContent = `A ring of ${this.ranks} ${this.ranks === 1 ? "rank" : "ranks"}; the lists below say the same.`;
  }

  make(count) {
    this.ranks = count;
    const size = count <= 4 ? 30 : count <= 8 ? 23 : Math.max(9, 200 / count);
    const places = upTo(count).map((rank) => place(angle(rank, count)));
    this.links = [];
    const paths = [];
    for (const [one, other] of pairs(count)) {
      const near = other - one === 1 || (one === 0 && other === count - 1);
      const ways = count === 2 ? ["there", "back"] : ["both"];
      for (const way of ways) {
        const path = s("path", { d: near ? arc(one, other, count, way) : chord(places[one], places[other]) });
        const label = near && count <= MOST_LABELS ? this.label(one, other, count, way) : null;
        this.links.push({ ranks: [one, other], way, path, label });
        paths.push(path, ...(label ? [label] : []));
      }
    }
    this.nodes = places.map(([x, y], rank) => {
      const device = s("text", { y: 15, class: "device" });
      const share = s("circle", { r: size, pathLength: 100, class: "share", transform: "rotate(-90)" });
      const lines = [s("text", { y: size > 20 ? 2 : 5, class: "rank" }, String(rank)), ...(size > 20 ? [device] : [])];
      const group = s(
        "g",
        { transform: `translate(${x} ${y})` },
        s("circle", { r: size, class: "body" }),
        share,
        ...lines,
        s("circle", { cx: size * 0.72, cy: -size * 0.72, r: Math.max(3.5, size / 6), class: "health" }),
      );
      return { group, arc: share, device };
    });
    this.number = s("text", { x: X, y: Y + 4, class: "number" });
    this.unit = s("text", { x: X, y: Y + 21, class: "unit" });
    this.trip = s("text", { x: X, y: Y + 38, class: "unit" });
    this.title = s("title");
    const hole = count > 3 ? [s("circle", { cx: X, cy: Y + 6, r: 40, class: "hole" })] : [];
    const nodes = this.nodes.map((node) => node.group);
    this.svg.replaceChildren(this.title, ...paths, ...hole, this.number, this.unit, this.trip, ...nodes);
  }

  /** Two lines beside the middle of a link between neighbours. */
  label(one, other, count, way) {
    if (count === 2) {
      const y = way === "there" ? Y - RADIUS - 9 : Y + RADIUS + 18;
      return s("text", { x: X, y, class: "label" }, s("tspan"), s("tspan"));
    }
    const [x, y] = place(between(one, other, count), RADIUS + 10);
    const anchor = Math.abs(x - X) < 5 ? "middle" : x > X ? "start" : "end";
    return s(
      "text",
      { x, y: y > Y + RADIUS ? y + 8 : y - 2, class: "label", "text-anchor": anchor },
      s("tspan", { x }),
      s("tspan", { x, dy: 13 }),
    );
  }
}

const roundTrip = (report) => {
  const trip = report.links[0]?.round_trip_s;
  return trip ? `${time(trip)} there and back` : "";
};

/** In radians; rank 0 is at the top, but of two the left one. */
const angle = (rank, count) => (2 * Math.PI * rank) / count - (count === 2 ? Math.PI : Math.PI / 2);
const place = (at, radius = RADIUS) => [X + radius * Math.cos(at), Y + radius * Math.sin(at)];
const upTo = (count) => [...Array(count).keys()];
const pairs = (count) => upTo(count).flatMap((other) => upTo(other).map((one) => [one, other]));

function between(one, other, count) {
  const far = one === 0 && other === count - 1 && count > 2;
  return angle(far ? other + 0.5 : one + 0.5, count);
}

function arc(one, other, count, way) {
  const far = one === 0 && other === count - 1 && count > 2;
  const [from, to] = far ? [other, one] : way === "back" ? [other, one] : [one, other];
  const [[x, y], [endX, endY]] = [place(angle(from, count)), place(angle(to, count))];
  return `M${x} ${y}A${RADIUS} ${RADIUS} 0 0 1 ${endX} ${endY}`;
}

const chord = ([x, y], [endX, endY]) => `M${x} ${y}L${endX} ${endY}`;

/** In pixels: a step more for ten times as much. */
const width = (rate) => (rate > 0 ? Math.min(7, 1.5 + Math.max(0, Math.log10(rate / 1e4))) : 1.5);
