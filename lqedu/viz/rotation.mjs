// Chapter 09: activations of real tokens before and after a rotation made of small turns, and 4 bits with a scale a token.
// data: sources (name: tokens of 2^k features), signs (±1 a feature), source, outlier (each token's largest value is
// multiplied by it), flip (random signs first), size (log2 of the features that are mixed), angle (of every turn, degrees)

const BITS = 4, EDGE = 6, BARS = 60;

/** k = size turns of pairs of features that are 1, 2, 4, … apart. At 45 degrees: a Hadamard matrix over √(2^k). */
export function turn(x, size, angle) {
  const c = Math.cos((angle * Math.PI) / 180), s = Math.sin((angle * Math.PI) / 180);
  const y = [...x];
  for (let half = 1; half < 2 ** size; half *= 2) {
    for (let i = 0; i < y.length; i++) {
      if (i & half) continue; // i is the first of its pair
      const a = y[i], b = y[i + half];
      y[i] = c * a + s * b;
      y[i + half] = c * b - s * a;
    }
  }
  return y;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor((sorted.length - 1) / 2)]; // the lower of two, as torch
}

/** Means over tokens of max / median and kurtosis; energy that rounding loses; values and grid step in RMS. */
function measure(tokens) {
  const parts = tokens.map((token) => {
    const x = token.map(f32), sizes = x.map(Math.abs), top = max(sizes);
    const step = top ? f32(top / (2 ** (BITS - 1) - 1)) : 1;
    const codes = x.map((v) => clamp(roundEven(f32(v / step)), -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1));
    const square = mean(token.map((v) => v * v)), rms = Math.sqrt(square) || 1;
    return {
      ratio: top / (median(sizes) || 1),
      kurtosis: mean(token.map((v) => v ** 4)) / (square * square || 1),
      lost: sum(x.map((v, i) => (v - f32(step * codes[i])) ** 2)),
      zeros: codes.filter((q) => q === 0).length,
      energy: sum(x.map((v) => v * v)),
      step: step / rms,
      values: token.map((v) => v / rms),
    };
  });
  return {
    ratio: mean(parts.map((p) => p.ratio)),
    kurtosis: mean(parts.map((p) => p.kurtosis)),
    error: sum(parts.map((p) => p.lost)) / (sum(parts.map((p) => p.energy)) || 1),
    zeros: sum(parts.map((p) => p.zeros)) / sum(tokens.map((t) => t.length)),
    step: mean(parts.map((p) => p.step)),
    values: parts.flatMap((p) => p.values),
  };
}

/** Both sides and their numbers. */
export function compute({ sources, signs, source, outlier, flip, size, angle }) {
  const before = sources[source].map((token) => {
    const sizes = token.map(Math.abs), at = sizes.indexOf(max(sizes));
    return token.map((x, i) => (i === at ? outlier * x : x));
  });
  const after = before.map((token) => turn(flip ? token.map((x, i) => signs[i] * x) : token, size, angle));
  return { before: measure(before), after: measure(after), rotated: after };
}

/** Histogram in RMS, bars as tall as √count, the Gaussian of the same area, and the 16 values of a mean token below. */
function drawHistogram(root, width, top, title, { values, step }) {
  const tall = 96, x = linear([-EDGE, EDGE], [8, width - 8]), base = top + 22 + tall;
  const counts = bins(values.map((v) => clamp(v, -EDGE, EDGE - 1e-9)), -EDGE, EDGE, BARS).map(Math.sqrt);
  const gauss = (v) => Math.sqrt(((values.length * 2 * EDGE) / BARS) * Math.exp((-v * v) / 2) / Math.sqrt(2 * Math.PI));
  const y = linear([0, Math.max(max(counts), gauss(0))], [base, top + 22]);
  root.append(svg("text", { class: "strong", x: 8, y: top + 13 }, title));
  counts.forEach((count, i) => {
    const from = x(-EDGE + (2 * EDGE * i) / BARS), wide = (x(EDGE) - x(-EDGE)) / BARS - 1;
    if (count) root.append(svg("rect", { class: "c-blue", x: from, width: wide, y: y(count), height: base - y(count) }));
  });
  const curve = Array.from({ length: 97 }, (_, i) => -EDGE + (2 * EDGE * i) / 96);
  root.append(svg("path", { class: "s-red line", fill: "none", d: "M" + curve.map((v) => `${x(v).toFixed(1)},${y(gauss(v)).toFixed(1)}`).join("L") }));
  const points = Array.from({ length: 2 ** BITS }, (_, i) => step * (i - 2 ** (BITS - 1))).filter((p) => Math.abs(p) <= EDGE);
  root.append(svg("path", { class: "s-red ticks", d: points.map((p) => `M${x(p).toFixed(1)},${base + 2}v12`).join("") }));
  axis(root, x, { y: base + 18, ticks: 7 });
}

function describe({ source, outlier, flip, size, angle }, { before, after }) {
  const turned = angle === 0 ? "not turned" : `turned by ${angle}° in blocks of ${2 ** size}`;
  const who = `${source}, largest value ${outlier === 1 ? "as it is" : `× ${fmt(outlier)}`}, ${turned}${flip ? ", behind random signs" : ""}`;
  const row = (name, m) =>
    `${name}: max over median ${fmt(m.ratio)}, kurtosis ${fmt(m.kurtosis)}; 4 bits lose ` +
    `${(100 * m.error).toFixed(1)} % of the energy and turn ${(100 * m.zeros).toFixed(0)} % of the values into zero.`;
  return `${who}. ${row("Before", before)} ${row("After", after)}`;
}

export default {
  render({ model, el }) {
    const sources = model.get("sources");
    const length = Object.values(sources)[0][0].length;
    const items = {
      source: choice({ label: "activations", options: Object.keys(sources).map((name) => [name, name]) }),
      outlier: slider({ label: "largest value", min: 1, max: 20, step: 1, format: (x) => `× ${x}` }),
      flip: toggle({ label: "random signs first" }),
      size: slider({ label: "features mixed", min: 1, max: Math.log2(length), format: (x) => String(2 ** x) }),
      angle: slider({ label: "angle of every turn", min: 0, max: 45, step: 1, format: (x) => `${x}°` }),
    };
    const fixed = { sources, signs: model.get("signs") };
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const histograms = picture({
      label: "Histograms of the activations before and after rotation, above the values of a 4-bit grid",
      height: 344,
      draw: (root, width) => {
        drawHistogram(root, width, 0, "before, in RMS (√ count)", result.before);
        drawHistogram(root, width, 172, "after", result.after);
      },
    });
    const live = liveRegion();
    const key = legend([["blue", "activations"], ["red", "a Gaussian, and the 16 values of the grid"]]);
    el.append(controls(...Object.values(items)), key, histograms.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      histograms.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
