// Contours of a field of values by marching squares; crisp at any zoom, since they are lines and not pixels.

// Edges of a square: 0 top, 1 right, 2 bottom, 3 left. Corners: 8 top left, 4 top right, 2 bottom right, 1 bottom left.
const LINES = [
  [], [[3, 2]], [[2, 1]], [[3, 1]], [[0, 1]], [[0, 3], [2, 1]], [[0, 2]], [[0, 3]],
  [[0, 3]], [[0, 2]], [[0, 1], [3, 2]], [[0, 1]], [[3, 1]], [[2, 1]], [[3, 2]], [],
];

// `values` is a row-major field whose cells' centres lie at (x + 0.5, y + 0.5); beyond its border is 0.
export function contour(values, width, height, level) {
  const path = new Path2D();
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : values[y * width + x]);
  for (let y = -1; y < height; y++) {
    for (let x = -1; x < width; x++) {
      const a = at(x, y), b = at(x + 1, y), c = at(x + 1, y + 1), d = at(x, y + 1);
      const kind = (a >= level ? 8 : 0) | (b >= level ? 4 : 0) | (c >= level ? 2 : 0) | (d >= level ? 1 : 0);
      if (!LINES[kind].length) continue;
      const part = (p, q) => (p === q ? 0.5 : (level - p) / (q - p));
      const points = [
        () => [x + part(a, b), y], () => [x + 1, y + part(b, c)], () => [x + part(d, c), y + 1], () => [x, y + part(a, d)],
      ];
      for (const [from, to] of LINES[kind]) {
        const [x0, y0] = points[from](), [x1, y1] = points[to]();
        path.moveTo(x0 + 0.5, y0 + 0.5);
        path.lineTo(x1 + 0.5, y1 + 0.5);
      }
    }
  }
  return path;
}
