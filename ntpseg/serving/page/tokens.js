// The tokens of one mask: a tile each, appearing in the order in which they were written.

function pictures(event, colour) {
  const bytes = Uint8Array.from(atob(event.patches), (letter) => letter.charCodeAt(0));
  const pixels = bytes.length / event.codes.length;
  const side = Math.round(Math.sqrt(pixels));
  return event.codes.map((code, i) => {
    const image = new ImageData(side, side);
    for (let p = 0; p < pixels; p++) image.data.set([...colour, 0.75 * bytes[i * pixels + p]], 4 * p);
    const picture = new OffscreenCanvas(side, side);
    picture.getContext("2d").putImageData(image, 0, 0);
    return { index: event.first + i, code, confidence: event.confidence[i], picture, side };
  });
}

export function note(about) {
  const tokens = about.grid[0] * about.grid[1];
  if (about.streams) return `${tokens} tokens, shown as they are decoded, one after the other.`;
  if (about.samples) return `${tokens} tokens of the mean of ${about.samples} sampled masks; they came together and are shown in their order.`;
  const passes = about.passes === 1 ? "in one pass" : `in ${about.passes} passes`;
  return `This model decodes ${passes}: its ${tokens} tokens came together and are shown in their order.`;
}

export class TokenPanel {
  constructor(viewer) {
    this.viewer = viewer;
    this.panel = document.getElementById("tokens");
    this.grid = document.getElementById("token-grid");
    this.status = document.getElementById("token-status");
    this.text = document.getElementById("token-note");
  }

  // Returns what takes the events of one decode; `finish` waits until its last token is shown.
  start(about, colour) {
    const [rows, columns] = about.grid;
    const count = rows * columns;
    const rgb = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches || document.hidden;
    // Tokens that came together are spread over a second and a half.
    const pause = about.streams || still ? 0 : 1500 / count;
    this.panel.hidden = false;
    this.text.textContent = note(about);
    this.grid.replaceChildren();
    this.grid.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
    for (let index = 0; index < count; index++) this.grid.append(this.tile());
    this.viewer.startWriting(about.grid, colour);
    let shown = Promise.resolve();
    let sum = 0, number = 0, over = false;
    const add = async (tile) => {
      if (over) return;
      if (pause) await new Promise((resolve) => setTimeout(resolve, pause));
      sum += tile.confidence;
      this.show(tile, ++number, count, sum / number, rgb);
    };
    return {
      take: (event) => {
        for (const tile of pictures(event, rgb)) shown = shown.then(() => add(tile));
      },
      finish: async () => {
        await shown;
        this.grid.querySelector(".last")?.classList.remove("last");
        this.viewer.stopWriting();
      },
      cancel: () => {
        over = true;
        this.viewer.stopWriting();
      },
    };
  }

  tile() {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 1;
    return tile;
  }

  show({ index, code, confidence, picture, side }, number, count, mean) {
    const tile = this.grid.children[index];
    tile.width = tile.height = side;
    tile.getContext("2d").drawImage(picture, 0, 0);
    tile.dataset.code = code;
    tile.dataset.order = number;
    tile.title = `token ${number} of ${count}: code ${code}, probability ${confidence.toFixed(2)}`;
    this.grid.querySelector(".last")?.classList.remove("last");
    tile.classList.add("last");
    this.viewer.write({ index, picture });
    this.status.textContent = `token ${number} of ${count}, mean probability ${mean.toFixed(2)}`;
  }
}
