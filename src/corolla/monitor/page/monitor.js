// The monitor's page: it follows /api/live and draws what comes. Everything in it came from strangers, so text is only
// ever set as text, never as markup; nothing is fetched from elsewhere.

const $ = (id) => document.getElementById(id);
const exact = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const MAX_EVENTS = 200;
const FEW_BLOCKS = 130; // whose borders are drawn
const FEW_SERVERS = 40; // that have a row with a name

let picture = null;
let chosen = null; // the id of the model that is shown
let block = 0; // the one that is looked at
let hours = 1;
let order = { key: "span", up: true };

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (className) element.className = className;
  return element;
}

const speed = (value) => (value === null || value === undefined ? "–" : value < 10 ? exact.format(value) : whole.format(Math.round(value)));
const range = (span) => (span ? `${span[0]}:${span[1]}` : "");
const blocks = (span) => (span[1] - span[0] === 1 ? `block ${span[0]}` : `blocks ${range(span)}`);
const called = (server) => server.name || server.peer.slice(0, 8);
const plural = (count, what) => `${whole.format(count)} ${what}${count === 1 ? "" : "s"}`;

function lasting(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

// Keep one element for each key, in order, so that focus and transitions survive an update.
function keep(parent, items, key, create, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let element = known.get(name);
    if (!element) {
      element = create(item);
      element.dataset.key = name;
    }
    known.delete(name);
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
    update(element, item);
  }
  for (const element of known.values()) element.remove();
}

// ---- summary

function drawSummary(model) {
  $("name").textContent = model.name || "A model without a name";
  const verdict = $("verdict");
  const least = Math.min(...model.counts);
  verdict.className = `verdict ${model.missing ? "bad" : "good"}`;
  verdict.textContent = model.missing
    ? `${model.missing} of ${plural(model.blocks, "block")} have no server, so nobody can use the model now.`
    : `Every one of ${plural(model.blocks, "block")} has ${least === 1 ? "a server" : `${least} servers or more`}.`;
  if (!model.missing && least === 1) {
    const single = model.counts.filter((count) => count === 1).length;
    verdict.textContent += single === model.blocks ? " Each hangs on a single one." : ` ${plural(single, "block")} ${single === 1 ? "hangs" : "hang"} on a single one.`;
  }
  $("session").textContent = speed(model.session_tokens_per_s);
  $("total").textContent = speed(model.tokens_per_s);
  $("online").textContent = model.online;
  const others = model.servers_total - model.online;
  $("others").textContent = others ? `and ${others} joining or leaving` : "all there are";
  $("sessions").textContent = whole.format(model.sessions);
  $("room").textContent = `room for ${whole.format(model.free_tokens)} more tokens`;
}

// ---- blocks and servers

function drawMap(model) {
  const best = Math.max(...model.rates, 1e-9);
  const strip = $("strip");
  strip.classList.toggle("many", model.blocks > FEW_BLOCKS);
  block = Math.min(block, model.blocks - 1);
  keep(strip, model.rates.map((rate, index) => ({ rate, index })), (one) => String(one.index), () => make("i"), (cell, one) => {
    cell.className = `${one.rate > 0 ? "" : "hole"} ${one.index === block ? "chosen" : ""}`;
    cell.style.setProperty("--v", Math.round((one.rate / best) * 100));
    cell.title = tellBlock(model, one.index);
  });
  strip.setAttribute("aria-valuemax", model.blocks - 1);
  $("strip-rate").textContent = `${speed(model.tokens_per_s)} tok/s`;
  lookAt(model, block);

  const weak = blocks(model.bottleneck);
  $("bottleneck").textContent = model.missing
    ? `The gap begins at ${weak}.`
    : model.bottleneck[1] - model.bottleneck[0] === model.blocks
      ? `All blocks are alike, at ${speed(model.tokens_per_s)} tokens/s.`
      : `The bottleneck is ${weak}, at ${speed(model.tokens_per_s)} tokens/s.`;

  const fastest = Math.max(...model.servers.map((one) => one.decode_tokens_per_s || 0), 1e-9);
  const spans = $("spans");
  spans.classList.toggle("dense", model.servers.length > FEW_SERVERS);
  keep(spans, model.servers, (one) => one.peer, makeRow, (row, server) => {
    const [who, track, rate] = row.children;
    who.textContent = called(server);
    const bar = track.firstElementChild;
    bar.className = `span ${server.answers === false ? "silent" : server.state}`;
    bar.title = `${called(server)}: ${blocks(server.span)}, ${server.state}`;
    bar.style.left = `${(server.span[0] / model.blocks) * 100}%`;
    bar.style.width = `${((server.span[1] - server.span[0]) / model.blocks) * 100}%`;
    bar.style.setProperty("--v", Math.round(((server.decode_tokens_per_s || 0) / fastest) * 100));
    rate.textContent = server.decode_tokens_per_s ? `${speed(server.decode_tokens_per_s)} tok/s` : "";
  });
  drawNext(model);
}

function makeRow() {
  const row = make("div", null, "row");
  const track = make("div", null, "track");
  track.append(make("span", null, "span"));
  row.append(make("span", null, "who"), track, make("span", null, "rate"));
  return row;
}

function drawNext(model) {
  const next = model.next_server;
  const row = $("next");
  row.hidden = false;
  const bar = row.querySelector(".span");
  bar.style.left = `${(next.span[0] / model.blocks) * 100}%`;
  bar.style.width = `${((next.span[1] - next.span[0]) / model.blocks) * 100}%`;
  const gain = next.after - next.before;
  row.querySelector(".rate").textContent = gain > 0.05 ? `+${speed(gain)} tok/s` : next.fills ? `+${plural(next.fills, "block")}` : "spare";
  const bring = next.fills
    ? `would give ${plural(next.fills, "block")} a server`
    : gain > 0.05
      ? `would lift the whole from ${speed(next.before)} to ${speed(next.after)} tokens/s`
      : "would not make it faster, but safer";
  $("bottleneck").textContent += ` One more server like the usual one here would take ${blocks(next.span)} and ${bring}.`;
}

const tellBlock = (model, index) =>
  `block ${index}: ${model.counts[index] ? plural(model.counts[index], "server") : "no server"}, ${speed(model.rates[index])} tokens/s`;

function lookAt(model, index) {
  block = Math.max(0, Math.min(model.blocks - 1, index));
  const strip = $("strip");
  [...strip.children].forEach((cell, number) => cell.classList.toggle("chosen", number === block));
  const text = tellBlock(model, block);
  strip.setAttribute("aria-valuenow", block);
  strip.setAttribute("aria-valuetext", text);
  $("block").textContent = text;
}

// ---- servers

const COLUMNS = [
  { key: "name", title: "server", value: (one) => called(one).toLowerCase(), draw: drawName, className: "server" },
  { key: "span", title: "blocks", value: (one) => one.span[0] * 1e4 + one.span[1], text: (one) => range(one.span) + (one.next_span ? ` → ${range(one.next_span)}` : "") },
  { key: "state", title: "state", value: (one) => one.state, draw: drawState },
  { key: "precision", title: "precision", value: (one) => one.precision, text: (one) => one.precision },
  { key: "speed", title: "tokens/s", number: true, value: (one) => one.decode_tokens_per_s || 0, text: (one) => speed(one.decode_tokens_per_s) },
  { key: "prompt", title: "prompt", number: true, value: (one) => one.prefill_tokens_per_s || 0, text: (one) => speed(one.prefill_tokens_per_s) },
  { key: "sessions", title: "sessions", number: true, value: (one) => one.sessions, text: (one) => whole.format(one.sessions) },
  { key: "queue", title: "wait", number: true, value: (one) => one.queue_s, text: (one) => (one.queue_s ? `${exact.format(one.queue_s)} s` : "0 s") },
  { key: "free", title: "free tokens", number: true, value: (one) => one.free_tokens, text: (one) => whole.format(one.free_tokens) },
  { key: "rtt", title: "latency", number: true, value: (one) => (one.rtt_s === null ? 1e9 : one.rtt_s), draw: drawLatency },
  { key: "reach", title: "reached", value: (one) => one.reach, text: (one) => one.reach },
  { key: "version", title: "version", value: (one) => one.version, text: (one) => one.version },
  { key: "seen", title: "seen for", number: true, value: (one) => one.seen_s, text: (one) => lasting(one.seen_s) },
];

function drawName(cell, server) {
  cell.replaceChildren(make("b", called(server)));
  if (server.name) cell.append(" ", make("span", server.peer.slice(0, 8), "id"));
  const tags = [...(server.is_relay ? ["relay"] : []), ...server.adapters];
  if (tags.length) cell.append(make("br"), ...tags.map((tag) => make("span", tag, "tag")));
  for (const address of server.addresses || []) cell.append(make("br"), make("span", address, "id"));
}

function drawState(cell, server) {
  const text = { joining: `loading ${Math.round(server.progress * 100)} %`, online: "online", draining: "leaving" }[server.state];
  const moving = server.next_span ? "moving" : text;
  cell.replaceChildren(make("span", moving, `state-${server.state}`));
}

function drawLatency(cell, server) {
  if (server.answers === false) cell.replaceChildren(make("span", "no answer", "bad"));
  else cell.textContent = server.rtt_s === null ? "" : `${exact.format(server.rtt_s * 1000)} ms`;
}

function makeHeads() {
  const row = $("servers").tHead.rows[0];
  for (const column of COLUMNS) {
    const head = make("th", null, column.number ? "number" : "");
    head.scope = "col";
    const button = make("button", column.title);
    button.type = "button";
    button.addEventListener("click", () => {
      order = { key: column.key, up: order.key === column.key ? !order.up : true };
      draw();
    });
    head.append(button);
    row.append(head);
  }
}

function drawServers(model) {
  COLUMNS.forEach((column, index) => {
    const head = $("servers").tHead.rows[0].cells[index];
    if (column.key === order.key) head.setAttribute("aria-sort", order.up ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
  const value = COLUMNS.find((column) => column.key === order.key).value;
  const sorted = [...model.servers].sort((one, other) => {
    const [left, right] = [value(one), value(other)];
    const way = left < right ? -1 : left > right ? 1 : one.peer < other.peer ? -1 : 1;
    return order.up ? way : -way;
  });
  keep($("servers").tBodies[0], sorted, (one) => one.peer, makeServer, (row, server) => {
    COLUMNS.forEach((column, index) => {
      if (column.draw) column.draw(row.cells[index], server);
      else row.cells[index].textContent = column.text(server);
    });
  });
  const more = model.servers_total - model.servers.length;
  $("more").hidden = more <= 0;
  $("more").textContent = `${plural(more, "more server")} not listed.`;
}

function makeServer() {
  const row = make("tr");
  for (const column of COLUMNS) {
    const cell = make("td", null, `${column.number ? "number" : ""} ${column.className || ""}`);
    cell.dataset.label = column.title;
    row.append(cell);
  }
  return row;
}

// ---- links

function drawLinks(model) {
  const names = new Map(model.servers.map((server) => [server.peer, called(server)]));
  const links = model.links.filter((link) => names.has(link.source) && names.has(link.target)).slice(0, 100);
  const create = () => {
    const row = make("tr");
    row.append(make("td"), make("td"), make("td", null, "number"));
    return row;
  };
  keep($("links").tBodies[0], links, (link) => `${link.source} ${link.target}`, create, (row, link) => {
    row.cells[0].textContent = names.get(link.source);
    row.cells[1].textContent = names.get(link.target);
    row.cells[2].textContent = `${exact.format(link.rtt_s * 1000)} ms`;
  });
  $("links").hidden = !links.length;
  $("no-links").hidden = links.length > 0;
}

// ---- what happened

const TOLD = {
  joined: (one) => ` joined, to serve ${blocks(one.span)}`,
  online: (one) => ` takes sessions with ${blocks(one.span)}`,
  moving: (one) => ` is about to move to ${blocks(one.span)}`,
  moved: (one) => ` has moved to ${blocks(one.span)}`,
  draining: () => " is leaving; its sessions may finish",
  drained: () => " has left",
  died: () => " disappeared",
  blind: () => "The monitor sees nothing of the swarm.",
  sighted: () => "The monitor sees the swarm again.",
};

function makeEvent(one) {
  const item = make("li", null, one.what in TOLD ? one.what : "");
  item.dataset.key = `${one.at_s} ${one.what} ${one.peer}`;
  const when = new Date(one.at_s * 1000);
  const time = make("time", when.toLocaleTimeString("en-GB"));
  time.dateTime = when.toISOString();
  time.title = when.toLocaleString();
  const text = make("span");
  if (one.peer) text.append(make("b", called(one)));
  text.append(one.what in TOLD ? TOLD[one.what](one) : ` ${one.what}`);
  item.append(time, text);
  return item;
}

async function loadEvents() {
  const answer = await fetch("api/events?limit=200").catch(() => null);
  if (!answer?.ok) return;
  const events = await answer.json();
  const list = $("events");
  list.replaceChildren(...events.map(makeEvent));
  if (!events.length) list.append(make("li", "Nothing yet, since this monitor looks.", "none"));
}

function addEvent(one) {
  const list = $("events");
  list.querySelector(".none")?.remove();
  const item = makeEvent(one);
  if ([...list.children].some((other) => other.dataset.key === item.dataset.key)) return; // it came with the list
  list.prepend(item);
  while (list.children.length > MAX_EVENTS) list.lastElementChild.remove();
}

// ---- how it was

const CHARTS = [
  { title: "weakest block, tokens/s", value: (one) => one.tokens_per_s },
  { title: "one session, tokens/s", value: (one) => one.session_tokens_per_s || 0 },
  { title: "servers online", value: (one) => one.online },
  { title: "sessions", value: (one) => one.sessions },
];

async function loadHistory() {
  if (!chosen) return;
  const [asked, model] = [hours, chosen];
  const answer = await fetch(`api/history/${model}?hours=${asked}`).catch(() => null);
  if (!answer?.ok || asked !== hours || model !== chosen) return;
  const samples = await answer.json();
  if (!samples.length) setTimeout(loadHistory, 3000); // the monitor has just begun
  $("charts").replaceChildren(...CHARTS.map((chart) => drawChart(chart, samples)));
}

// How far the charts go back: no further than there is something to show.
function spanned(samples) {
  const known = samples.length ? picture.at_s - samples[0].at_s : 0;
  return Math.min(hours * 3600, Math.max(60, known));
}

function drawChart(chart, samples) {
  const figure = make("figure");
  const values = samples.map(chart.value);
  const top = Math.max(...values, 1e-9) * 1.1;
  const caption = make("figcaption", chart.title);
  caption.append(make("b", values.length ? speed(values.at(-1)) : "–"));
  figure.append(caption, drawLine(chart, samples, values, top));
  const times = make("div", null, "times");
  times.append(make("span", `${lasting(spanned(samples))} ago`), make("span", "now"));
  figure.append(times);
  return figure;
}

function drawLine(chart, samples, values, top) {
  const shape = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const least = values.length ? Math.min(...values) : 0;
  const label = values.length ? `${chart.title}: now ${speed(values.at(-1))}, least ${speed(least)}, most ${speed(Math.max(...values))}` : `${chart.title}: nothing yet`;
  const svg = shape("svg", { viewBox: "0 0 600 100", preserveAspectRatio: "none", role: "img", "aria-label": label });
  svg.append(shape("line", { x1: 0, y1: 100, x2: 600, y2: 100, class: "zero" }));
  if (!values.length) return svg;
  const until = picture.at_s, wide_s = spanned(samples);
  const x = (at) => Math.max(0, 600 - ((until - at) / wide_s) * 600).toFixed(1);
  const points = values.map((value, index) => `${x(samples[index].at_s)},${(100 - (value / top) * 100).toFixed(1)}`);
  points.push(`600,${points.at(-1).split(",")[1]}`);
  svg.append(shape("polygon", { class: "area", points: `${points[0].split(",")[0]},100 ${points.join(" ")} 600,100` }));
  svg.append(shape("polyline", { class: "line", points: points.join(" ") }));
  return svg;
}

// ---- all of it

function drawChoice() {
  const select = $("model");
  if (!picture.models.some((model) => model.model === chosen)) {
    chosen = picture.models[0]?.model ?? null;
    loadHistory();
  }
  keep(select, picture.models, (model) => model.model, () => make("option"), (option, model) => {
    option.value = model.model;
    option.textContent = `${model.name} (${plural(model.servers_total, "server")})`;
    option.selected = model.model === chosen;
  });
  $("choice").hidden = picture.models.length < 2;
}

function draw() {
  drawChoice();
  const model = picture.models.find((one) => one.model === chosen);
  document.querySelectorAll("main > .card, main > .two").forEach((part) => part.toggleAttribute("data-empty", !model));
  if (!model) {
    $("name").textContent = "The swarm has no server";
    $("verdict").textContent = "As soon as one joins, it is shown here.";
    $("verdict").className = "verdict";
    for (const id of ["session", "total", "online", "sessions"]) $(id).textContent = "–";
    for (const list of [$("strip"), $("spans"), $("servers").tBodies[0], $("links").tBodies[0]]) list.replaceChildren();
    $("next").hidden = true;
    $("bottleneck").textContent = "";
    return;
  }
  drawSummary(model);
  drawMap(model);
  drawServers(model);
  drawLinks(model);
}

function tellLive(text, kind) {
  if ($("live").textContent !== text) $("live").textContent = text;
  $("live").className = `chip ${kind}`;
}

function follow() {
  const source = new EventSource("api/live");
  source.addEventListener("swarm", (message) => {
    picture = JSON.parse(message.data);
    const isOld = picture.age_s === null || picture.age_s > 10;
    tellLive(isOld ? `not seen for ${lasting(picture.age_s ?? 0)}` : "live", isOld ? "bad" : "good");
    draw();
  });
  source.addEventListener("change", (message) => addEvent(JSON.parse(message.data)));
  source.addEventListener("open", loadEvents);
  source.addEventListener("error", () => {
    tellLive("connection lost, trying again", "bad");
    if (source.readyState === EventSource.CLOSED) setTimeout(follow, 5000);
  });
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function listen() {
  const strip = $("strip");
  const model = () => picture?.models.find((one) => one.model === chosen);
  strip.addEventListener("pointermove", (event) => {
    const box = strip.getBoundingClientRect();
    if (model()) lookAt(model(), Math.floor(((event.clientX - box.left) / box.width) * model().blocks));
  });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: 10, PageDown: -10, Home: -1e6, End: 1e6 }[event.key];
    if (!step || !model()) return;
    event.preventDefault();
    lookAt(model(), block + step);
  });
  $("model").addEventListener("change", (event) => {
    chosen = event.target.value;
    draw();
    loadHistory();
  });
  $("hours").addEventListener("click", (event) => {
    if (!event.target.dataset.hours) return;
    hours = Number(event.target.dataset.hours);
    for (const button of $("hours").children) button.setAttribute("aria-pressed", button === event.target);
    loadHistory();
  });
  $("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", theme);
    setTheme(theme);
  });
}

async function begin() {
  setTheme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  makeHeads();
  listen();
  follow();
  setInterval(loadHistory, 30000);
  const about = await (await fetch("api/about")).json();
  if (about.title) document.title = $("title").textContent = about.title;
  $("about").textContent = `Corolla monitor ${about.version}`;
}

begin();
