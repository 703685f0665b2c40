// The gateway as this page sees it: models, and answers as they come.

export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, key, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The gateway cannot be reached; is it still running?", 0);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Refusal(told?.error?.message ?? `The gateway answered with status ${response.status}.`, response.status);
}

export async function listModels(key) {
  return (await (await call("v1/models", key)).json()).data;
}

// Gives the events of an answer; ends when it does, throws a Refusal if it fails on the way.
export async function* streamAnswer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true, include_chain: true } });
  const response = await call("v1/chat/completions", key, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The connection to the gateway was lost.", 0);
    });
    if (done) throw new Refusal("The answer broke off.", 0);
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const told = JSON.parse(event.slice(6));
      if (told.error) throw new Refusal(told.error.message, 200);
      yield told;
    }
  }
}
