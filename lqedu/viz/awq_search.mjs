// Chapter 05: the search for a scale, on a slice of a real layer. Everything in double precision.
// data: w [out][in], h [in][in], activation [in], strongest (index), bits, group, gain, alpha, path

const POINTS = 20, SMALLEST = 1e-4;

/** The inputs with the strongest channel made `gain` times stronger: its row and column of h, and its mean |x|. */
function strengthened({ h, activation, strongest, gain }) {
  const f = (i) => (i === strongest ? gain : 1);
  return { h: h.map((row, i) => row.map((x, j) => x * f(i) * f(j))), a: activation.map((x, i) => x * f(i)) };
}

/** Mean over rows of |w| relative to the largest of its group. */
function weightMagnitude(w, group) {
  const total = w[0].map(() => 0);
  w.forEach((row) => {
    for (let k = 0; k < row.length; k += group) {
      const top = Math.max(max(row.slice(k, k + group).map(Math.abs)), 1e-6);
      for (let i = k; i < k + group; i += 1) total[i] += Math.abs(row[i]) / top / w.length;
    }
  });
  return total;
}

/** s = a^alpha / m^beta, normalised so that its largest and smallest entry have the product 1. */
function scaleOf(a, m, alpha, beta) {
  const raw = a.map((x, i) => Math.max(x ** alpha / (m[i] ** beta + SMALLEST), SMALLEST));
  const centre = Math.sqrt(max(raw) * -max(raw.map((x) => -x)));
  return raw.map((x) => x / centre);
}

/** tr(d h d^T) for d = w - Q(w s) / s, with the asymmetric min-max grid of AWQ. */
function lossOf(w, h, s, bits, group) {
  const top = 2 ** bits - 1;
  return sum(w.map((row) => {
    const v = row.map((x, i) => x * s[i]);
    const d = new Float64Array(row.length);
    for (let k = 0; k < row.length; k += group) {
      const part = v.slice(k, k + group);
      const lo = -max(part.map((x) => -x)), step = (max(part) - lo) / top || 1;
      const z = clamp(roundEven(-lo / step), 0, top);
      for (let i = k; i < k + group; i += 1) {
        d[i] = row[i] - (step * (clamp(roundEven(v[i] / step) + z, 0, top) - z)) / s[i];
      }
    }
    let total = 0;
    for (let i = 0; i < d.length; i += 1) {
      let inner = 0;
      for (let j = 0; j < d.length; j += 1) inner += h[i][j] * d[j];
      total += d[i] * inner;
    }
    return total;
  }));
}

/** Losses over (beta, alpha), along AWQ's path (beta = 0) and the duo path (beta = 1 - alpha), relative to no scale. */
export function compute(inputs) {
  const { w, bits, group } = inputs, { h, a } = strengthened(inputs), m = weightMagnitude(w, group);
  const alphas = Array.from({ length: POINTS }, (_, i) => i / POINTS);
  const betas = [0, 0.25, 0.5, 0.75, 1];
  const none = lossOf(w, h, w[0].map(() => 1), bits, group);
  const at = (alpha, beta) => lossOf(w, h, scaleOf(a, m, alpha, beta), bits, group) / none;
  const landscape = betas.map((beta) => alphas.map((alpha) => at(alpha, beta)));
  const curves = { awq: landscape[0], duo: alphas.map((alpha) => at(alpha, 1 - alpha)) };
  const best = (losses) => losses.indexOf(-max(losses.map((x) => -x)));
  const scale = scaleOf(a, m, inputs.alpha, inputs.path === "duo" ? 1 - inputs.alpha : 0);
  return { alphas, betas, none, landscape, curves, best: { awq: best(curves.awq), duo: best(curves.duo) },
    chosen: Math.round(inputs.alpha * POINTS), scale };
}

const LEFT = 46, RIGHT = 10;

/** Above: both curves. Below: the landscape in logarithmic shades, darker is better, with the path that is searched. */
function draw(root, width, height, { path }, r) {
  const split = height * 0.6, x = linear([-0.5 / POINTS, 1 - 0.5 / POINTS], [LEFT, width - RIGHT]);
  const all = [...r.curves.awq, ...r.curves.duo].filter((v) => v < 3), top = Math.max(1.05, max(all));
  const y = linear([0, top], [split - 34, 8]);
  for (const v of ticks(0, top, 4)) {
    root.append(svg("text", { class: "muted", x: LEFT - 6, y: y(v) + 4, "text-anchor": "end", "font-size": 12 }, fmt(v)));
    root.append(svg("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: y(v), y2: y(v) }));
  }
  for (const [name, color, dash] of [["awq", "blue", ""], ["duo", "orange", "5 4"]]) {
    const points = r.curves[name].map((v, i) => `${x(r.alphas[i])},${y(Math.min(v, top))}`).join(" ");
    root.append(svg("polyline", { class: `s-${color}`, points, fill: "none", "stroke-width": name === path ? 3 : 1.5, "stroke-dasharray": dash }));
    root.append(svg("circle", { class: `c-${color}`, cx: x(r.alphas[r.best[name]]), cy: y(Math.min(r.curves[name][r.best[name]], top)), r: 5 }));
  }
  const now = r.curves[path][r.chosen];
  root.append(svg("circle", { class: "s-red", fill: "none", "stroke-width": 2.5, cx: x(r.alphas[r.chosen]), cy: y(Math.min(now, top)), r: 8 }));
  axis(root, x, { y: split - 30, ticks: 5, label: "α, exponent of the activation" });
  const cell = (width - LEFT - RIGHT) / POINTS, size = (height - split - 26) / r.betas.length;
  const least = -max(r.landscape.flat().map((v) => -v)), most = Math.min(max(r.landscape.flat()), 2);
  r.landscape.forEach((row, k) => {
    const at = height - 4 - (k + 1) * size;
    row.forEach((v, i) => root.append(svg("rect", { class: "c-blue", x: LEFT + i * cell, y: at, width: cell - 1, height: size - 1,
      "fill-opacity": 0.05 + 0.9 * clamp(Math.log(most / v) / (Math.log(most / least) || 1), 0, 1) })));
    root.append(svg("text", { class: "muted", x: LEFT - 6, y: at + size / 2 + 4, "text-anchor": "end", "font-size": 12 }, `β ${r.betas[k]}`));
  });
  const beta = (b) => height - 4 - (b * (r.betas.length - 1) + 0.5) * size, middle = x;
  const end = 1 - 1 / POINTS;
  const line = path === "awq" ? [middle(0), beta(0), middle(end), beta(0)] : [middle(0), beta(1), middle(end), beta(1 - end)];
  root.append(svg("line", { class: "s-red", x1: line[0], y1: line[1], x2: line[2], y2: line[3], "stroke-width": 2, "stroke-dasharray": "5 4" }));
  const b = path === "awq" ? 0 : 1 - r.alphas[r.chosen];
  root.append(svg("circle", { class: "s-red", fill: "none", "stroke-width": 2.5, cx: middle(r.alphas[r.chosen]), cy: beta(b), r: 8 }));
}

function describe({ bits, gain, path }, r) {
  const name = path === "duo" ? "duo scaling" : "AWQ", best = r.best[path], share = (i) => (100 * r.curves[path][i]).toFixed(0);
  return `${bits} bits, strongest channel × ${gain}. At α = ${r.alphas[r.chosen].toFixed(2)}, ${name} leaves ${share(r.chosen)} % of the error of ` +
    `plain rounding; its scales span a factor of ${fmt(max(r.scale) ** 2)}. The best α is ${r.alphas[best].toFixed(2)}, with ${share(best)} %.`;
}

export default {
  render({ model, el }) {
    const columns = model.get("w")[0].length;
    const items = {
      alpha: slider({ label: "α", min: 0, max: 0.95, step: 0.05, format: (x) => x.toFixed(2) }),
      path: choice({ label: "scale", options: [["awq", "s = a^α (AWQ)"], ["duo", "s = a^α / m^(1-α) (duo)"]] }),
      gain: slider({ label: "strongest channel ×", min: 1, max: 8 }),
      bits: slider({ label: "bits", min: 2, max: 5 }),
      group: choice({ label: "group", options: [1, 2, 4].map((k) => [columns / k, `${columns / k}`]) }),
    };
    const keys = ["w", "h", "activation", "strongest", "bits", "group", "gain", "alpha", "path"];
    const inputs = () => Object.fromEntries(keys.map((key) => [key, model.get(key)]));
    let result = null;
    const view = picture({
      label: "Output error over the exponent for both kinds of scale, and below it the landscape over the exponents of activation and weight; dark is good",
      height: () => 400,
      draw: (root, width, height) => draw(root, width, height, inputs(), result),
    });
    const live = liveRegion();
    const key = legend([["blue", "AWQ"], ["orange", "duo scaling (dashed)"], ["red", "α chosen, path searched"]]);
    el.append(controls(...Object.values(items)), key, view.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      view.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
