// A conversation: pictures go with a question, the answer comes piece by piece.
import { $, ask, dataUrl, examples, make, modelName, shown } from "./app.js";

const QUESTIONS = [
  "what color is the circle?",
  "how many objects are there?",
  "is there a green triangle?",
  "how many squares are there?",
];
let messages = [];
let picture = null; // data URL of the next question
let running = null; // AbortController of the answer that is coming

export function startChat() {
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("chat-form").requestSubmit();
  });
  $("chat-image").addEventListener("change", (event) => take(event.target.files[0]));
  $("question").addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files][0];
    if (file) take(file);
  });
  $("chat-remove").addEventListener("click", () => show(null));
  $("chat-stop").addEventListener("click", () => running?.abort());
  $("chat-reset").addEventListener("click", () => {
    running?.abort();
    messages = [];
    show(null);
    $("talk").replaceChildren();
    $("question").focus();
  });
  examples($("chat-examples"), QUESTIONS, (text) => {
    $("question").value = text;
    $("question").focus();
  });
}

export const take = (file) => file && shown(async () => show(await dataUrl(file)));

function show(url) {
  picture = url;
  $("chat-preview").hidden = $("chat-remove").hidden = url === null;
  if (url) $("chat-preview").src = url;
  else $("chat-preview").removeAttribute("src");
  $("chat-image").value = "";
}

function bubble(role, text, url) {
  const element = make("div", { class: `turn ${role}` });
  if (url) element.append(make("img", { src: url, alt: "Picture of this question" }));
  const words = make("span", {}, text);
  element.append(words);
  $("talk").append(element);
  $("talk").scrollTop = $("talk").scrollHeight;
  return { element, words };
}

async function send() {
  const text = $("question").value.trim();
  if (!text || running) return;
  const url = picture;
  const parts = url ? [{ type: "image_url", image_url: { url } }] : [];
  const turn = { role: "user", content: [...parts, { type: "text", text }] };
  const asked = bubble("user", text, url);
  const answer = bubble("assistant", "");
  const conversation = messages;
  answer.element.classList.add("waiting");
  $("question").value = "";
  show(null);
  running = new AbortController();
  $("chat-stop").hidden = false;
  $("send").disabled = true;
  let whole = "";
  let complete = false;
  await shown(async () => {
    const body = { model: await modelName(running.signal), messages: [...conversation, turn], stream: true };
    const response = await ask("/v1/chat/completions", body, running.signal);
    for await (const delta of pieces(response)) {
      whole += delta;
      answer.words.textContent = whole;
      $("talk").scrollTop = $("talk").scrollHeight;
    }
    complete = true;
  });
  running = null;
  answer.element.classList.remove("waiting");
  $("chat-stop").hidden = true;
  $("send").disabled = false;
  if (whole || complete) {
    conversation.push(turn, { role: "assistant", content: whole });
    if (!whole) answer.words.textContent = "(no words)";
  } else { // not answered: the question can be sent again
    asked.element.remove();
    answer.element.remove();
    if (conversation === messages && !$("question").value) {
      $("question").value = text;
      show(url);
    }
  }
}

// The text of a stream of server-sent events.
async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off; the server may have stopped.");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta.content;
      if (delta) yield delta;
    }
  }
}
