// Chapter 08: a slice of a layer, its scale s = a^α / m^(1-α), and what rounding both sides costs. All in double precision.
// data: x [tokens][in], w [out][in], loudest (index of a channel), gain (that channel of x is multiplied by it), alpha,
// bits (of activations and weights), tokens (whether each token has a scale of its own; otherwise one for the tensor)

const POINTS = 20, SMALLEST = 1e-5;

const peaks = (rows) => rows[0].map((_, j) => max(rows.map((row) => Math.abs(row[j]))));

/** s of each channel; 1 for a channel that is never active. */
function scaleOf(a, m, alpha) {
  return a.map((v, j) => (v > 0 ? Math.max(v ** alpha / Math.max(m[j], SMALLEST) ** (1 - alpha), SMALLEST) : 1));
}

/** Rounded to nearest on a symmetric grid: a scale for each row, or one for all of them. */
function rounded(rows, bits, each) {
  const top = 2 ** (bits - 1) - 1, size = (row) => max(row.map(Math.abs));
  const all = max(rows.map(size));
  return rows.map((row) => {
    const step = (each ? size(row) : all) / top || 1;
    return row.map((v) => step * roundEven(v / step));
  });
}

const outputs = (x, w) => x.map((row) => w.map((line) => sum(line.map((v, j) => v * row[j]))));

/** Squared difference of two matrices over the squared size of the second. */
function relative(y, exact) {
  const difference = sum(y.flatMap((row, t) => row.map((v, i) => (v - exact[t][i]) ** 2)));
  return difference / (sum(exact.flat().map((v) => v * v)) || 1);
}

/** Output error where only x, only w, or both are rounded, at one exponent. */
function errorsAt(x, w, s, bits, tokens, exact) {
  const xs = x.map((row) => row.map((v, j) => v / s[j])), ws = w.map((row) => row.map((v, j) => v * s[j]));
  const xq = rounded(xs, bits, tokens), wq = rounded(ws, bits, true);
  return { x: relative(outputs(xq, ws), exact), w: relative(outputs(xs, wq), exact), both: relative(outputs(xq, wq), exact) };
}

/** Ranges of all channels before and after, the errors along α, without a scale, and the best α. */
export function compute({ x: given, w, loudest, gain, alpha, bits, tokens }) {
  const x = given.map((row) => row.map((v, j) => (j === loudest ? gain * v : v)));
  const a = peaks(x), m = peaks(w), exact = outputs(x, w);
  const alphas = Array.from({ length: POINTS + 1 }, (_, i) => i / POINTS);
  const curve = alphas.map((v) => errorsAt(x, w, scaleOf(a, m, v), bits, tokens, exact));
  const both = curve.map((e) => e.both), scale = scaleOf(a, m, alpha);
  return {
    alphas, scale, curve, chosen: Math.round(alpha * POINTS), best: both.indexOf(-max(both.map((e) => -e))),
    none: errorsAt(x, w, a.map(() => 1), bits, tokens, exact),
    before: { x: a, w: m }, after: { x: a.map((v, j) => v / scale[j]), w: m.map((v, j) => v * scale[j]) },
  };
}

/** Peaks of x upwards and of w downwards, each over its own largest: the height is the share of the codes a channel uses. */
function drawRanges(root, left, width, title, { x, w }, loudest) {
  const tall = 74, top = 24, step = width / x.length, most = { x: max(x), w: max(w) };
  root.append(svg("text", { class: "strong", x: left, y: 13 }, title));
  const bar = (j, y, height, color) =>
    root.append(svg("rect", { class: `c-${color}`, x: left + j * step, width: Math.max(step - 1, 0.5), y, height }));
  x.forEach((v, j) => {
    const up = tall * (v / (most.x || 1)), down = tall * (w[j] / (most.w || 1));
    bar(j, top + tall - up, up, j === loudest ? "red" : "blue");
    bar(j, top + tall + 3, down, j === loudest ? "red" : "orange");
  });
  root.append(svg("line", { class: "rule", x1: left, x2: left + width, y1: top + tall + 1.5, y2: top + tall + 1.5 }));
}

const LEFT = 52, RIGHT = 12, SERIES = [["x", "blue", "2 3"], ["w", "orange", "7 4"], ["both", "red", ""]];

const power = (v) => (v === 0 ? "1" : `10${[...String(v)].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("")}`);

/** Errors against α on a logarithmic axis, with the error without a scale as a level. */
function drawCurves(root, width, height, { alphas, curve, none, chosen, best }) {
  const log = (v) => Math.log10(Math.max(v, 1e-12)), all = curve.flatMap((e) => [log(e.x), log(e.w), log(e.both)]);
  const lo = Math.floor(-max([...all, log(none.both)].map((v) => -v))), hi = Math.ceil(max([...all, log(none.both)]));
  const px = linear([0, 1], [LEFT, width - RIGHT]), py = linear([lo, hi], [height - 44, 10]);
  for (let v = lo; v <= hi; v += 1) {
    root.append(svg("text", { class: "muted", x: LEFT - 6, y: py(v) + 4, "text-anchor": "end" }, power(v)));
    root.append(svg("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: py(v), y2: py(v) }));
  }
  const level = py(log(none.both));
  root.append(svg("line", { class: "s-grey", x1: LEFT, x2: width - RIGHT, y1: level, y2: level, "stroke-dasharray": "1 4" }));
  for (const [key, color, dash] of SERIES) {
    const points = alphas.map((v, i) => `${px(v).toFixed(2)},${py(log(curve[i][key])).toFixed(2)}`).join(" ");
    root.append(svg("polyline", { class: `s-${color}`, points, "stroke-dasharray": dash }));
  }
  root.append(svg("circle", { class: "c-red", cx: px(alphas[best]), cy: py(log(curve[best].both)), r: 5 }));
  root.append(svg("circle", { class: "s-red", cx: px(alphas[chosen]), cy: py(log(curve[chosen].both)), r: 8 }));
  axis(root, px, { y: height - 40, ticks: 5, label: "α, migration strength" });
}

const percent = (v) => `${fmt(100 * v, 2)} %`;

function describe({ alpha, bits, tokens, gain, loudest }, r) {
  const e = r.curve[r.chosen], top = 2 ** (bits - 1) - 1, typical = (v) => [...v].sort((p, q) => p - q)[Math.floor(v.length / 2)];
  const steps = (v) => Math.floor((top * typical(v)) / (max(v) || 1) + 0.5);
  return (
    `α = ${alpha.toFixed(2)}, ${bits} bits, ${tokens ? "a scale for each token" : "one scale for all tokens"}` +
    `${gain === 1 ? "" : `, loudest channel × ${gain}`}: the loudest channel is divided by ${fmt(r.scale[loudest])}. ` +
    `The median channel of x reaches code ${steps(r.after.x)} of ${top} (${steps(r.before.x)} without smoothing), that of w ` +
    `${steps(r.after.w)} (${steps(r.before.w)}). Output error ${percent(e.both)}: ${percent(e.x)} from x, ${percent(e.w)} from w; ` +
    `${percent(r.none.both)} without smoothing. The best α is ${r.alphas[r.best].toFixed(2)}, with ${percent(r.curve[r.best].both)}.`
  );
}

export default {
  render({ model, el }) {
    const items = {
      alpha: slider({ label: "α", min: 0, max: 1, step: 0.05, format: (v) => v.toFixed(2) }),
      gain: slider({ label: "loudest channel", min: 1, max: 16, format: (v) => `× ${v}` }),
      bits: slider({ label: "bits", min: 4, max: 8 }),
      tokens: toggle({ label: "a scale for each token" }),
    };
    const fixed = Object.fromEntries(["x", "w", "loudest"].map((key) => [key, model.get(key)]));
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const ranges = picture({
      label: "Largest entries of each channel of x, upwards, and of w, downwards, without and with smoothing",
      height: 180,
      draw: (root, width) => {
        const half = (width - 20) / 2;
        drawRanges(root, 0, half, "without a scale", result.before, fixed.loudest);
        drawRanges(root, half + 20, half, "smoothed", result.after, fixed.loudest);
      },
    });
    const curves = picture({
      label: "Output error over α: from x alone, from w alone, and from both; the dotted level is the error without smoothing",
      height: 260,
      draw: (root, width, height) => drawCurves(root, width, height, result),
    });
    const live = liveRegion();
    const key = legend([["blue", "x: upward bars, dots"], ["orange", "w: downward bars, dashes"], ["red", "loudest channel; both rounded (line)"], ["grey", "without smoothing"]]);
    el.append(controls(...Object.values(items)), key, ranges.node, curves.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      ranges.redraw();
      curves.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
