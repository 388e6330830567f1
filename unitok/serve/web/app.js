// What the three views share: the server, its key, errors, tabs.
import { startChat, take } from "./chat.js";
import { startPictures } from "./pictures.js";
import { read, startTokens } from "./tokens.js";

export const $ = (id) => document.getElementById(id);
const KEY = "unitok-key"; // kept for this tab only
let facts = null; // of the model
let learning; // the first request, which a quick hand may overtake

// A request; throws an Error with the server's own words. An abort passes through.
export async function ask(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is it still running?");
  }
  if (response.ok) return response;
  const text = await response.json().then((data) => data.error.message, () => `Status ${response.status}`);
  if (response.status === 401) $("key-form").hidden = false;
  const later = response.headers.get("Retry-After");
  throw new Error(later ? `${text} (in about ${later} s)` : text);
}

// Runs an action with its errors shown on the page; an aborted one is no error.
export async function shown(action) {
  $("problem").hidden = true;
  try {
    return await action();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    $("problem").textContent = error.message;
    $("problem").hidden = false;
    return undefined;
  }
}

// A picture file as a data URL, scaled down: every turn of a conversation sends all its pictures again.
export async function dataUrl(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name}: the browser cannot read it as a picture; choose a png, jpeg or webp`);
  }
  const scale = Math.min(1, 512 / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // what is transparent is white, as for the model
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function examples(box, texts, choose) {
  for (const text of texts) {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", () => choose(text));
    box.append(button);
  }
}

function startTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const open = (tab) => {
    for (const one of tabs) {
      const chosen = one === tab;
      one.setAttribute("aria-selected", chosen);
      one.tabIndex = chosen ? 0 : -1;
      $(one.getAttribute("aria-controls")).hidden = !chosen;
    }
    $("problem").hidden = true;
    history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const target = { Home: 0, End: tabs.length - 1 }[event.key] ?? (step && (index + step + tabs.length) % tabs.length);
      if (target === undefined) return;
      event.preventDefault();
      open(tabs[target]);
      tabs[target].focus();
    });
  });
  const asked = tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
  if (asked) open(asked);
}

// A picture goes to the view that is open, wherever on the page it is dropped: the browser would leave the page for it.
function startDrops() {
  const files = (event) => event.dataTransfer.types.includes("Files"); // text goes where it is dropped
  document.addEventListener("dragover", (event) => files(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (!$("tokens").hidden) read(file);
    else if (!$("chat").hidden) take(file);
  });
}

async function learn(signal) {
  [facts] = (await (await ask("/v1/models", undefined, signal)).json()).data;
  $("model").textContent = facts.id;
  const sampler = facts.unitok.image_sampler;
  $("guidance").placeholder = sampler.guidance_scale;
  $("temperature").placeholder = sampler.temperature;
  $("key-form").hidden = true;
}

// The model's name; throws an Error with the server's own words where it is not to be had, or when the signal aborts.
export async function modelName(signal) {
  const stopped = new Promise((_, stop) => signal.addEventListener("abort", () => stop(signal.reason)));
  await Promise.race([learning, stopped]);
  if (!facts) {
    await learn(signal);
    $("problem").hidden = true; // that of the first request
  }
  return facts.id;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  shown(async () => {
    if (!/^[\x21-\x7e]+$/.test(key)) throw new Error("A key has no letters beyond ASCII and no spaces; copy it again");
    sessionStorage.setItem(KEY, key);
    await learn();
  });
});
startTabs();
startDrops();
startChat();
startPictures();
startTokens();
learning = shown(() => learn());
