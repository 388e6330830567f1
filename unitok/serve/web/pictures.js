// Pictures from text, as a grid; each tells the seed that makes it again.
import { $, ask, examples, make, modelName, shown } from "./app.js";

const PROMPTS = [
  "a photo of a red circle",
  "a photo of two blue squares",
  "a photo of a green triangle",
  "a photo of a yellow circle and a purple square",
];
let running = null;

export function startPictures() {
  $("pictures-form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("pictures-form").requestSubmit();
  });
  $("other-seed").addEventListener("click", () => {
    $("seed").value = Number($("seed").value) + Number($("count").value);
    $("pictures-form").requestSubmit();
  });
  $("draw-stop").addEventListener("click", () => running?.abort());
  examples($("picture-examples"), PROMPTS, (text) => {
    $("prompt").value = text;
    $("prompt").focus();
  });
}

async function draw() {
  if (running) return;
  const body = { prompt: $("prompt").value, n: Number($("count").value), seed: Number($("seed").value) };
  for (const name of ["guidance", "temperature"]) if ($(name).value !== "") body[name] = Number($(name).value);
  running = new AbortController();
  busy(true);
  const start = performance.now();
  const seconds = () => ((performance.now() - start) / 1000).toFixed(1);
  const clock = setInterval(() => { $("draw-state").textContent = `Drawing, ${seconds()} s`; }, 200);
  const made = await shown(async () => {
    const whole = { model: await modelName(running.signal), ...body };
    return (await ask("/v1/images/generations", whole, running.signal)).json();
  });
  clearInterval(clock);
  running = null;
  busy(false);
  $("draw-state").textContent = made ? `${made.data.length} pictures in ${seconds()} s` : "";
  if (made) $("grid").replaceChildren(...made.data.map((one) => figure(one, body.prompt)));
}

function busy(is) {
  $("draw").disabled = $("other-seed").disabled = is;
  $("draw-stop").hidden = !is;
}

function figure(one, prompt) {
  const url = `data:image/png;base64,${one.b64_json}`;
  const save = make("a", { href: url, download: `${prompt.replace(/\W+/g, "_").slice(0, 60)}_${one.seed}.png` }, "save");
  return make("figure", {}, make("img", { src: url, alt: `${prompt}, seed ${one.seed}` }),
    make("figcaption", {}, `seed ${one.seed} \u00b7 `, save));
}
