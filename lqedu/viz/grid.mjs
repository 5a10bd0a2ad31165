// Chapter 02: which values can a few bits store, and what does a row of weights lose on them?
// data: weights (one row), bits, symmetric, group (weights a scale), outlier (the largest weight is multiplied by it)

/** One group of weights on its own grid: IntGrid with MINMAX_ZERO (asymmetric) or FULL_RANGE (symmetric) scales. */
function quantizeGroup(w, bits, symmetric) {
  const levels = 2 ** bits;
  const low = symmetric ? -levels / 2 : 0, high = low + levels - 1;
  const hi = Math.max(max(w), 0), lo = -Math.max(max(w.map((x) => -x)), 0);
  const exact = symmetric ? f32(Math.max(hi, -lo) / ((levels - 1) / 2)) : f32(f32(hi - lo) / (levels - 1));
  const scale = f16(exact) || 1; // a group of zeros has no range: any scale will do
  const zero = symmetric ? 0 : clamp(roundEven(f32(-lo / scale)), 0, high);
  const codes = w.map((x) => clamp(roundEven(f32(x / scale)) + zero, low, high));
  const points = Array.from({ length: levels }, (_, i) => f32(scale * (low + i - zero)));
  return { scale, zero, codes, points, w_hat: codes.map((q) => f32(scale * (q - zero))) };
}

/** The row with its largest weight multiplied by the outlier factor. */
function withOutlier(weights, outlier) {
  const w = weights.map(f32);
  const sizes = w.map(Math.abs);
  const index = sizes.indexOf(max(sizes));
  w[index] = f32(w[index] * outlier);
  return w;
}

/** Codes, values and errors of a row. Bits per weight count scales (16 bits) and zero points (b bits). */
export function compute({ weights, bits, symmetric, group, outlier = 1 }) {
  const w = withOutlier(weights, outlier);
  const groups = [];
  for (let start = 0; start < w.length; start += group) {
    groups.push(quantizeGroup(w.slice(start, start + group), bits, symmetric));
  }
  const w_hat = groups.flatMap((g) => g.w_hat);
  const errors = w.map((x, i) => f32(w_hat[i] - x));
  const sizes = errors.map(Math.abs);
  return {
    w, w_hat, errors,
    codes: groups.flatMap((g) => g.codes),
    scales: groups.map((g) => g.scale),
    zeros: groups.map((g) => g.zero),
    points: groups.map((g) => g.points),
    used: mean(groups.map((g) => new Set(g.codes).size)),
    max_error: max(sizes),
    mean_error: mean(sizes),
    bits_per_weight: bits + (16 + (symmetric ? 0 : bits)) / group,
  };
}

/** Weights above, the grid of each group below, on one line of numbers. */
function drawLine(root, width, result) {
  const top = 22, tall = 96, strip = 15;
  const [lo, hi] = extent([...result.w, ...result.points.flat()]);
  const x = linear([lo, hi], [8, width - 8]);
  const n = Math.max(24, Math.min(64, Math.floor(width / 11)));
  const counts = bins(result.w, lo, hi, n);
  const y = linear([0, max(counts)], [top + tall, top]);
  root.append(svg("text", { class: "strong", x: 8, y: 13 }, "weights"));
  counts.forEach((count, i) => {
    const left = x(lo + ((hi - lo) * i) / n), right = x(lo + ((hi - lo) * (i + 1)) / n);
    const bar = { class: "c-blue", x: left + 0.5, width: Math.max(right - left - 1, 1), y: y(count), height: y(0) - y(count) };
    if (count) root.append(svg("rect", bar));
  });
  root.append(svg("line", { class: "rule", x1: 8, x2: width - 8, y1: top + tall, y2: top + tall }));
  const title = result.points.length > 1 ? "grid points, one line a group" : "grid points";
  root.append(svg("text", { class: "strong", x: 8, y: top + tall + 20 }, title));
  const first = top + tall + 28;
  result.points.forEach((points, i) => {
    const at = first + i * strip;
    root.append(svg("path", { class: "s-red ticks", d: points.map((p) => `M${x(p).toFixed(2)},${at}v${strip - 4}`).join("") }));
  });
  axis(root, x, { y: first + result.points.length * strip + 2, ticks: width < 420 ? 4 : 7 });
}

/** The error of every weight of the row, in order. */
function drawErrors(root, width, height, result) {
  const left = 8, bottom = height - 20, top = 24;
  const x = linear([0, result.errors.length], [left, width - 8]);
  const y = linear([0, result.max_error || 1], [bottom, top]);
  root.append(svg("text", { class: "strong", x: left, y: 13 }, `error of each weight, up to ${fmt(result.max_error)}`));
  const wide = Math.max(x(1) - x(0) - 0.6, 0.6);
  result.errors.forEach((e, i) => {
    const tall = bottom - y(Math.abs(e));
    if (tall > 0) root.append(svg("rect", { class: "c-orange", x: x(i), width: wide, y: bottom - tall, height: tall }));
  });
  const size = result.errors.length / result.scales.length;
  for (let i = size; i < result.errors.length; i += size) {
    root.append(svg("line", { class: "rule", x1: x(i), x2: x(i), y1: top, y2: bottom + 5, "stroke-dasharray": "3 3" }));
  }
  root.append(svg("line", { class: "rule", x1: left, x2: width - 8, y1: bottom, y2: bottom }));
  root.append(svg("text", { class: "muted", x: left, y: height - 4 }, "first weight"));
  root.append(svg("text", { class: "muted", x: width - 8, y: height - 4, "text-anchor": "end" }, "last"));
}

function describe({ bits, symmetric, group, outlier, weights }, result) {
  const kind = symmetric ? "symmetric" : "asymmetric";
  const shared = group === weights.length ? "one scale for the row" : `one scale for ${group} weights`;
  const largest = outlier === 1 ? "" : ` with the largest weight ${fmt(outlier)} times as large`;
  return (
    `${bits} bits, ${kind}, ${shared}${largest}: ${result.bits_per_weight.toFixed(2)} bits per weight, scales counted. ` +
    `Largest error ${fmt(result.max_error)}, mean error ${fmt(result.mean_error)}; ` +
    `${fmt(result.used)} of ${2 ** bits} grid points are used${result.scales.length > 1 ? " in a group, on average" : ""}.`
  );
}

export default {
  render({ model, el }) {
    const row = model.get("weights").length;
    const sizes = [row, row / 2, row / 4, row / 8].filter(Number.isInteger);
    const items = {
      bits: slider({ label: "bits", min: 2, max: 8 }),
      symmetric: choice({ label: "grid", options: [[false, "asymmetric"], [true, "symmetric"]] }),
      group: choice({ label: "weights a scale", options: sizes.map((g) => [g, g === row ? `${g} (the row)` : String(g)]) }),
      outlier: slider({ label: "largest weight", min: 1, max: 20, step: 0.5, format: (x) => `× ${x}` }),
    };
    const inputs = () => Object.fromEntries(["weights", ...Object.keys(items)].map((key) => [key, model.get(key)]));
    let result = null;
    const line = picture({
      label: "Histogram of the weights above the grid points",
      height: () => 22 + 96 + 28 + 15 * result.points.length + 26,
      draw: (root, width) => drawLine(root, width, result),
    });
    const errors = picture({
      label: "Bar chart of the error of each weight",
      height: 120,
      draw: (root, width, height) => drawErrors(root, width, height, result),
    });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), line.node, errors.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      line.redraw();
      errors.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
