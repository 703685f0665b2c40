// Markdown to elements. Text becomes text nodes and nothing else, so that nothing a model writes can run. A text that is still
// being written is drawn again and again: only blocks that have changed are made anew.

const FENCE = /^ {0,3}(```+|~~~+) *([\w+#.-]*)/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const DIVIDER = /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$/;

export function drawMarkdown(element, text) {
  const blocks = cut(text);
  blocks.forEach((block, index) => {
    const old = element.children[index];
    if (old && old.source === block.source) return;
    const made = block.make();
    made.source = block.source;
    if (old) old.replaceWith(made);
    else element.append(made);
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
}

function make(name, content = [], properties = {}) {
  const element = document.createElement(name);
  Object.assign(element, properties);
  element.append(...[content].flat());
  return element;
}

function cut(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  const take = (end, draw) => {
    const own = lines.slice(at, end);
    blocks.push({ source: own.join("\n"), make: () => draw(own) });
    at = end;
  };
  const until = (start, is_over) => {
    let end = start;
    while (end < lines.length && !is_over(lines[end], end)) end += 1;
    return end;
  };
  while (at < lines.length) {
    const line = lines[at], fence = line.match(FENCE);
    if (!line.trim()) at += 1;
    else if (fence) {
      const closing = until(at + 1, (one) => one.trim().startsWith(fence[1]) && !one.trim().replaceAll(fence[1][0], ""));
      take(Math.min(closing + 1, lines.length), (own) => drawCode(own.slice(1, closing < lines.length ? -1 : undefined), fence[2]));
    } else if (/^#{1,6} /.test(line)) take(at + 1, drawHeading);
    else if (RULE.test(line)) take(at + 1, () => make("hr"));
    else if (/^ {0,3}>/.test(line)) take(until(at, (one) => !/^ {0,3}>/.test(one)), drawQuote);
    else if (ITEM.test(line)) take(until(at + 1, (one, index) => endsList(one, lines[index + 1])), drawList);
    else if (line.includes("|") && DIVIDER.test(lines[at + 1] ?? "")) take(until(at + 2, (one) => !one.includes("|")), drawTable);
    else take(until(at + 1, startsBlock), (own) => make("p", inline(own.join("\n"))));
  }
  return blocks;
}

const startsBlock = (line) => !line.trim() || FENCE.test(line) || /^#{1,6} /.test(line) || /^ {0,3}>/.test(line) || ITEM.test(line) || RULE.test(line);
const endsList = (line, next) => (line.trim() ? !/^\s/.test(line) && startsBlock(line) && !ITEM.test(line) : !(next && (ITEM.test(next) || /^ {2,}\S/.test(next))));

function drawHeading([line]) {
  const [, marks, text] = line.match(/^(#{1,6}) +(.*?)#* *$/);
  return make(`h${Math.min(marks.length + 2, 5)}`, inline(text));
}

function drawQuote(lines) {
  const quote = make("blockquote");
  drawMarkdown(quote, lines.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n"));
  return quote;
}

function drawCode(lines, language) {
  const text = lines.join("\n");
  const copy = make("button", "Copy", { type: "button" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  const head = make("div", [make("span", language || "code"), copy], { className: "code-head" });
  const body = make("pre", make("code", text), { tabIndex: 0 });
  return make("div", [head, body], { className: "code" });
}

function drawList(lines) {
  const first = lines[0].match(ITEM), indent = first[1].length, is_ordered = /\d/.test(first[2]);
  const list = make(is_ordered ? "ol" : "ul");
  if (is_ordered && parseInt(first[2], 10) !== 1) list.start = parseInt(first[2], 10);
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent + 1) items.push([item[3]]);
    else items.at(-1).push(line.replace(/^ {1,4}/, ""));
  }
  for (const [head, ...rest] of items) {
    const item = make("li", inline(head));
    const below = rest.join("\n").trim() ? make("div") : null;
    if (below) {
      drawMarkdown(below, rest.join("\n"));
      item.append(...below.childNodes);
    }
    list.append(item);
  }
  return list;
}

function drawTable([head, , ...rows]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => inline(cell.trim().replaceAll("\\|", "|")));
  const row = (line, name) => make("tr", cells(line).map((cell) => make(name, cell)));
  const table = make("table", [make("thead", row(head, "th")), make("tbody", rows.map((line) => row(line, "td")))]);
  return make("div", table, { className: "table", tabIndex: 0 });
}

// What stands within a line, the first that fits; each draws its own inside.
const INLINE = [
  [/^(`+)([^]*?[^`])\1(?!`)/, (found) => make("code", found[2].replace(/^ (.*) $/, "$1"))],
  [/^\*\*(?=\S)([^]*?\S)\*\*/, (found) => make("strong", inline(found[1]))],
  [/^__(?=\S)([^]*?\S)__(?!\w)/, (found) => make("strong", inline(found[1]))],
  [/^~~(?=\S)([^]*?\S)~~/, (found) => make("del", inline(found[1]))],
  [/^\*(?=[^\s*])([^*]*?[^\s*])\*(?!\*)/, (found) => make("em", inline(found[1]))],
  [/^_(?=[^\s_])([^_]*?[^\s_])_(?!\w)/, (found) => make("em", inline(found[1]))],
  [/^\[([^\]]+)\]\((https?:\/\/[^\s)]+|mailto:[^\s)]+)\)/, (found) => link(found[2], inline(found[1]))],
  [/^https?:\/\/[^\s<>"]*[^\s<>".,;:!?)\]]/, (found) => link(found[0], found[0])],
  [/^\\([\\`*_{}[\]()#+\-.!|~>])/, (found) => found[1]],
  [/^(?: {2,}|\\)\n/, () => make("br")],
];

const link = (address, content) => make("a", content, { href: address, rel: "noopener noreferrer", target: "_blank" });

function inline(text) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(plain);
    plain = "";
  };
  for (let at = 0; at < text.length; ) {
    const rest = text.slice(at), is_inside = /\w/.test(text[at - 1] ?? "");
    const hit = /[`*_~[\\h ]/.test(text[at]) && INLINE.map(([mark, draw]) => [rest.match(mark), draw]).find(([found]) => found);
    if (hit && !(is_inside && (text[at] === "_" || text[at] === "h"))) {
      flush();
      nodes.push(hit[1](hit[0]));
      at += hit[0][0].length;
    } else {
      plain += text[at];
      at += 1;
    }
  }
  flush();
  return nodes;
}
