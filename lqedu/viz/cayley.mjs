// Chapter 11: descent on rotations of three features, by Cayley steps and by steps that leave the manifold.
// data: points (rows of three features, the first is the outlier), start (3 x 3 rotation), method ("cayley", "unbounded",
// "exact", "plain", "gram"), rate (log10 of the learning rate), iterations (of the fixed point), steps

const mul = (a, b) => a.map((row) => b[0].map((_, j) => sum(row.map((x, k) => x * b[k][j]))));
const transpose = (m) => m[0].map((_, j) => m.map((row) => row[j]));
const combine = (a, s, b) => a.map((row, i) => row.map((x, j) => x + s * b[i][j])); // a + s b
const EYE = [[1, 0, 0], [0, 1, 0], [0, 0, 1]];
const distance = (a, b) => Math.sqrt(sum(a.flatMap((row, i) => row.map((x, j) => (x - b[i][j]) ** 2))));
const largest = (m) => max(m.flat().map(Math.abs));
export const defect = (r) => largest(combine(mul(transpose(r), r), -1, EYE));

/** Inverse of a 3 x 3 matrix by cofactors. */
function inverse(m) {
  const minor = (i, j) => {
    const [a, b] = [0, 1, 2].filter((k) => k !== i), [c, d] = [0, 1, 2].filter((k) => k !== j);
    return (m[a][c] * m[b][d] - m[a][d] * m[b][c]) * ((i + j) % 2 ? -1 : 1);
  };
  const det = sum([0, 1, 2].map((j) => m[0][j] * minor(0, j)));
  return EYE.map((row, i) => row.map((_, j) => minor(j, i) / det));
}

/** Fourth powers of the rotated points over those of their lengths, and the gradient with respect to r. */
function lossAndGradient(points, r) {
  const u = mul(points, r);
  const total = sum(points.map((x) => sum(x.map((v) => v * v)) ** 2));
  const cubes = u.map((row) => row.map((v) => (4 * v ** 3) / total));
  return { loss: sum(u.flat().map((v) => v ** 4)) / total, gradient: mul(transpose(points), cubes), u };
}

/** Columns made orthonormal one after the other. */
function gramSchmidt(r) {
  const columns = [];
  for (const column of transpose(r)) {
    let v = column;
    for (const q of columns) {
      const dot = sum(v.map((x, i) => x * q[i]));
      v = v.map((x, i) => x - dot * q[i]);
    }
    const length = Math.sqrt(sum(v.map((x) => x * x)));
    columns.push(v.map((x) => x / length));
  }
  return transpose(columns);
}

/** One step: the next r, the step size, the contraction of the fixed point and its distances from the exact transform. */
function step(r, gradient, { method, rate, iterations }) {
  const lr = 10 ** rate, w = mul(gradient, transpose(r));
  const a = w.map((row, i) => row.map((x, j) => (x - w[j][i]) / 2));
  const column = max(transpose(a).map((c) => sum(c.map(Math.abs))));
  const tau = method === "cayley" ? Math.min(lr, 1 / (column + 1e-8)) : lr;
  const contraction = (tau / 2) * Math.sqrt(a[0][1] ** 2 + a[0][2] ** 2 + a[1][2] ** 2); // τ ‖A‖₂ / 2 of a 3 x 3 matrix
  const exact = mul(mul(inverse(combine(EYE, tau / 2, a)), combine(EYE, -tau / 2, a)), r);
  let y = combine(r, -tau, mul(a, r));
  const errors = [distance(y, exact)];
  for (let k = 0; k < iterations; k += 1) {
    y = combine(r, -tau / 2, mul(a, combine(r, 1, y)));
    errors.push(distance(y, exact));
  }
  if (method === "exact") return { next: exact, tau, contraction, errors };
  if (method === "plain") return { next: combine(r, -lr, gradient), tau, contraction, errors };
  if (method === "gram") return { next: gramSchmidt(combine(r, -lr, gradient)), tau, contraction, errors };
  for (let k = 0; k < 2; k += 1) { // Newton-Schulz
    const gram = mul(transpose(y), y);
    y = mul(y, EYE.map((row, i) => row.map((x, j) => (3 * x - gram[i][j]) / 2)));
  }
  return { next: y, tau, contraction, errors };
}

/** The whole descent. `stopped` is the step at which an entry became larger than 100, or -1. */
export function compute({ points, start, method, rate, iterations, steps }) {
  let r = start, last = null, stopped = -1;
  const losses = [], defects = [], path = [];
  for (let k = 0; k <= steps; k += 1) {
    const { loss, gradient, u } = lossAndGradient(points, r);
    losses.push(loss);
    defects.push(defect(r));
    path.push(u[0]);
    const now = step(r, gradient, { method, rate, iterations });
    last = now;
    if (k === steps) break;
    if (!(largest(now.next) < 100)) { stopped = k + 1; break; }
    r = now.next;
  }
  const { tau, contraction, errors } = last;
  return { losses, defects, path, rotation: r, rotated: mul(points, r), tau, contraction, errors, stopped };
}

const VIEW = (() => { // the corner (1, 1, 1) turned to the reader, a little from above
  const unit = (v) => { const n = Math.sqrt(sum(v.map((x) => x * x))); return v.map((x) => x / n); };
  const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
  const front = unit([1, 0.8, 0.7]), right = unit(cross([0, 0, 1], front));
  return [right, cross(front, right), front];
})();
const project = (v) => VIEW.map((axis) => sum(axis.map((x, i) => x * v[i]))); // right, up, towards the reader

/** The sphere, shaded by the loss of a point there, and the outlier's way over it. */
function drawSphere(root, width, tall, points, result) {
  const radius = Math.min(tall / 2 - 24, width / 2 - 40), cx = width / 2, cy = tall / 2 + 6, n = 30, cell = (2 * radius) / n;
  root.append(svg("text", { class: "strong", x: 8, y: 13 }, "where the outlier points, step by step"));
  for (let i = 0; i < n; i += 1) for (let j = 0; j < n; j += 1) {
    const a = ((j + 0.5) / n) * 2 - 1, b = 1 - ((i + 0.5) / n) * 2, c2 = 1 - a * a - b * b;
    if (c2 < 0) continue;
    const v = EYE.map((_, k) => a * VIEW[0][k] + b * VIEW[1][k] + Math.sqrt(c2) * VIEW[2][k]);
    const share = (sum(v.map((x) => x ** 4)) - 1 / 3) / (2 / 3);
    root.append(svg("rect", { class: "c-orange", "fill-opacity": (0.75 * share).toFixed(3), x: cx - radius + j * cell, y: cy - radius + i * cell, width: cell, height: cell }));
  }
  root.append(svg("circle", { class: "rule", cx, cy, r: radius }));
  const at = (v) => { const [a, b, c] = project(v); return [cx + radius * a, cy - radius * b, c]; };
  EYE.forEach((axis, i) => {
    const [x, y] = at(axis.map((v) => 1.13 * v));
    root.append(svg("text", { class: "muted", x, y: y + 4, "text-anchor": "middle" }, `${i + 1}`));
  });
  const length = Math.sqrt(sum(points[0].map((x) => x * x)));
  const way = result.path.map((u) => at(u.map((x) => clamp(x / length, -3, 3))));
  root.append(svg("path", { class: "s-blue", d: way.map(([x, y], k) => `${k ? "L" : "M"}${x.toFixed(2)},${y.toFixed(2)}`).join("") }));
  way.forEach(([x, y], k) => root.append(svg("circle", { class: k === way.length - 1 ? "c-red" : "c-blue", cx: x.toFixed(2), cy: y.toFixed(2), r: k === way.length - 1 ? 5 : 2.5 })));
}

/** A line of values over its steps. */
function drawLine(root, { left, right, top, bottom, title, values, lo, hi, colour, label }) {
  const x = linear([0, Math.max(values.length - 1, 1)], [left, right]), y = linear([lo, hi], [bottom, top]);
  root.append(svg("text", { class: "strong", x: left, y: top - 9 }, title));
  for (const level of [lo, hi]) root.append(svg("line", { class: "rule", x1: left, x2: right, y1: y(level), y2: y(level) }), svg("text", { class: "muted", x: right, y: y(level) - 3, "text-anchor": "end" }, label(level)));
  root.append(svg("path", { class: `s-${colour}`, d: values.map((v, k) => `${k ? "L" : "M"}${x(k).toFixed(2)},${y(clamp(v, lo, hi)).toFixed(2)}`).join("") }));
  values.forEach((v, k) => root.append(svg("circle", { class: `c-${colour}`, cx: x(k).toFixed(2), cy: y(clamp(v, lo, hi)).toFixed(2), r: 2 })));
}

function drawCharts(root, width, result) {
  const edges = { left: 8, right: width - 8 }, log = (v) => Math.log10(Math.max(v, 1e-16));
  drawLine(root, { ...edges, top: 30, bottom: 92, title: "loss (of a rotation: at least 1/3)", values: result.losses, lo: 0, hi: 1, colour: "blue", label: (v) => fmt(v) });
  drawLine(root, { ...edges, top: 134, bottom: 196, title: "largest entry of RᵀR − I", values: result.defects.map(log), lo: -16, hi: 0, colour: "red", label: (v) => (v ? "10⁻¹⁶" : "1") });
  drawLine(root, { ...edges, top: 238, bottom: 300, title: "next step: distance from exact", values: result.errors.map(log), lo: -8, hi: 1, colour: "green", label: (v) => (v < 0 ? "10⁻⁸" : "10") });
}

const NAMES = { cayley: "Cayley steps within the bound", unbounded: "Cayley steps without the bound", exact: "exact Cayley steps without a bound", plain: "plain gradient steps", gram: "gradient steps, made orthogonal again" };

function describe({ method, steps, iterations }, result) {
  const n = result.losses.length - 1;
  const end = result.stopped < 0 ? "" : ` Step ${result.stopped} left the picture, and the run stopped.`;
  return (
    `${NAMES[method]}: after ${n} of ${steps} the loss is ${result.losses[n].toFixed(4)}, from ${result.losses[0].toFixed(4)}; ` +
    `RᵀR − I has an entry of ${fmt(result.defects[n], 2)}.${end} A Cayley step from here would have τ = ${fmt(result.tau)}; its fixed point multiplies the error by ` +
    `${fmt(result.contraction)} and is ${fmt(result.errors[iterations], 2)} from the exact transform after ${iterations} iterations.`
  );
}

export default {
  render({ model, el }) {
    const items = {
      method: choice({ label: "step", options: Object.entries(NAMES) }),
      rate: slider({ label: "learning rate", min: -1, max: 2, step: 0.1, format: (x) => fmt(10 ** x, 2) }),
      iterations: slider({ label: "fixed-point iterations", min: 0, max: 10 }),
      steps: slider({ label: "steps", min: 0, max: 40 }),
    };
    const fixed = { points: model.get("points"), start: model.get("start") };
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const sphere = picture({ label: "Path of the outlier over the unit sphere", height: 290, draw: (root, width, tall) => drawSphere(root, width, tall, fixed.points, result) });
    const charts = picture({ label: "Loss, orthogonality and fixed-point error", height: 310, draw: (root, width) => drawCharts(root, width, result) });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), sphere.node, charts.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      sphere.redraw();
      charts.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
