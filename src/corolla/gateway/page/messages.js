// The messages of a chat on the page: each an article, with what can be done to it.

import { drawStrip } from "./chain.js";
import { drawMarkdown } from "./markdown.js";
import { shown, siblings } from "./store.js";

const ICONS = {
  copy: "M7 7V4h9v9h-3M4 7h9v9H4Z",
  edit: "m4 16 .7-3.2L13.5 4l2.5 2.5-8.8 8.8Z",
  again: "M15.5 8A6 6 0 1 0 16 11.5M16 4v4h-4",
  before: "m12 5-5 5 5 5",
  after: "m8 5 5 5-5 5",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(svg.namespaceURI, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export function iconButton(name, label, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "icon";
  button.setAttribute("aria-label", label);
  button.title = label;
  button.append(icon(name));
  button.addEventListener("click", act);
  return button;
}

const block = (name, className, text = "") => Object.assign(document.createElement(name), { className, textContent: text });

// Draws a chat into an element. `acts` is what can be done: choose, edit, again, copy.
export function drawChat(element, chat, acts) {
  element.replaceChildren(...shown(chat).map((node) => drawMessage(chat, node, acts)));
}

function drawMessage(chat, node, acts) {
  const article = block("article", node.role);
  article.dataset.id = node.id;
  article.setAttribute("aria-label", node.role === "user" ? "You" : "Answer");
  if (node.role === "user") article.append(block("div", "said", node.text));
  else {
    article.append(block("div", "strip"), block("div", "text"));
    updateAnswer(article, node);
  }
  article.append(drawTools(chat, node, acts));
  return article;
}

// Brings the article of an answer up to date with what has come of it.
export function updateAnswer(article, node) {
  article.classList.toggle("writing", node.state === "writing");
  article.setAttribute("aria-busy", String(node.state === "writing"));
  drawStrip(article.querySelector(".strip"), node);
  drawMarkdown(article.querySelector(".text"), node.text);
  article.querySelector(".failure")?.remove();
  if (node.failure) article.querySelector(".text").after(block("p", "failure", node.failure));
}

function drawTools(chat, node, acts) {
  const tools = block("div", "tools");
  const all = siblings(chat, node), at = all.indexOf(node);
  if (all.length > 1) {
    const branch = block("span", "branch");
    const step = (by) => () => acts.choose(all[(at + by + all.length) % all.length]);
    const what = node.role === "user" ? "version" : "answer";
    branch.append(iconButton("before", `Earlier ${what}`, step(-1)), `${at + 1} / ${all.length}`, iconButton("after", `Later ${what}`, step(1)));
    tools.append(branch);
  }
  tools.append(iconButton("copy", "Copy", () => acts.copy(node)));
  if (node.role === "user") tools.append(iconButton("edit", "Edit", () => edit(node, acts)));
  else tools.append(iconButton("again", "Answer again", () => acts.again(node)));
  if (node.role === "assistant" && node.state === "stopped") tools.append(" stopped");
  if (node.role === "assistant" && node.state === "length") tools.append(" the longest answer allowed");
  return tools;
}

function edit(node, acts) {
  const article = document.querySelector(`article[data-id="${node.id}"]`);
  const form = block("form", "edit"), area = block("textarea", ""), row = block("div", "actions");
  area.value = node.text;
  area.rows = Math.min(12, node.text.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit your message");
  const cancel = Object.assign(block("button", "", "Cancel"), { type: "button" });
  row.append(cancel, block("button", "primary", "Send"));
  form.append(area, row);
  const close = () => form.replaceWith(...kept);
  const kept = [...article.childNodes];
  article.replaceChildren(form);
  cancel.addEventListener("click", close);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (area.value.trim()) acts.edit(node, area.value.trim());
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
      article.querySelector('[aria-label="Edit"]').focus();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  area.focus();
}
