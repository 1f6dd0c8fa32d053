"use strict";
const el = id => document.getElementById(id);
const messages = [];
let abort = null;

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function say(kind, text) {
  const p = document.createElement("p");
  p.className = kind;
  p.textContent = text;
  el("turns").append(p);
  p.scrollIntoView({ block: "nearest" });
  return p;
}

async function refusal(response) {
  el("key-field").hidden = el("key-field").hidden && response.status !== 401;
  try { return (await response.json()).error.message; } catch { return `${response.status} ${response.statusText}`; }
}

// Figures

const megabytes = n => n === undefined ? "?" : `${(n / 1e6).toFixed(1)} MB`;
const share = (part, all) => `${(100 * part / all).toFixed(1)}%`;

function showFigures(status) {
  const f = status.figures, running = f.cache_cells_used - f.cache_cells_kept;
  el("model").textContent = status.model;
  document.title = `${status.model} - EdgeKV`;
  el("state").textContent = f.up ? status.name + (status.kernel === "edgekv" ? ", EdgeKV's kernel" : "") : "the engine is being started again";
  el("cache").textContent = `${share(f.cache_cells_used, f.cache_cells)} of ${megabytes(f.cache_bytes)}`;
  el("running-bar").style.width = share(running, f.cache_cells);
  el("kept-bar").style.width = share(f.cache_cells_kept, f.cache_cells);
  el("cells").textContent = `${running} tokens in use + ${f.cache_cells_kept} kept of ${f.cache_cells}`;
  const resident = [f.engine_resident_bytes, f.server_resident_bytes];
  el("memory").textContent = megabytes(resident[0] + resident[1]);
  el("memory-parts").textContent = `engine ${megabytes(resident[0])} + server ${megabytes(resident[1])}`;
  el("requests").textContent = `${f.running} + ${f.waiting}`;
}

async function poll() {
  try {
    const response = await fetch("/status", { headers: headers() });
    if (response.ok) showFigures(await response.json()); else el("state").textContent = await refusal(response);
  } catch { el("state").textContent = "the server does not answer"; }
  setTimeout(poll, document.hidden ? 10000 : 1000);
}

// Chat

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    yield* parts;
  }
}

async function answer(p) {
  const body = JSON.stringify({ messages, stream: true, stream_options: { include_usage: true } });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal: abort.signal });
  if (!response.ok) throw new Error(await refusal(response));
  let text = "", count = 0, started = 0;
  for await (const event of events(response)) {
    if (event.startsWith(": ")) { if (!text) p.textContent = event.slice(2); continue; }
    if (event === "data: [DONE]") break;
    const data = JSON.parse(event.slice(6));
    if (data.error) throw new Error(data.error.message);
    if (data.usage) {
      const reused = data.usage.prompt_tokens_details.cached_tokens;
      el("reused").textContent = `${reused} of ${data.usage.prompt_tokens}`;
      count = data.usage.completion_tokens;
    }
    const piece = data.choices[0]?.delta.content;
    if (piece) {
      started ||= performance.now();
      text += piece;
      count += 1;
      p.className = "assistant";
      p.textContent = text;
    }
    const seconds = (performance.now() - started) / 1000;
    if (started && count > 1 && seconds > 0) el("speed").textContent = ((count - 1) / seconds).toFixed(1);
  }
  return text;
}

async function ask(question) {
  messages.push({ role: "user", content: question });
  say("user", question);
  const p = say("assistant faint", "...");
  abort = new AbortController();
  el("send").disabled = true;
  el("stop").hidden = false;
  try {
    messages.push({ role: "assistant", content: await answer(p) });
    if (p.classList.contains("faint")) p.textContent = "(an empty answer)";
  } catch (error) {
    if (abort.signal.aborted && !p.classList.contains("faint")) {
      messages.push({ role: "assistant", content: p.textContent });
    } else {
      messages.pop();
      p.className = "error";
      p.textContent = abort.signal.aborted ? "stopped" : error.message;
      if (!el("question").value) el("question").value = question;
    }
  }
  el("send").disabled = false;
  el("stop").hidden = true;
}

el("form").addEventListener("submit", event => {
  event.preventDefault();
  const question = el("question").value.trim();
  if (!question || el("send").disabled) return;
  if (el("key").value) sessionStorage.setItem("key", el("key").value);
  el("question").value = "";
  ask(question);
});
el("question").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); el("form").requestSubmit(); }
});
el("key").addEventListener("change", () => sessionStorage.setItem("key", el("key").value));
el("stop").addEventListener("click", () => abort?.abort());
el("clear").addEventListener("click", () => { abort?.abort(); messages.length = 0; el("turns").replaceChildren(); });
poll();
