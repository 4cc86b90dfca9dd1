// The sentences asked about one image: colour, masks of slices or of the whole volume, figures, actions.

import { SENTENCES } from "./colours.js";

const GROUPED = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

function button(words, label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = words;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

function link(words, label, address, name) {
  const made = document.createElement("a");
  Object.assign(made, { textContent: words, href: address, download: name });
  made.setAttribute("aria-label", label);
  return made;
}

function figures(result) {
  const found = [["area", `${result.percent.toFixed(1)} %`]];
  if (result.mm2 != null) found.push(["", `${GROUPED.format(result.mm2)} mm²`]);
  if (result.ml != null) found.push(["", `${GROUPED.format(result.ml)} ml`]);
  found[0][0] = result.voxels == null ? "area" : "volume";
  found.push(["confidence", result.confidence.toFixed(2)]);
  return found;
}

export class Sentence {
  constructor(text, taken) {
    this.text = text;
    this.colour = SENTENCES.find((colour) => !taken.includes(colour)) ?? SENTENCES[taken.length % SENTENCES.length];
    this.visible = true;
    // Masks of single slices by their place, and of the whole volume.
    this.slices = new Map();
    this.whole = null;
    this.progress = null;
    this.layers = new Map();
  }

  result(place) {
    return this.slices.get(place) ?? this.whole;
  }
}

// `actions`: what the buttons do; `place`: the slice that is shown.
export function card(sentence, place, { volume, selected, address, profile }, actions) {
  const item = document.createElement("li");
  item.style.setProperty("--own", sentence.colour);
  item.dataset.colour = sentence.colour;
  item.classList.toggle("selected", selected);
  item.classList.toggle("off", !sentence.visible);
  const words = button(sentence.text, `Select: ${sentence.text}`, () => actions.select(sentence));
  words.className = "words";
  words.setAttribute("aria-pressed", selected);
  item.append(words);

  const numbers = document.createElement("p");
  numbers.className = "numbers";
  const shown = sentence.result(place);
  if (shown) {
    for (const [name, value] of figures(shown)) {
      const part = document.createElement("span"), strong = document.createElement("b");
      strong.textContent = value;
      part.append(name ? `${name} ` : "", strong);
      numbers.append(part);
    }
  } else {
    numbers.textContent = sentence.progress ? "" : "not segmented on this slice";
  }
  item.append(numbers);
  if (sentence.progress) {
    const bar = document.createElement("progress");
    if (sentence.progress.count) Object.assign(bar, { max: sentence.progress.count, value: sentence.progress.done });
    bar.setAttribute("aria-label", `Progress of ${sentence.text}`);
    item.append(bar);
  }
  if (sentence.whole) item.append(profile(sentence));

  const row = document.createElement("div");
  row.className = "actions";
  row.append(button(sentence.visible ? "Hide" : "Show", `${sentence.visible ? "Hide" : "Show"} ${sentence.text}`, () => actions.toggle(sentence)));
  if (sentence.progress) {
    row.append(button("Stop", `Stop ${sentence.text}`, () => actions.stop(sentence)));
  } else if (volume) {
    if (!shown) row.append(button("This slice", `Segment this slice: ${sentence.text}`, () => actions.slice(sentence)));
    if (!sentence.whole) row.append(button("Whole volume", `Segment the whole volume: ${sentence.text}`, () => actions.whole(sentence)));
  }
  if (shown) row.append(link("PNG", `Download the mask of ${sentence.text} as PNG`, address(shown, "png"), "mask.png"));
  if (sentence.whole) row.append(link("NIfTI", `Download the volume's mask of ${sentence.text} as NIfTI`, address(sentence.whole, "nii.gz"), "mask.nii.gz"));
  row.append(button("Remove", `Remove ${sentence.text}`, () => actions.remove(sentence)));
  item.append(row);
  return item;
}

// How much of each slice a volume's mask covers; a click goes there.
export function profileOf(sentence, index, go) {
  const { slices } = sentence.whole;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const most = Math.max(1, ...slices);
  svg.setAttribute("viewBox", `0 0 ${slices.length} 28`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "profile");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Area by slice; the largest is slice ${slices.indexOf(Math.max(...slices)) + 1}`);
  slices.forEach((area, i) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = (26 * area) / most;
    for (const [name, value] of Object.entries({ x: i, y: 28 - height, width: 1, height, fill: sentence.colour })) bar.setAttribute(name, value);
    svg.append(bar);
  });
  const mark = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of Object.entries({ x: index, y: 0, width: 1, height: 28, fill: "currentColor", opacity: 0.5 })) mark.setAttribute(name, value);
  svg.append(mark);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    go(Math.floor(((event.clientX - box.left) / box.width) * slices.length));
  });
  return svg;
}
