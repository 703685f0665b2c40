// The chat page: what happens when. It asks the gateway like any other client; chats never leave this browser otherwise.

import { listModels, Refusal, streamAnswer } from "./api.js";
import { noteChain } from "./chain.js";
import { drawChat, iconButton, updateAnswer } from "./messages.js";
import { addMessage, asMarkdown, loadSettings, newChat, openStore, saveSettings, shown } from "./store.js";

const at = (id) => document.getElementById(id);
const settings = loadSettings();
const store = await openStore();
let chats = await store.all();
let chat = chats[0] ?? newChat();
let running = null; // the answer that is being written: its chat, its message, and how to stop it

const acts = {
  choose(node) {
    chat.chosen[node.parent] = node.id;
    keep(chat);
    draw();
  },
  edit(node, text) {
    if (!running) ask(text, node.parent);
  },
  again(node) {
    if (!running) answer(node.parent);
  },
  copy: (node) => navigator.clipboard.writeText(node.text).then(() => say("Copied")),
};

// Drawing

function draw() {
  at("title").textContent = chat.title;
  at("welcome").hidden = Object.keys(chat.nodes).length > 0;
  drawChat(at("messages"), chat, acts);
  drawChats();
  const is_busy = running !== null;
  at("send").hidden = is_busy;
  at("stop").hidden = !is_busy;
}

function drawChats() {
  const items = chats.map((one) => {
    const item = document.createElement("li");
    const open = Object.assign(document.createElement("button"), { type: "button", className: "open", textContent: one.title });
    open.addEventListener("click", () => show(one));
    if (one === chat) {
      item.className = "now";
      open.setAttribute("aria-current", "true");
    }
    const remove = iconButton("copy", `Delete ${one.title}`, () => forget(one));
    remove.classList.add("delete");
    remove.querySelector("path").setAttribute("d", "M4 6h12M8 6V4h4v2M6 6l.7 10h6.6L14 6");
    item.append(open, remove);
    return item;
  });
  at("chats").replaceChildren(...items);
}

const isAtEnd = () => at("main").scrollHeight - at("main").scrollTop - at("main").clientHeight < 80;
const scrollToEnd = () => at("main").scrollTo({ top: at("main").scrollHeight });
const say = (text) => (at("spoken").textContent = text);

function complain(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

// Chats

async function keep(one) {
  if (!chats.includes(one)) chats = [one, ...chats];
  await store.save(one);
}

function show(one) {
  chat = one;
  closeDrawer();
  draw();
  scrollToEnd();
  at("question").focus();
}

async function forget(one) {
  if (!confirm(`Delete "${one.title}"?`)) return;
  if (running?.chat === one) running.stop();
  chats = chats.filter((other) => other !== one);
  await store.remove(one.id);
  if (one === chat) chat = chats[0] ?? newChat();
  draw();
}

// Asking

function ask(text, parent) {
  if (!Object.keys(chat.nodes).length) chat.title = text.length > 120 ? `${text.slice(0, 117)}…` : text;
  answer(addMessage(chat, parent, { role: "user", text }).id);
}

async function answer(parent) {
  const own = chat, controller = new AbortController();
  const messages = shown(own, parent).map((node) => ({ role: node.role, content: node.text }));
  if (own.system) messages.unshift({ role: "system", content: own.system });
  const node = addMessage(own, parent, { role: "assistant", text: "", state: "writing", model: at("model").value });
  running = { chat: own, node, stop: () => controller.abort() };
  complain("");
  const keeping = keep(own);
  draw();
  scrollToEnd();
  say("The answer is being written");
  await keeping;
  const progress = watch(own, node);
  try {
    await receive(node, { model: node.model, messages, ...sampling() }, controller.signal);
  } catch (error) {
    if (error.name === "AbortError") node.state = "stopped";
    else if (error instanceof Refusal) refuse(node, error);
    else throw error;
  } finally {
    progress.end();
    running = null;
    await keep(own);
    draw();
    say({ failed: "The answer failed", stopped: "The answer was stopped" }[node.state] ?? "The answer is complete");
    at("question").focus();
  }
}

async function receive(node, request, signal) {
  let tokens = 0;
  for await (const event of streamAnswer(request, settings.key, signal)) {
    if (event.usage) node.usage = event.usage;
    const choice = event.choices[0];
    if (!choice) continue;
    if (choice.delta.content) {
      node.text += choice.delta.content;
      tokens += 1;
    }
    if (choice.corolla?.chain) noteChain(node, choice.corolla.chain, tokens);
    if (choice.finish_reason) {
      node.state = choice.finish_reason;
      node.report = choice.corolla;
    }
  }
}

function refuse(node, error) {
  node.state = "failed";
  node.failure = error.message;
  if (error.status === 401) at("settings-dialog").showModal();
}

// Shows what has come of an answer once a frame, keeps it once a second, and says when nothing comes.
function watch(own, node) {
  const QUIET_MS = 1500;
  let seen = "", changed_at = performance.now(), kept_at = changed_at, is_over = false;
  const step = () => {
    if (is_over) return;
    const now = performance.now(), state = `${node.text.length} ${JSON.stringify(node.chain)} ${node.events?.length}`;
    const article = own === chat && document.querySelector(`article[data-id="${node.id}"]`);
    if (state !== seen) {
      seen = state;
      changed_at = now;
      if (article) {
        const follows = isAtEnd();
        updateAnswer(article, node);
        if (follows) scrollToEnd();
      }
    }
    if (article) article.classList.toggle("waiting", now - changed_at > QUIET_MS);
    if (now - kept_at > 1000) {
      kept_at = now;
      keep(own);
    }
    setTimeout(() => requestAnimationFrame(step), document.hidden ? 500 : 0);
  };
  step();
  return { end: () => (is_over = true) };
}

function sampling() {
  const names = ["temperature", "top_p", "max_tokens", "seed"];
  return Object.fromEntries(names.filter((name) => settings[name] !== "").map((name) => [name, Number(settings[name])]));
}

// The question

function fit() {
  const area = at("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
  at("send").disabled = !area.value.trim();
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("question").value.trim();
  if (!text || running) return;
  if (!at("model").value) return void complain("No model can be asked; see the settings.");
  at("question").value = "";
  fit();
  ask(text, shown(chat).at(-1)?.id ?? "");
});
at("question").addEventListener("input", fit);
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("composer").requestSubmit();
});
at("stop").addEventListener("click", () => running?.stop());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (at("drawer").classList.contains("open")) closeDrawer();
  else running?.stop();
});
window.addEventListener("pagehide", () => running && keep(running.chat));

// The drawer, on narrow screens

function closeDrawer() {
  at("drawer").classList.remove("open");
  at("veil").hidden = true;
  at("menu").setAttribute("aria-expanded", "false");
}

at("menu").addEventListener("click", () => {
  at("drawer").classList.add("open");
  at("veil").hidden = false;
  at("menu").setAttribute("aria-expanded", "true");
  at("new").focus();
});
at("veil").addEventListener("click", closeDrawer);
at("new").addEventListener("click", () => show(newChat()));

// Settings, theme, export

const listed = (models) => models.map((one) => new Option(one.id.split("/").at(-1), one.id));

async function loadModels() {
  try {
    const models = await listModels(settings.key);
    const able = models.filter((one) => one.corolla?.can_chat !== false), names = able.map((one) => one.id);
    at("model").replaceChildren(...listed(able.filter((one) => !one.corolla?.adapter)));
    const adapted = listed(able.filter((one) => one.corolla?.adapter));
    if (adapted.length) {
      const group = Object.assign(document.createElement("optgroup"), { label: "With an adapter" });
      group.append(...adapted);
      at("model").append(group);
    }
    if (names.includes(settings.model)) at("model").value = settings.model;
    complain(names.length ? "" : "None of the models here was made to chat.");
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    complain(error.message);
    if (error.status === 401) at("settings-dialog").showModal();
  }
}

at("model").addEventListener("change", () => {
  settings.model = at("model").value;
  saveSettings(settings);
});
at("settings").addEventListener("click", () => {
  for (const name of ["key", "temperature", "top_p", "max_tokens", "seed"]) at(name).value = settings[name];
  at("system").value = chat.system;
  at("settings-dialog").showModal();
});
at("settings-dialog").addEventListener("close", () => {
  const had_key = settings.key;
  for (const name of ["key", "temperature", "top_p", "max_tokens", "seed"]) {
    if (at(name).checkValidity()) settings[name] = at(name).value.trim();
  }
  saveSettings(settings);
  chat.system = at("system").value.trim();
  if (chats.includes(chat)) keep(chat);
  if (settings.key !== had_key || !at("model").value) loadModels();
});

function wear(theme) {
  document.documentElement.dataset.theme = theme;
  at("theme").setAttribute("aria-label", theme === "dark" ? "Light theme" : "Dark theme");
}

at("theme").addEventListener("click", () => {
  settings.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  saveSettings(settings);
  wear(settings.theme);
});

at("export").addEventListener("click", () => {
  at("export-dialog").returnValue = "";
  at("export-dialog").showModal();
});
at("export-dialog").addEventListener("close", () => {
  const kind = at("export-dialog").returnValue;
  if (!kind) return;
  const text = kind === "json" ? JSON.stringify(chat, null, 2) : asMarkdown(chat);
  const name = chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "chat";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind === "json" ? "application/json" : "text/markdown" }));
  link.download = `${name}.${kind === "json" ? "json" : "md"}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});

// The beginning

const given = new URLSearchParams(location.hash.slice(1)).get("key"); // as corolla gateway prints it; never sent anywhere
if (given) {
  settings.key = given;
  saveSettings(settings);
  history.replaceState(null, "", location.pathname);
}
for (const one of chats) {
  for (const node of Object.values(one.nodes)) if (node.state === "writing") node.state = "stopped"; // when the page was left
}
wear(settings.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
draw();
fit();
scrollToEnd();
await loadModels();
document.body.dataset.ready = "true";
