// The page: an image, the sentences asked about it, and what is shown of both.

import * as api from "./api.js";
import { drawLegend } from "./colours.js";
import { checkFiles, dropped } from "./files.js";
import { card, profileOf, Sentence } from "./sentences.js";
import { TokenPanel } from "./tokens.js";
import { Layer, Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const viewer = new Viewer($("canvas"));
const tokens = new TokenPanel(viewer);
let model = null;
let image = null;
let sentences = [];
let selected = null;
let showing = 0;
// A button of a sentence is being pressed; its list has changed since.
let pressed = false;
let stale = false;

// ---- messages

function say(error) {
  if (error?.name === "AbortError") return;
  $("message").textContent = error ? `${error.message ?? error}` : "";
}

function busy(words) {
  $("busy").textContent = words ?? "";
  $("busy").hidden = !words;
}

// ---- where we are in the image

function axisNow() {
  return image.axes.find((one) => one.axis === $("axis").value) ?? image.axes[0];
}

function place() {
  return { axis: axisNow().axis, index: Number($("slice").value) };
}

function key() {
  const { axis, index } = place();
  return `${axis}:${index}:${$("model-window").value}`;
}

function fillWindows() {
  const three = "lung+soft-tissue+bone";
  const known = [...model.windows.filter((name) => name !== "header" || image.header_window)];
  if (model.channels === 3) known.push(three);
  const own = model.window ?? "auto";
  if (!known.includes(own)) known.push(own);
  for (const id of ["view-window", "model-window"]) {
    $(id).replaceChildren(...known.map((name) => new Option(name === model.window ? `${name} (as trained)` : name, name)));
    $(id).value = own;
  }
}

function fillAxis() {
  const axis = axisNow();
  Object.assign($("slice"), { max: axis.count - 1, value: Math.floor(axis.count / 2) });
  $("slider-row").hidden = axis.count < 2;
}

// ---- drawing

async function showSlice() {
  const number = ++showing;
  const { axis, index } = place();
  $("slice-number").textContent = `${index + 1} / ${axisNow().count}`;
  try {
    const bitmap = await api.getBitmap(api.sliceAddress(image.id, { axis, index, window: $("view-window").value || "auto" }));
    if (number !== showing) return;
    const spacing = axisNow().spacing;
    viewer.layers = [];
    viewer.show(bitmap, spacing ? spacing[0] / spacing[1] : 1);
    await showMasks();
  } catch (error) {
    say(error);
  }
}

async function showMasks() {
  const number = showing, here = key(), at = place();
  const visible = sentences.filter((one) => one.visible && one.result(here));
  const layers = await Promise.all(visible.map((one) => layerOf(one, here, at).catch(() => null)));
  if (number !== showing || here !== key()) return;
  viewer.layers = layers.filter(Boolean);
  viewer.selected = layers[visible.indexOf(selected)] ?? null;
  viewer.draw();
  $("legend").hidden = viewer.display !== "probability" || !viewer.layers.length;
  render();
}

async function layerOf(sentence, here, at) {
  const result = sentence.result(here), name = `${result.mask}:${at.axis}:${at.index}`;
  if (!sentence.layers.has(name)) {
    const both = ["mask", "probability"].map((form) => api.getBitmap(api.maskAddress(image.id, result.mask, at, form)));
    sentence.layers.set(name, new Layer(...(await Promise.all(both)), sentence.colour));
    // A reader who scrolls through a volume needs the last few again, not all of them.
    if (sentence.layers.size > 24) sentence.layers.delete(sentence.layers.keys().next().value);
  }
  return sentence.layers.get(name);
}

function render() {
  // A button that is replaced between press and release gets no click.
  stale = pressed;
  if (pressed) return;
  const volume = image?.axes[0].count > 1;
  $("masks-title").hidden = !sentences.length;
  const focused = document.activeElement?.getAttribute("aria-label");
  const context = (sentence) => ({
    volume,
    selected: sentence === selected,
    address: (result, form) => (form === "png" ? api.maskAddress(image.id, result.mask, place()) : api.niftiAddress(image.id, result.mask)),
    profile: (one) => profileOf(one, one.whole.cut === place().axis ? place().index : -1, (index) => go(index, one.whole.cut)),
  });
  $("sentences").replaceChildren(...sentences.map((one) => card(one, key(), context(one), actions)));
  // The buttons are new ones: who works by keyboard stays where they were.
  if (focused && document.activeElement === document.body) {
    [...$("sentences").querySelectorAll("[aria-label]")].find((one) => one.getAttribute("aria-label") === focused)?.focus();
  }
  $("segment").disabled = !image;
}

function go(index, axis) {
  if (axis && axis !== $("axis").value) {
    $("axis").value = axis;
    fillAxis();
  }
  $("slice").value = index;
  showSlice();
}

// ---- sentences

const actions = {
  select(sentence) {
    selected = sentence;
    showMasks();
  },
  toggle(sentence) {
    sentence.visible = !sentence.visible;
    showMasks();
  },
  remove(sentence) {
    sentence.abort?.abort();
    sentences = sentences.filter((one) => one !== sentence);
    const masks = [...sentence.slices.values(), sentence.whole].filter(Boolean);
    for (const { mask } of masks) api.forgetMask(image.id, mask);
    if (selected === sentence) selected = sentences.at(-1) ?? null;
    showMasks();
    $("text").focus();
  },
  stop(sentence) {
    sentence.abort?.abort();
  },
  slice: (sentence) => decode(sentence, false),
  whole: (sentence) => decode(sentence, true),
};

async function decode(sentence, whole) {
  const own = image, here = key(), { axis, index } = place();
  let writing = null;
  sentence.abort = new AbortController();
  sentence.progress = { done: 0, count: 0 };
  selected = sentence;
  say();
  render();
  busy("decoding");
  try {
    const request = { image: own.id, text: sentence.text, axis, index, window: $("model-window").value || "auto", whole };
    for await (const event of api.segment(request, sentence.abort.signal)) {
      if (event.event === "queued") busy(`waiting for ${event.ahead} other${event.ahead > 1 ? "s" : ""}`);
      else if (event.event === "start" && !whole) {
        busy();
        writing = tokens.start(event, sentence.colour);
      } else if (event.event === "tokens") writing?.take(event);
      else if (event.event === "slice") {
        sentence.progress = event;
        busy(`slice ${event.done} of ${event.count}`);
        const bar = [...document.querySelectorAll("progress")].find((one) => one.getAttribute("aria-label").endsWith(sentence.text));
        if (bar) Object.assign(bar, { max: event.count, value: event.done });
      } else if (event.event === "error") throw new Error(event.message);
      else if (event.event === "done") {
        await writing?.finish();
        if (whole) {
          sentence.whole = { ...event, cut: axis };
          sentence.slices.clear();
        } else sentence.slices.set(here, event);
        $("announce").textContent = `${sentence.text} ${event.percent.toFixed(1)} percent, confidence ${event.confidence.toFixed(2)}`;
      }
    }
  } catch (error) {
    writing?.cancel();
    say(error);
    if (!sentence.whole && !sentence.slices.size) sentences = sentences.filter((one) => one !== sentence);
  } finally {
    sentence.progress = sentence.abort = null;
    busy();
    if (own === image) await showMasks();
  }
}

// ---- files

async function open(files, series) {
  say();
  $("which").hidden = true;
  try {
    const own = checkFiles(files, model.limits);
    busy(own.length > 1 ? `sending ${own.length} files` : "sending and reading");
    const opened = await api.upload(own, series);
    if (image) api.forgetImage(image.id);
    for (const sentence of sentences) sentence.abort?.abort();
    image = opened;
    sentences = [];
    selected = null;
    viewer.stopWriting();
    $("tokens").hidden = true;
    $("invite").hidden = true;
    $("toolbar").hidden = false;
    $("volume-tools").hidden = image.kind !== "volume";
    $("axis").replaceChildren(...image.axes.map(({ axis }) => new Option(axis, axis)));
    $("axis").value = image.axes.some(({ axis }) => axis === model.axis) ? model.axis : image.axes[0].axis;
    $("axis").parentElement.hidden = image.axes.length < 2;
    fillWindows();
    fillAxis();
    describe();
    await showSlice();
    $("text").focus();
  } catch (error) {
    if (error.series) choose(files, error);
    else say(error);
  } finally {
    busy();
    render();
  }
}

// Of several series one is to be chosen; the files are sent again, since the server keeps none.
function choose(files, { message, series }) {
  $("which-title").textContent = message;
  $("which-list").replaceChildren(
    ...series.map(({ name, text }) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      button.addEventListener("click", () => open(files, name));
      return button;
    }),
  );
  $("which").hidden = false;
  $("which-list").firstChild?.focus();
}

function describe() {
  const { count, width, height, spacing } = axisNow();
  const parts = [image.modality, count > 1 ? `${width} × ${height} × ${count}` : `${width} × ${height} pixels`];
  if (spacing) parts.push(`${spacing.map((mm) => mm.toFixed(2)).join(" × ")} mm per pixel`);
  else parts.push("spacing unknown, so no mm² or ml");
  if (image.kind === "volume" && !model.window) parts.push("this model remembers no window: choose what it reads");
  if (image.burnt_in) parts.push("the file says that text is burnt into its pixels");
  parts.push(...image.notes);
  $("facts").textContent = parts.filter(Boolean).join(" · ");
}

// ---- events

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!image) return say("drop an image first");
  if (!text) return say("type a sentence that says what to segment");
  if (text.length > model.limits.max_text) return say(`a sentence must have at most ${model.limits.max_text} characters`);
  let sentence = sentences.find((one) => one.text === text);
  if (sentence?.progress) return;
  if (!sentence) {
    sentence = new Sentence(text, sentences.map((one) => one.colour));
    sentences.push(sentence);
  }
  $("text").select();
  decode(sentence, false);
});
$("choose").addEventListener("click", () => $("files").click());
$("another").addEventListener("click", () => $("files").click());
$("choose-folder").addEventListener("click", () => $("folder").click());
for (const id of ["files", "folder"]) {
  $(id).addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = "";
    if (files.length) open(files);
  });
}
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  try {
    open(await dropped(event.dataTransfer, model.limits.max_files));
  } catch (error) {
    say(error);
  }
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) open([...event.clipboardData.files]);
});
$("axis").addEventListener("change", () => {
  fillAxis();
  describe();
  showSlice();
});
$("slice").addEventListener("input", showSlice);
$("view-window").addEventListener("change", showSlice);
$("model-window").addEventListener("change", () => {
  $("view-window").value = $("model-window").value;
  showSlice();
});
$("display").addEventListener("change", (event) => {
  viewer.display = event.target.value;
  $("opacity").disabled = viewer.display !== "mask";
  showMasks();
});
$("opacity").addEventListener("input", (event) => {
  viewer.opacity = event.target.value / 100;
  viewer.draw();
});
$("canvas").addEventListener("wheel", (event) => {
  if (axisNow().count < 2 || event.ctrlKey) return;
  event.preventDefault();
  go(Number($("slice").value) - Math.sign(event.deltaY));
}, { passive: false });
$("canvas").addEventListener("keydown", (event) => {
  const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 }[event.key];
  if (!step || axisNow().count < 2) return;
  event.preventDefault();
  go(Number($("slice").value) + step);
});
$("sentences").addEventListener("pointerdown", () => (pressed = true));
for (const end of ["pointerup", "pointercancel", "dragend"]) {
  addEventListener(end, () => {
    pressed = false;
    // After the click, which follows the release.
    setTimeout(() => stale && render());
  });
}
addEventListener("pagehide", () => image && api.forgetImage(image.id));

// ---- start

drawLegend($("legend-bar"));
try {
  model = await api.getModel();
  const [rows, columns] = model.grid;
  $("model").textContent = `${model.name} · ${model.image_size} px · ${rows} × ${columns} tokens · ${model.method}`;
  $("text").maxLength = model.limits.max_text;
  if (model.examples.length) $("text").placeholder = model.examples[0];
  for (const text of model.examples) {
    const chip = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    chip.addEventListener("click", () => {
      $("text").value = text;
      if (image) $("ask").requestSubmit();
      else $("text").focus();
    });
    $("examples").append(chip);
  }
} catch (error) {
  say(error);
}
