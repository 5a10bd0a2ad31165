// Chapter 10: a vector with an outlier on its way through the butterfly of a fast Hadamard transform.
// data: noise and coins (64 numbers, 64 signs), n (features, a power of two), background ("noise" or "ones"), outlier (added
// to the feature `place`), signs (flip by coins first), step (which stage is drawn, 0 the input), bits (of the grid)

/** One step: features `half` apart become their sum and their difference, over √2. */
function butterfly(x, half) {
  const y = [...x];
  for (let i = 0; i < x.length; i += 1) {
    const partner = i ^ half;
    y[i] = (i & half ? x[partner] - x[i] : x[i] + x[partner]) * Math.SQRT1_2;
  }
  return y;
}

/** Largest magnitude over root mean square, and the energy lost on a symmetric grid that reaches the largest. */
function measure(x, bits) {
  const energy = sum(x.map((v) => v * v)), top = max(x.map(Math.abs)), code = 2 ** (bits - 1) - 1;
  if (!energy) return { peak: 0, error: 0, scale: 1 };
  const scale = top / code;
  const lost = sum(x.map((v) => (clamp(roundEven(v / scale), -code - 1, code) * scale - v) ** 2));
  return { peak: top / Math.sqrt(energy / x.length), error: lost / energy, scale };
}

/** The vector after each step with its numbers, and the bound ‖x‖₁ / ‖x‖ on the last peak. */
export function compute({ noise, coins, n, background, outlier, place, signs, bits }) {
  let x = noise.slice(0, n).map((v) => (background === "ones" ? 1 : v));
  x[place % n] += outlier;
  if (signs) x = x.map((v, i) => v * coins[i]);
  const stages = [{ values: x, ...measure(x, bits) }];
  for (let half = 1; half < n; half *= 2) {
    x = butterfly(x, half);
    stages.push({ values: x, ...measure(x, bits) });
  }
  const first = stages[0].values;
  const norm = Math.sqrt(sum(first.map((v) => v * v)));
  return { stages, bound: norm ? sum(first.map(Math.abs)) / norm : 0 };
}

const chosen = (result, step) => Math.min(step, result.stages.length - 1);

/** The vector at the chosen step as bars, over the points of its grid. */
function drawBars(root, width, result, { step, bits }) {
  const at = chosen(result, step), { values, scale } = result.stages[at];
  const reach = max(result.stages.map((stage) => max(stage.values.map(Math.abs)))) || 1;
  const y = linear([-reach, reach], [176, 24]), wide = (width - 44) / values.length;
  root.append(svg("text", { class: "strong", x: 8, y: 13 }, at ? `after step ${at}` : "the input"));
  const code = 2 ** (bits - 1) - 1;
  if (bits <= 6) {
    for (let q = -code; q <= code; q += 1)
      root.append(svg("line", { class: "s-red", "stroke-opacity": 0.35, x1: 36, x2: width - 8, y1: y(q * scale), y2: y(q * scale) }));
  }
  values.forEach((v, i) => {
    const from = Math.min(y(0), y(v)), tall = Math.max(1, Math.abs(y(v) - y(0)));
    root.append(svg("rect", { class: "c-blue", x: 36 + i * wide + 0.5, width: Math.max(1, wide - 1), y: from, height: tall }));
  });
  root.append(svg("line", { class: "rule", x1: 36, x2: width - 8, y1: y(0), y2: y(0) }));
  for (const v of [-reach, 0, reach])
    root.append(svg("text", { class: "muted", x: 31, y: y(v) + 4, "text-anchor": "end" }, fmt(v, 2)));
}

/** One number of all steps as a line, the chosen step marked. */
function drawLine(root, width, top, title, numbers, at, format) {
  const x = linear([0, Math.max(1, numbers.length - 1)], [48, width - 40]);
  const y = linear([0, max(numbers) || 1], [top + 88, top + 42]);
  root.append(svg("text", { class: "strong", x: 8, y: top + 13 }, title));
  const d = numbers.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(2)},${y(v).toFixed(2)}`).join("");
  root.append(svg("line", { class: "rule", x1: 40, x2: width - 32, y1: y(0), y2: y(0) }), svg("path", { class: "s-blue", fill: "none", d }));
  numbers.forEach((v, i) => {
    root.append(svg("circle", { class: i === at ? "c-red" : "c-blue", cx: x(i), cy: y(v), r: i === at ? 5 : 3 }));
    root.append(svg("text", { class: "muted", x: x(i), y: y(v) - 8, "text-anchor": "middle" }, format(v)));
    root.append(svg("text", { class: "muted", x: x(i), y: top + 104, "text-anchor": "middle" }, i));
  });
}

const percent = (v) => `${(100 * v).toFixed(1)} %`;

function describe({ n, background, outlier, place, signs, bits, step }, { stages, bound }) {
  const at = chosen({ stages }, step), last = stages.at(-1);
  const words = background === "ones" ? "equal features" : "Gaussian features";
  return (
    `${n} ${words}, ${outlier} added to feature ${place % n}, ${signs ? "random signs" : "no signs"}: the peak is ` +
    `${stages[0].peak.toFixed(2)} at first, ${stages[at].peak.toFixed(2)} after step ${at} and ${last.peak.toFixed(2)} at the end ` +
    `(bound ${bound.toFixed(2)}). At ${bits} bits, rounding loses ${percent(stages[0].error)} of the energy at first, ` +
    `${percent(stages[at].error)} after step ${at} and ${percent(last.error)} at the end.`
  );
}

export default {
  render({ model, el }) {
    const items = {
      n: choice({ label: "features", options: [8, 16, 32, 64].map((n) => [n, String(n)]) }),
      background: choice({ label: "vector", options: [["noise", "Gaussian"], ["ones", "all ones"]] }),
      outlier: slider({ label: "outlier", min: 0, max: 60, format: (x) => `+ ${x}` }),
      place: slider({ label: "its place", min: 0, max: 63 }),
      signs: toggle({ label: "random signs" }),
      step: slider({ label: "step shown", min: 0, max: 6 }),
      bits: slider({ label: "bits", min: 2, max: 8 }),
    };
    const fixed = { noise: model.get("noise"), coins: model.get("coins") };
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const vector = picture({
      label: "The vector at the chosen step, over the points of its grid",
      height: 190,
      draw: (root, width) => drawBars(root, width, result, inputs()),
    });
    const lines = picture({
      label: "Peak and lost energy after each step",
      height: 238,
      draw: (root, width) => {
        const at = chosen(result, inputs().step);
        drawLine(root, width, 0, "largest / RMS after each step", result.stages.map((s) => s.peak), at, (v) => v.toFixed(1));
        drawLine(root, width, 122, `energy lost at ${inputs().bits} bits`, result.stages.map((s) => s.error), at, percent);
      },
    });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), vector.node, lines.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      vector.redraw();
      lines.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
