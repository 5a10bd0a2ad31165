// Chapter 06: a zero point moves until the group's error is as small as half-quadratic splitting makes it.
// data: weights (one group), bits, p, beta (of the quadratic), steps

function shrink(x, beta, p) {
  const a = Math.abs(x);
  return a === 0 ? 0 : Math.sign(x) * Math.max(a - a ** (p - 1) / beta, 0);
}

/** Every iterate: zero points and mean |w - ŵ|, and the codes and decoded weights of the last one. In doubles. */
export function compute({ weights, bits, p, beta, steps }) {
  const top = 2 ** bits - 1;
  const [lo, hi] = extent(weights);
  const s = (hi - lo) / top || 1;
  const encode = (z) => weights.map((w) => clamp(roundEven(w / s + z), 0, top));
  const decode = (q, z) => q.map((code) => s * (code - z));
  const zeros = [], errors = [];
  let z = -lo / s;
  for (let step = 0; step <= steps; step += 1) {
    const q = encode(z), w_hat = decode(q, z);
    zeros.push(z);
    errors.push(mean(weights.map((w, i) => Math.abs(w - w_hat[i]))));
    z = mean(q.map((code, i) => code - (weights[i] - shrink(weights[i] - w_hat[i], beta, p)) / s));
  }
  const best = errors.indexOf(Math.min(...errors));
  const last = zeros[steps];
  const codes = encode(last), threshold = beta ** (-1 / (2 - p));
  const w_hat = decode(codes, last);
  const kept = weights.filter((w, i) => Math.abs(w - w_hat[i]) > threshold).length;
  return { scale: s, zeros, errors, codes, w_hat, best, threshold, kept };
}

function drawGroup(root, width, { weights, bits }, result) {
  const points = Array.from({ length: 2 ** bits }, (_, q) => result.scale * (q - result.zeros.at(-1)));
  const [lo, hi] = extent([...weights, ...points]);
  const x = linear([lo, hi], [14, width - 14]);
  for (const point of points) {
    root.append(svg("line", { class: "s-grey", "stroke-width": 2, x1: x(point), x2: x(point), y1: 22, y2: 74 }));
  }
  root.append(svg("text", { class: "muted", x: 8, y: 14 }, "grid points (lines), weights (dots), their errors (bars)"));
  weights.forEach((w, i) => {
    const y = 30 + ((i * 7) % 9) * 5;
    root.append(
      svg("line", { class: "s-orange", "stroke-width": 3, x1: x(w), x2: x(result.w_hat[i]), y1: y, y2: y }),
      svg("circle", { class: "c-blue", cx: x(w), cy: y, r: 4 }));
  });
  axis(root, x, { y: 82, ticks: width < 420 ? 4 : 7 });
}

function drawErrors(root, width, result) {
  const n = result.errors.length;
  const [, high] = extent(result.errors);
  const x = linear([0, Math.max(n - 1, 1)], [14, width - 14]);
  const y = linear([0, high], [120, 26]);
  root.append(svg("text", { class: "muted", x: 8, y: 14 }, "mean error after each step"));
  result.errors.forEach((error, i) => {
    if (i) root.append(svg("line", { class: "s-purple", "stroke-width": 2, x1: x(i - 1), x2: x(i), y1: y(result.errors[i - 1]), y2: y(error) }));
  });
  result.errors.forEach((error, i) => {
    root.append(svg("circle", { class: i === result.best ? "c-green" : "c-purple", cx: x(i), cy: y(error), r: i === result.best ? 7 : 4 }));
  });
  axis(root, x, { y: 126, ticks: Math.min(n - 1, 10) || 1, label: "step (the best is the large dot)" });
}

function describe({ beta, p, steps }, result) {
  const first = result.errors[0], best = result.errors[result.best];
  const active = result.kept === 0
    ? "all errors lie below the threshold, so the shrunk error is zero and the exponent does not matter"
    : `${result.kept} errors exceed the threshold and are kept in part`;
  return (
    `p = ${p}, β = ${beta}: the threshold is ${fmt(result.threshold)}; ${active}. After ${steps} steps the zero point moved from ` +
    `${fmt(result.zeros[0])} to ${fmt(result.zeros.at(-1))}. The best iterate, number ${result.best}, has ${fmt(100 * (1 - best / first))} % less error than the start.`
  );
}

export default {
  render({ model, el }) {
    const items = {
      bits: slider({ label: "bits", min: 2, max: 4 }),
      beta: choice({ label: "β", options: [3, 10, 30, 100, 300, 1000].map((b) => [b, String(b)]) }),
      p: choice({ label: "p", options: [0.5, 0.7, 1].map((p) => [p, String(p)]) }),
      steps: slider({ label: "steps", min: 0, max: 20 }),
    };
    const inputs = () => Object.fromEntries(["weights", ...Object.keys(items)].map((key) => [key, model.get(key)]));
    let result = null;
    const group = picture({
      label: "A group of weights on its grid, each with a bar to the grid point it is rounded to",
      height: 106,
      draw: (root, width) => drawGroup(root, width, inputs(), result),
    });
    const errors = picture({
      label: "Mean error of the group after each step",
      height: 168,
      draw: (root, width) => drawErrors(root, width, result),
    });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), group.node, errors.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      group.redraw();
      errors.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
