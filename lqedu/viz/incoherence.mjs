// Chapter 07: a weight before and after random rotations of its outputs and inputs, and one grid for all of it.
// data: weights (rows), u and v (left, right, order: the rotations), outlier (the largest weight is multiplied by it),
// outputs and inputs (which rotation is on), bits, half (half-width of the grid in root mean squares)

const transpose = (m) => m[0].map((_, j) => m.map((row) => row[j]));
const product = (a, b) => a.map((row) => b[0].map((_, j) => sum(row.map((x, k) => x * b[k][j]))));

/** (left ⊗ right) applied to the permuted row x. */
function rotateRow(x, { left, right, order }) {
  const q = right.length;
  const grid = left.map((_, i) => order.slice(i * q, (i + 1) * q).map((k) => x[k]));
  return product(product(left, grid), transpose(right)).flat();
}

/** Largest entry over root mean square, and what rounding to one grid of ± half root mean squares loses. */
function measure(matrix, bits, half) {
  const flat = matrix.flat();
  const rms = Math.sqrt(mean(flat.map((x) => x * x)));
  const levels = 2 ** bits, step = (2 * half * rms) / (levels - 1) || 1, zero = rms ? (levels - 1) / 2 : 0;
  const w_hat = flat.map((x) => step * (clamp(roundEven(x / step + zero), 0, levels - 1) - zero));
  const clipped = flat.filter((x) => Math.abs(x) > (zero + 0.5) * step).length / flat.length;
  return {
    rms, clipped,
    mu: max(flat.map(Math.abs)) / (rms || 1),
    error: sum(flat.map((x, i) => (x - w_hat[i]) ** 2)) / (sum(flat.map((x) => x * x)) || 1),
    points: Array.from({ length: levels }, (_, i) => (step * (i - zero)) / (rms || 1)),
  };
}

/** Both matrices and their numbers. */
export function compute({ weights, u, v, outlier, outputs, inputs, bits, half }) {
  const before = weights.map((row) => [...row]);
  const sizes = before.map((row) => max(row.map(Math.abs)));
  const i = sizes.indexOf(max(sizes)), j = before[i].map(Math.abs).indexOf(sizes[i]);
  before[i][j] *= outlier;
  let after = before;
  if (inputs) after = after.map((row) => rotateRow(row, v));
  if (outputs) after = transpose(transpose(after).map((column) => rotateRow(column, u)));
  return { before, after, first: measure(before, bits, half), second: measure(after, bits, half) };
}

/** A heat map; the same scale of colour, in root mean squares, for both. */
function drawHeat(root, left, size, title, matrix, rms) {
  root.append(svg("text", { class: "strong", x: left, y: 13 }, title));
  const cell = size / matrix.length;
  matrix.forEach((row, i) =>
    row.forEach((x, j) => {
      const opacity = Math.min(1, Math.abs(x) / (3 * rms || 1)).toFixed(3);
      const at = { x: left + j * cell, y: 22 + i * cell, width: cell, height: cell };
      root.append(svg("rect", { class: x < 0 ? "c-red" : "c-blue", "fill-opacity": opacity, ...at }));
    }),
  );
  root.append(svg("rect", { class: "rule", fill: "none", x: left, y: 22, width: size, height: size }));
}

/** Histogram in root mean squares, above the points of the grid. */
function drawHistogram(root, width, top, title, matrix, { rms, points }) {
  const lo = -6, hi = 6, tall = 70, x = linear([lo, hi], [8, width - 8]);
  const values = matrix.flat().map((w) => clamp(w / (rms || 1), lo, hi - 1e-9));
  const counts = bins(values, lo, hi, 48).map(Math.sqrt);
  const y = linear([0, max(counts)], [top + 20 + tall, top + 20]);
  root.append(svg("text", { class: "strong", x: 8, y: top + 13 }, title));
  counts.forEach((count, i) => {
    const from = x(lo + ((hi - lo) * i) / 48), wide = x(lo + (hi - lo) / 48) - x(lo) - 1;
    if (count) root.append(svg("rect", { class: "c-blue", x: from, width: wide, y: y(count), height: y(0) - y(count) }));
  });
  const d = points.filter((p) => p >= lo && p <= hi).map((p) => `M${x(p).toFixed(2)},${top + 22 + tall}v12`).join("");
  root.append(svg("path", { class: "s-red ticks", d }));
  axis(root, x, { y: top + 38 + tall, ticks: 7 });
}

function describe({ outputs, inputs, bits, half, outlier }, { first, second }) {
  const sides = outputs && inputs ? "Outputs and inputs rotated" : outputs ? "Outputs rotated" : inputs ? "Inputs rotated" : "Nothing rotated";
  return (
    `${sides}, largest weight ${outlier === 1 ? "as it is" : `× ${fmt(outlier)}`}: μ is ${first.mu.toFixed(2)} before and ` +
    `${second.mu.toFixed(2)} after. On ${2 ** bits} values within ± ${fmt(half)} root mean squares, rounding loses ` +
    `${(100 * first.error).toFixed(1)} % of the weight's energy before and ${(100 * second.error).toFixed(1)} % after; ` +
    `${(100 * first.clipped).toFixed(1)} % and ${(100 * second.clipped).toFixed(1)} % of the weights lie beyond the grid.`
  );
}

export default {
  render({ model, el }) {
    const items = {
      outlier: slider({ label: "largest weight", min: 1, max: 40, step: 1, format: (x) => `× ${x}` }),
      outputs: toggle({ label: "rotate outputs" }),
      inputs: toggle({ label: "rotate inputs" }),
      bits: slider({ label: "bits", min: 2, max: 6 }),
      half: slider({ label: "range of the grid", min: 1, max: 6, step: 0.1, format: (x) => `± ${fmt(x)} RMS` }),
    };
    const fixed = { weights: model.get("weights"), u: model.get("u"), v: model.get("v") };
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    const side = (width) => Math.min(260, (width - 28) / 2);
    let result = null;
    const maps = picture({
      label: "Heat maps of the weight before and after rotation",
      height: (width) => side(width) + 28,
      draw: (root, width) => {
        drawHeat(root, 8, side(width), "before", result.before, result.first.rms);
        drawHeat(root, 20 + side(width), side(width), "after", result.after, result.second.rms);
      },
    });
    const histograms = picture({
      label: "Histograms of the weight before and after rotation, above the grid points",
      height: 300,
      draw: (root, width) => {
        drawHistogram(root, width, 0, "before, in RMS (√ count)", result.before, result.first);
        drawHistogram(root, width, 148, "after", result.after, result.second);
      },
    });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), maps.node, histograms.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      maps.redraw();
      histograms.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
