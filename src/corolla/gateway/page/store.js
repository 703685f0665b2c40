// Chats and settings, kept in this browser only. A chat is a tree: an edited question or another answer is a branch beside the
// first one, and `chosen` says which is shown below each message ("" for the first).

const request = (made) =>
  new Promise((resolve, reject) => {
    made.onsuccess = () => resolve(made.result);
    made.onerror = () => reject(made.error);
  });

export async function openStore() {
  const opening = indexedDB.open("corolla-chat", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("chats", { keyPath: "id" });
  const base = await request(opening);
  const chats = (mode) => base.transaction("chats", mode).objectStore("chats");
  return {
    all: async () => (await request(chats("readonly").getAll())).sort((a, b) => b.at - a.at),
    save: (chat) => request(chats("readwrite").put(chat)),
    remove: (id) => request(chats("readwrite").delete(id)),
  };
}

export const newChat = () => ({ id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, at: Date.now(), title: "New chat", system: "", nodes: {}, chosen: {} });

export function addMessage(chat, parent, message) {
  const id = String(Object.keys(chat.nodes).length + 1);
  chat.nodes[id] = { id, parent, ...message };
  chat.chosen[parent] = id;
  chat.at = Date.now();
  return chat.nodes[id];
}

export const siblings = (chat, node) => Object.values(chat.nodes).filter((one) => one.parent === node.parent);

// The messages that are shown, from the first on.
export function shown(chat, last = null) {
  const path = [];
  if (last) for (let node = chat.nodes[last]; node; node = chat.nodes[node.parent]) path.unshift(node);
  else for (let id = chat.chosen[""]; id; id = chat.chosen[id]) path.push(chat.nodes[id]);
  return path;
}

const NAMES = ["key", "model", "theme", "temperature", "top_p", "max_tokens", "seed"];

export function loadSettings() {
  return Object.fromEntries(NAMES.map((name) => [name, localStorage.getItem(`corolla-${name}`) ?? ""]));
}

export function saveSettings(settings) {
  for (const name of NAMES) localStorage.setItem(`corolla-${name}`, settings[name]);
}

export function asMarkdown(chat) {
  const system = chat.system ? [`> ${chat.system.replaceAll("\n", "\n> ")}`] : [];
  const said = shown(chat).map((node) => `**${node.role === "user" ? "You" : node.model}**\n\n${node.text}`);
  return [`# ${chat.title}`, ...system, ...said].join("\n\n") + "\n";
}
