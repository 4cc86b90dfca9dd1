// The canvas: the image, and over it masks, a probability map, or the tokens that have been written so far.

import { contour } from "./contours.js";
import { coverage, mapped } from "./colours.js";

function field(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  const values = new Uint8Array(bitmap.width * bitmap.height);
  for (let i = 0; i < values.length; i++) values[i] = rgba[4 * i];
  return { width: bitmap.width, height: bitmap.height, values };
}

function painted({ width, height, values }, paint) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < values.length; i++) image.data.set(paint(values[i]), 4 * i);
  context.putImageData(image, 0, 0);
  return canvas;
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

export class Layer {
  constructor(maskBitmap, probabilityBitmap, colour) {
    this.mask = field(maskBitmap);
    this.probability = field(probabilityBitmap);
    this.colour = colour;
    this.tint = painted(this.mask, (value) => [...rgb(colour), value]);
    this.outline = contour(this.mask.values, this.mask.width, this.mask.height, 128);
  }

  get map() {
    this._map ??= painted(this.probability, (v) => [...mapped(v / 255), 255 * coverage(v / 255)]);
    return this._map;
  }

  get levels() {
    const { values, width, height } = this.probability;
    this._levels ??= [0.25, 0.5, 0.75].map((level) => contour(values, width, height, 255 * level));
    return this._levels;
  }
}

export class Viewer {
  constructor(canvas) {
    this.canvas = canvas;
    this.layers = [];
    this.display = "mask";
    this.opacity = 0.3;
    this.selected = null;
    this.writing = null;
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  // `ratio`: height of a pixel over its width, since a coronal slice of thick slices has tall pixels.
  show(bitmap, ratio = 1) {
    this.bitmap = bitmap;
    this.ratio = ratio;
    this.canvas.hidden = false;
    this.draw();
  }

  startWriting(grid, colour) {
    this.writing = { grid, colour, tiles: [] };
  }

  write(tile) {
    this.writing?.tiles.push(tile);
    this.draw();
  }

  stopWriting() {
    this.writing = null;
    this.draw();
  }

  draw() {
    if (!this.bitmap || this.canvas.hidden) return;
    const { width, height } = this.bitmap;
    const space = this.canvas.parentElement.clientWidth;
    const tall = Math.max(260, window.innerHeight - 230);
    const scale = Math.min(space / width, tall / (height * this.ratio));
    const density = window.devicePixelRatio || 1;
    this.canvas.style.width = `${width * scale}px`;
    this.canvas.style.height = `${height * scale * this.ratio}px`;
    this.canvas.width = Math.round(width * scale * density);
    this.canvas.height = Math.round(height * scale * this.ratio * density);
    const context = this.canvas.getContext("2d");
    const sx = this.canvas.width / width, sy = this.canvas.height / height;
    context.imageSmoothingQuality = "high";
    context.setTransform(sx, 0, 0, sy, 0, 0);
    context.drawImage(this.bitmap, 0, 0);
    // Lines keep their width whatever the zoom.
    const stroke = (path, colour, wide) => {
      const scaled = new Path2D();
      scaled.addPath(path, new DOMMatrix([sx, 0, 0, sy, 0, 0]));
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.lineWidth = wide * density;
      context.strokeStyle = colour;
      context.stroke(scaled);
      context.setTransform(sx, 0, 0, sy, 0, 0);
    };
    if (this.display === "probability") {
      const layer = this.layers.find((one) => one === this.selected) ?? this.layers.at(-1);
      if (layer) {
        context.drawImage(layer.map, 0, 0);
        layer.levels.forEach((path, i) => stroke(path, i === 1 ? "#fff" : "rgb(255 255 255 / 60%)", i === 1 ? 1.6 : 1));
      }
    } else {
      for (const layer of this.layers) {
        context.globalAlpha = this.display === "mask" ? this.opacity : 0;
        context.drawImage(layer.tint, 0, 0);
        context.globalAlpha = 1;
        stroke(layer.outline, "rgb(0 0 0 / 55%)", layer === this.selected ? 4 : 3);
        stroke(layer.outline, layer.colour, layer === this.selected ? 2.2 : 1.5);
      }
    }
    if (this.writing) this.drawTokens(context);
  }

  drawTokens(context) {
    const { grid: [rows, columns], tiles } = this.writing;
    const { width, height } = this.bitmap;
    const w = width / columns, h = height / rows;
    context.imageSmoothingEnabled = false;
    for (const { index, picture } of tiles) {
      context.drawImage(picture, (index % columns) * w, Math.floor(index / columns) * h, w, h);
    }
    context.imageSmoothingEnabled = true;
    const last = tiles.at(-1);
    if (last) {
      context.strokeStyle = "#fff";
      context.lineWidth = width / 300;
      context.strokeRect((last.index % columns) * w, Math.floor(last.index / columns) * h, w, h);
    }
  }

  // The grid's cell below the pointer.
  cellAt(event, [rows, columns]) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return row * columns + column;
  }
}
