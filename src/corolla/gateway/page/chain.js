// The strip beside an answer: which servers compute it, what each takes, and who took the place of whom.

const short = (peer) => peer.slice(0, 8);
const tookMs = (hop) => (hop.compute_ms ?? 0) + (hop.queue_ms ?? 0) + (hop.network_ms ?? 0);

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

// Notes a chain in a message's record, and which servers of the one before it were replaced.
export function noteChain(record, chain, tokens) {
  record.events ??= [];
  if (record.chain?.length && chain.length) {
    const before = new Set(record.chain.map((hop) => hop.peer)), now = new Set(chain.map((hop) => hop.peer));
    const gone = record.chain.filter((hop) => !now.has(hop.peer)), come = chain.filter((hop) => !before.has(hop.peer));
    if (gone.length && come.length) {
      record.events.push({ tokens, gone: gone.map((hop) => hop.peer), come: come.map((hop) => hop.peer) });
    }
  }
  if (chain.length) record.chain = chain;
}

export function drawStrip(strip, record) {
  const fresh = new Set((record.events ?? []).flatMap((one) => one.come));
  const hops = element("ul", "", "hops");
  hops.setAttribute("aria-label", "Servers that compute this answer");
  for (const hop of record.chain ?? []) {
    const item = element("li", "", fresh.has(hop.peer) ? "fresh" : "");
    item.style.flexGrow = Math.sqrt(Math.max(1, tookMs(hop))).toFixed(2); // wider for those that take longer
    item.title = `server ${hop.peer}, blocks ${hop.span[0]} to ${hop.span[1] - 1}`;
    if (hop.compute_ms !== undefined) {
      item.title += `: ${hop.compute_ms} ms computing, ${hop.queue_ms} ms waiting, ${hop.network_ms} ms on the way`;
    }
    const ms = hop.compute_ms === undefined ? "" : ` · ${tookMs(hop).toFixed(1)} ms`;
    item.append(element("b", short(hop.peer)), element("span", `blocks ${hop.span[0]}–${hop.span[1] - 1}${ms}`));
    hops.append(item);
  }
  const events = element("ul", "", "events");
  for (const one of record.events ?? []) {
    const text = `${one.gone.map(short).join(", ")} was lost after ${one.tokens} token${one.tokens === 1 ? "" : "s"}; ${one.come.map(short).join(", ")} went on`;
    events.append(element("li", text));
  }
  const parts = record.chain?.length ? [hops] : [];
  if (record.events?.length) parts.push(events);
  const summary = describe(record);
  if (summary) parts.push(element("p", summary));
  strip.replaceChildren(...parts);
}

function describe(record) {
  const report = record.report;
  if (!report) return "";
  const said = [];
  if (report.tokens_per_s) said.push(`${report.tokens_per_s.toFixed(1)} tokens/s`);
  said.push(`first after ${report.first_token_s.toFixed(2)} s`);
  if (record.usage) said.push(`${record.usage.completion_tokens} tokens`);
  if (report.cached_tokens) said.push(`${report.cached_tokens} of ${record.usage?.prompt_tokens ?? "?"} known already`);
  return said.join(" · ");
}
