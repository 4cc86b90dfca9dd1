// Colours of sentences (told apart by people with any colour vision, bright on grey), and the map of probabilities.

export const SENTENCES = ["#00c2ff", "#ffb000", "#ff6ba8", "#5fd38d", "#b79bff", "#ff7f50", "#e6e04a", "#7fa7ff"];

// Every eighth colour of viridis (Smith and van der Walt, CC0): lightness grows evenly with probability.
const VIRIDIS = [
  [68, 1, 84], [72, 33, 115], [67, 62, 133], [56, 88, 140], [45, 112, 142], [37, 133, 142],
  [30, 155, 138], [42, 176, 127], [82, 197, 105], [134, 213, 73], [194, 223, 35], [253, 231, 37],
];

export function mapped(probability) {
  const place = probability * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[low].map((value, i) => value + (VIRIDIS[low + 1][i] - value) * (place - low));
}

// Certain background stays the image; above, the map covers more and more of it.
export function coverage(probability) {
  return probability < 0.02 ? 0 : 0.25 + 0.45 * Math.min(1, probability * 1.5);
}

export function drawLegend(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${mapped(x / (canvas.width - 1)).join(" ")})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}
