// The visual tokenizer: a picture, what its codes keep of it, the codes as a map, and how many are used.
import { $, ask, dataUrl, make, shown } from "./app.js";

let made = null;

export function startTokens() {
  $("tokens-image").addEventListener("change", (event) => read(event.target.files[0]));
  $("codebook").addEventListener("change", drawMap);
  $("map").addEventListener("keydown", move);
}

export async function read(file) {
  if (!file) return;
  $("tokens-state").textContent = "Reading the picture";
  await shown(async () => {
    made = await (await ask("/v1/tokenizer/reconstruct", { image: await dataUrl(file) })).json();
    show();
  });
  $("tokens-state").textContent = "";
  $("tokens-image").value = "";
}

function show() {
  $("original").src = `data:image/png;base64,${made.original}`;
  $("reconstruction").src = `data:image/png;base64,${made.reconstruction}`;
  $("psnr").textContent = made.psnr.toFixed(1);
  $("codebook").replaceChildren(...made.codes.map((_, k) => make("option", { value: k }, String(k + 1))));
  $("usage").replaceChildren(...made.usage.map((one, k) => make("div", { class: "bar" },
    make("span", {}, `${k + 1}`),
    make("meter", { min: 0, max: Math.min(one.entries, made.codes[k].length), value: one.used,
      "aria-label": `Codebook ${k + 1}` }),
    make("span", {}, `${one.used} of ${one.entries}`))));
  $("tokens-result").hidden = false;
  drawMap();
}

// Neighbouring numbers get far colours: codes have no order.
const color = (code) => `hsl(${(code * 137.508) % 360} 65% ${60 + (code % 4) * 7}%)`;

function drawMap() {
  const k = Number($("codebook").value);
  const [rows, columns] = made.grid;
  $("map").style.gridTemplateRows = `repeat(${rows}, 1fr)`;
  $("map").replaceChildren(...Array.from({ length: rows }, (_, y) => make("div", { role: "row" },
    ...Array.from({ length: columns }, (_, x) => cell(y * columns + x, k, columns)))));
  $("map").querySelector("button").tabIndex = 0;
}

function cell(place, k, columns) {
  const code = made.codes[k][place];
  const button = make("button", { type: "button", role: "gridcell", tabindex: -1,
    "aria-label": `row ${Math.floor(place / columns) + 1}, column ${(place % columns) + 1}: code ${code}` },
  columns <= 8 ? String(code) : "");
  button.style.background = color(code);
  const tell = () => {
    const all = made.codes.map((row) => row[place]).join(", ");
    $("cell").textContent = `Row ${Math.floor(place / columns) + 1}, column ${(place % columns) + 1}: codes ${all}`;
  };
  button.addEventListener("mouseenter", tell);
  button.addEventListener("focus", tell);
  return button;
}

function move(event) {
  const columns = made.grid[1];
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const cells = [...$("map").querySelectorAll("button")];
  const next = cells[cells.indexOf(document.activeElement) + step];
  if (!next) return;
  for (const one of cells) one.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}
