"use strict";
// The page: lines of text with a box each, a request, and the images that came back.

const byId = (id) => document.getElementById(id);
const stage = byId("stage");
const LEAST = 0.02; // side of a box, in parts of the picture's side

let settings = null;
let lines = []; // {text, color, anyColor, font, box: [x0, y0, x1, y1] in parts of the side, 0 to 1}
let chosen = -1;
let upload = null; // base64 of the image to edit
let running = null; // the AbortController of the request under way

// Elements.

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function fillSelect(select, options) {
  select.replaceChildren(...options.map(([value, label]) => element("option", { value, textContent: label })));
}

// Boxes.

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const inPixels = (box) => box.map((part) => Math.round(part * settings.size));

function place(node, box) {
  const [x0, y0, x1, y1] = box.map((part) => part * 100);
  Object.assign(node.style, { left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%` });
}

function drawBoxes() {
  for (const old of stage.querySelectorAll(".box")) old.remove();
  lines.forEach((line, index) => {
    const label = element("span", { textContent: line.text || `text ${index + 1}` });
    if (!line.anyColor) label.style.color = line.color;
    const height = (line.box[3] - line.box[1]) * stage.clientHeight;
    const width = (line.box[2] - line.box[0]) * stage.clientWidth;
    label.style.fontSize = `${Math.max(9, Math.min(height * 0.7, (width / label.textContent.length) * 1.25))}px`;
    const node = element("div", { className: `box${index === chosen ? " chosen" : ""}` }, label, element("i"));
    node.dataset.index = index;
    place(node, line.box);
    stage.append(node);
  });
  byId("hint").hidden = lines.length > 0 || upload !== null;
}

function position(event) {
  const frame = stage.getBoundingClientRect();
  return [clamp((event.clientX - frame.left) / frame.width, 0, 1), clamp((event.clientY - frame.top) / frame.height, 0, 1)];
}

function startDrag(event) {
  if (event.button !== 0 || settings === null) return;
  const [x, y] = position(event);
  const node = event.target.closest(".box");
  let change;
  if (node === null) {
    if (!addLine([x, y, x, y], false)) return;
    change = ([toX, toY]) => [Math.min(x, toX), Math.min(y, toY), Math.max(x, toX), Math.max(y, toY)];
  } else {
    choose(Number(node.dataset.index));
    const [x0, y0, x1, y1] = lines[chosen].box;
    change = event.target.tagName === "I"
      ? ([toX, toY]) => [x0, y0, Math.max(toX, x0 + LEAST), Math.max(toY, y0 + LEAST)]
      : ([toX, toY]) => {
          const right = clamp(toX - x, -x0, 1 - x1), down = clamp(toY - y, -y0, 1 - y1);
          return [x0 + right, y0 + down, x1 + right, y1 + down];
        };
  }
  stage.setPointerCapture(event.pointerId);
  const index = chosen;
  const move = (moved) => {
    lines[index].box = change(position(moved));
    drawBoxes();
  };
  const end = () => {
    stage.removeEventListener("pointermove", move);
    stage.removeEventListener("pointerup", end);
    stage.removeEventListener("pointercancel", end);
    const [x0, y0, x1, y1] = lines[index].box;
    if (x1 - x0 < LEAST || y1 - y0 < LEAST) lines.splice(index, 1); // a click and no box
    if (chosen >= lines.length) chosen = lines.length - 1;
    drawAll();
    if (node === null && lines[index] !== undefined) byId("lines").children[index].querySelector("input").focus();
  };
  stage.addEventListener("pointermove", move);
  stage.addEventListener("pointerup", end);
  stage.addEventListener("pointercancel", end);
  event.preventDefault();
}

// Lines.

function addLine(box, draws = true) {
  if (lines.length >= settings.max_lines) {
    fail(`At most ${settings.max_lines} texts are rendered; remove one first.`);
    return false;
  }
  lines.push({ text: "", color: "#d01818", anyColor: false, font: "", box });
  chosen = lines.length - 1;
  if (draws) drawAll();
  return true;
}

function choose(index) {
  chosen = index;
  [...byId("lines").children].forEach((item, at) => item.classList.toggle("chosen", at === index));
  drawBoxes();
}

function lineItem(line, index) {
  const change = (action) => () => { action(); drawBoxes(); };
  const text = element("input", { type: "text", value: line.text, placeholder: "text to show", maxLength: 200 });
  text.setAttribute("aria-label", `Text ${index + 1}`);
  text.addEventListener("input", change(() => { line.text = text.value; }));
  const remove = element("button", { type: "button", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove text ${index + 1}`);
  remove.addEventListener("click", () => { lines.splice(index, 1); chosen = lines.length - 1; drawAll(); });
  const color = element("input", { type: "color", value: line.color, disabled: line.anyColor });
  color.addEventListener("input", change(() => { line.color = color.value; }));
  const any = element("input", { type: "checkbox", checked: line.anyColor });
  any.addEventListener("change", change(() => { line.anyColor = color.disabled = any.checked; }));
  const box = element("input", { type: "text", className: "place", value: inPixels(line.box).join(", ") });
  box.addEventListener("change", () => {
    const typed = box.value.split(",").map(Number);
    const fits = typed.length === 4 && typed.every((n) => n >= 0 && n <= settings.size) && typed[0] < typed[2] && typed[1] < typed[3];
    if (fits) line.box = typed.map((n) => n / settings.size);
    else fail(`Box of text ${index + 1}: expected x0, y0, x1, y1 in pixels, 0 to ${settings.size}.`);
    drawAll();
  });
  const more = [
    element("label", {}, "colour ", color),
    element("label", {}, any, " any"),
    element("label", {}, "box ", box),
  ];
  if (settings.fonts.length > 0) {
    const font = element("select");
    fillSelect(font, [["", "usual font"], ...settings.fonts.map((name) => [name, name])]);
    font.value = line.font;
    font.addEventListener("change", () => { line.font = font.value; });
    more.push(element("label", {}, "font ", font));
  }
  const item = element("li", { className: index === chosen ? "chosen" : "" }, text, remove, element("div", { className: "more" }, ...more));
  item.addEventListener("focusin", () => choose(index));
  return item;
}

function drawAll() {
  byId("lines").replaceChildren(...lines.map(lineItem));
  drawBoxes();
}

// The image to edit.

function setMode(edits) {
  document.querySelector(`[name="mode"][value="${edits ? "edit" : "generate"}"]`).checked = true;
  byId("edit").hidden = !edits;
  if (!edits) setSource(null, "");
}

function setSource(base64, address) {
  upload = base64;
  const source = byId("source");
  source.hidden = base64 === null;
  if (base64 === null) source.removeAttribute("src");
  else source.src = address;
  drawBoxes();
}

function readFile() {
  const file = byId("file").files[0];
  if (file === undefined) return setSource(null, "");
  if (file.size > settings.max_bytes * 0.7) {
    byId("file").value = "";
    return fail(`The image is larger than ${Math.floor((settings.max_bytes * 0.7) / 2 ** 20)} MiB; choose a smaller one.`);
  }
  const reader = new FileReader();
  reader.addEventListener("load", () => setSource(reader.result.slice(reader.result.indexOf(",") + 1), reader.result));
  reader.readAsDataURL(file);
}

// Asking.

function fail(message) {
  byId("error").textContent = message;
  byId("error").hidden = message === "";
}

function request() {
  const models = [byId("model").value, byId("beside").value].filter((name) => name !== "");
  return {
    caption: byId("caption").value,
    lines: lines.map(({ text, color, anyColor, font, box }) => ({
      text, box: inPixels(box), color: anyColor ? null : color, font: font || null,
    })),
    image: upload,
    models: [...new Set(models)],
    steps: Number(byId("steps").value) || null,
    seed: Number(byId("seed").value) || 0,
    num_images: Number(byId("images").value) || 1,
  };
}

async function sample() {
  fail("");
  byId("doubts").hidden = true;
  if (document.querySelector('[name="mode"]:checked').value === "edit" && upload === null) {
    return fail("Choose the image to edit, or generate.");
  }
  const began = performance.now();
  const tick = setInterval(() => {
    byId("status").textContent = `Sampling … ${((performance.now() - began) / 1000).toFixed(0)} s`;
  }, 500);
  byId("status").textContent = "Sampling …";
  running = new AbortController();
  setBusy(true);
  try {
    const response = await fetch("sample", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request()),
      signal: running.signal,
    });
    const content = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(content.error || `the server answered ${response.status}`);
    show(content);
    byId("status").textContent = `Done in ${((performance.now() - began) / 1000).toFixed(1)} s, encoding and waiting included.`;
  } catch (error) {
    byId("status").textContent = "";
    if (error.name === "AbortError") byId("status").textContent = "Stopped.";
    else if (error instanceof TypeError) fail("The server does not answer; is it still running?");
    else fail(error.message);
  } finally {
    clearInterval(tick);
    running = null;
    setBusy(false);
  }
}

function setBusy(busy) {
  byId("sample").disabled = byId("again").disabled = busy;
  byId("stop").hidden = !busy;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

function show({ made, doubts }) {
  byId("doubts").replaceChildren(...doubts.map((doubt) => element("li", { textContent: doubt })));
  byId("doubts").hidden = doubts.length === 0;
  const models = made.map((one) => {
    const images = one.images.map((data, number) => {
      const address = `data:image/png;base64,${data}`;
      const image = element("img", { src: address, alt: `${byId("caption").value || "image"}, by ${one.model}` });
      const save = element("a", { href: address, download: `${one.model}-${one.seed}-${number}.png`, textContent: "Save" });
      const edit = element("button", { type: "button", textContent: "Edit this" });
      edit.addEventListener("click", () => {
        setMode(true);
        byId("file").value = "";
        setSource(data, address);
        stage.scrollIntoView({ behavior: "smooth", block: "nearest" });
      });
      return element("figure", {}, image, element("figcaption", { className: "row" }, save, edit));
    });
    const cost = `${plural(one.steps, "step")}, ${plural(one.unet_calls, "UNet call")} an image,`
      + ` ${one.seconds.toFixed(2)} s for ${plural(images.length, "image")}, seed ${one.seed}`;
    return element(
      "article", {}, element("h3", { textContent: one.model }), element("p", { className: "small", textContent: cost }),
      element("div", { className: "images" }, ...images),
    );
  });
  byId("results").replaceChildren(element("h2", { textContent: "Images" }), element("div", { className: "models" }, ...models));
  byId("results").scrollIntoView({ behavior: "smooth", block: "nearest" });
}

// Beginning.

function useExample(example) {
  byId("caption").value = example.caption;
  lines = example.lines.slice(0, settings.max_lines).map((line) => ({
    text: line.text, color: line.color || "#d01818", anyColor: line.color === null, font: line.font,
    box: line.box.map((pixels) => pixels / settings.size),
  }));
  chosen = lines.length - 1;
  drawAll();
}

async function begin() {
  const response = await fetch("settings");
  settings = await response.json();
  const options = settings.models.map(({ name, steps, fixed }) => [name, fixed ? `${name}, ${plural(steps, "step")}` : name]);
  fillSelect(byId("model"), options);
  fillSelect(byId("beside"), [["", "nothing"], ...options]);
  byId("steps").value = settings.models.find(({ fixed }) => !fixed).steps;
  byId("steps").max = settings.max_steps;
  byId("images").max = settings.max_images;
  byId("examples").append(...settings.examples.map((example) => {
    const button = element("button", { type: "button", textContent: example.name });
    button.addEventListener("click", () => useExample(example));
    return button;
  }));
}

stage.addEventListener("pointerdown", startDrag);
window.addEventListener("resize", drawBoxes);
byId("add").addEventListener("click", () => {
  const top = clamp(0.1 + 0.22 * lines.length, 0, 0.8);
  if (addLine([0.15, top, 0.85, top + 0.18])) byId("lines").lastElementChild.querySelector("input").focus();
});
byId("file").addEventListener("change", readFile);
for (const radio of document.querySelectorAll('[name="mode"]')) {
  radio.addEventListener("change", () => setMode(radio.value === "edit"));
}
byId("form").addEventListener("submit", (event) => { event.preventDefault(); if (running === null) sample(); });
byId("again").addEventListener("click", () => { byId("seed").value = Math.floor(Math.random() * 1e9); sample(); });
byId("stop").addEventListener("click", () => { if (running !== null) running.abort(); });
begin().catch(() => fail("The server does not answer; is it still running?"));
