// Markdown as models write it, made into elements: headings, lists, tables, quotes, code, emphasis, links. HTML in it
// stays text, links lead to http, https and mailto only, and pictures are links: nothing is fetched, nothing runs.

import { copyButton, h } from "./dom.js";

const DEEPEST = 12; // lists and quotes within each other; what is deeper is text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const DIVIDER = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;
// Spans are bounded, so that no text takes long: each opening looks ahead so far at most.
const INLINE = new RegExp(
  [
    /(?<ticks>`+)(?!`)(?<code>[\s\S]{1,600}?)(?<!`)\k<ticks>(?!`)/,
    /\\(?<escaped>[\\`*_{}[\]()#+.!|~<>-])/,
    /!?\[(?<label>[^[\]]{0,500})\]\((?<href>[^()\s]{0,2000}(?:\([^()\s]{0,500}\)[^()\s]{0,500})?)(?:\s+"[^"]{0,500}")?\)/,
    /\*\*(?!\s)(?<strong>[\s\S]{1,600}?)(?<!\s)\*\*(?!\*)/,
    /(?<!\w)__(?!\s)(?<strong2>[\s\S]{1,600}?)(?<!\s)__(?!\w)/,
    /\*(?![\s*])(?<em>[\s\S]{1,600}?)(?<![\s*])\*(?!\*)/,
    /(?<!\w)_(?![\s_])(?<em2>[\s\S]{1,600}?)(?<![\s_])_(?!\w)/,
    /~~(?!\s)(?<gone>[\s\S]{1,600}?)(?<!\s)~~/,
    /(?<url>https?:\/\/[^\s<>()"'`]{0,2000}[^\s<>()"'`.,;:!?\]*_~])/,
  ]
    .map((each) => each.source)
    .join("|"),
  "g",
);

/** Draws a text that grows into `parent`: only blocks that have changed are made anew. */
export class Markdown {
  constructor(parent) {
    this.parent = parent;
    this.blocks = [];
  }

  show(text) {
    const found = split(text.split("\n"));
    const parents = this.parent.childNodes;
    let same = 0;
    while (same < this.blocks.length && same < found.length && this.blocks[same] === key(found[same])) same += 1;
    while (parents.length > same) this.parent.lastChild.remove();
    this.parent.append(...found.slice(same).map((block) => draw(block, 0)));
    this.blocks = found.map(key);
  }
}

const key = (block) => [block.kind, block.language, ...block.lines].join("\n");

/** Lines as blocks of {kind, lines}; a block of code has its `language`. */
function split(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    let end = at + 1;
    if (!line.trim()) {
      at = end;
      continue;
    }
    let kind = "text";
    if (fence) {
      kind = "code";
      while (end < lines.length && !closes(lines[end], fence[1])) end += 1;
      blocks.push({ kind, language: fence[2].trim(), lines: lines.slice(at + 1, end) });
      at = end + 1;
      continue;
    }
    if (HEADING.test(line)) kind = "heading";
    else if (RULE.test(line)) kind = "rule";
    else if (QUOTE.test(line)) {
      kind = "quote";
      while (end < lines.length && lines[end].trim() && !(begins(lines[end]) && !QUOTE.test(lines[end]))) end += 1;
    } else if (ITEM.test(line)) {
      kind = "list";
      end = listEnd(lines, at);
    } else if (line.includes("|") && DIVIDER.test(lines[end] ?? "")) {
      kind = "table";
      while (end < lines.length && lines[end].includes("|")) end += 1;
    } else {
      while (end < lines.length && lines[end].trim() && !begins(lines[end])) end += 1;
    }
    blocks.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return blocks;
}

const closes = (line, fence) => new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`).test(line);
const begins = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((each) => each.test(line));
const indent = (line) => line.length - line.trimStart().length;

/** Where a list that begins at `start` ends: before what is neither an item nor indented, unless it just goes on. */
function listEnd(lines, start) {
  const base = indent(lines[start]);
  let end = start + 1;
  let fence = null;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (fence) {
      if (closes(line.trimStart(), fence)) fence = null;
      continue;
    }
    if (!line.trim()) continue;
    const belongs = indent(line) > base || (ITEM.test(line) && !RULE.test(line));
    if (!belongs && (begins(line) || !lines[end - 1].trim())) break;
    if (belongs) fence = FENCE.exec(line.trimStart())?.[1] ?? null;
  }
  while (!lines[end - 1].trim()) end -= 1;
  return end;
}

function draw(block, depth) {
  const { kind, lines } = block;
  if (kind === "code") return code(block);
  if (kind === "rule") return h("hr");
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return h(`h${Math.min(6, marks.length + 2)}`, {}, inline(text)); // the page's own are h1 and h2
  }
  if (kind === "table") return table(lines);
  if (depth < DEEPEST && kind === "quote") {
    return h(
      "blockquote",
      {},
      within(
        lines.map((line) => line.replace(QUOTE, "")),
        depth,
      ),
    );
  }
  if (depth < DEEPEST && kind === "list") return list(lines, depth);
  return h("p", {}, inline(lines.map((line) => line.trim()).join("\n")));
}

const within = (lines, depth) => split(lines).map((block) => draw(block, depth + 1));

function list(lines, depth) {
  const base = indent(lines[0]);
  const [, , marker] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(marker);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= base + 1) items.push({ by: item[0].length, lines: [line.slice(item[0].length)] });
    else items.at(-1).lines.push(line.slice(Math.min(indent(line), items.at(-1).by)));
  }
  const drawn = items.map(({ lines }) => {
    const blocks = within(lines, depth);
    const tight = blocks.filter((block) => block.tagName === "P").length <= 1;
    return h("li", {}, tight && blocks[0]?.tagName === "P" ? [...blocks[0].childNodes, ...blocks.slice(1)] : blocks);
  });
  return h(ordered ? "ol" : "ul", { start: ordered && parseInt(marker) !== 1 ? parseInt(marker) : null }, drawn);
}

function table(lines) {
  const rows = lines.map((line) =>
    line
      .trim()
      .replace(/^\||(?<!\\)\|$/g, "")
      .split(/(?<!\\)\|/)
      .map((cell) => cell.trim().replaceAll("\\|", "|")),
  );
  const sides = rows[1].map((cell) => (/^:-+:$/.test(cell) ? "center" : /-:$/.test(cell) ? "right" : null));
  const row = (tag) => (cells) =>
    h(
      "tr",
      {},
      rows[0].map((_, index) => h(tag, { class: sides[index] }, inline(cells[index] ?? ""))),
    );
  const body = h("table", {}, h("thead", {}, row("th")(rows[0])), h("tbody", {}, rows.slice(2).map(row("td"))));
  return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, body);
}

function code({ language, lines }) {
  const text = lines.join("\n");
  return h(
    "figure",
    { class: "code" },
    h(
      "figcaption",
      {},
      h("span", {}, language || "text"),
      copyButton("Copy the code", () => text),
    ),
    h("pre", { tabindex: "0" }, h("code", {}, text)),
  );
}

/** Text with emphasis, code and links, as nodes. */
function inline(text, depth = 0) {
  const nodes = [];
  const plain = (part) =>
    part.split("\n").forEach((line, index) => nodes.push(...(index ? [h("br")] : []), ...(line ? [line] : [])));
  let at = 0;
  for (const match of depth < DEEPEST ? text.matchAll(INLINE) : []) {
    plain(text.slice(at, match.index));
    at = match.index + match[0].length;
    const found = match.groups;
    const wrap = (tag, inner) => nodes.push(h(tag, {}, inline(inner, depth + 1)));
    const strong = found.strong ?? found.strong2;
    const em = found.em ?? found.em2;
    if (found.code !== undefined) nodes.push(h("code", {}, found.code.replace(/^ (.*\S.*) $/s, "$1")));
    else if (found.escaped !== undefined) nodes.push(found.escaped);
    else if (strong !== undefined) wrap("strong", strong);
    else if (em !== undefined) wrap("em", em);
    else if (found.gone !== undefined) wrap("del", found.gone);
    else if (found.url !== undefined) nodes.push(link(found.url, [found.url]));
    else nodes.push(link(found.href, found.label ? inline(found.label, depth + 1) : [found.href]));
  }
  plain(text.slice(at));
  return nodes;
}

function link(href, label) {
  if (!/^(https?:\/\/|mailto:)/i.test(href)) return h("span", {}, label);
  return h("a", { href, target: "_blank", rel: "noopener noreferrer" }, label);
}
