// Chapter 04: GPTQ on a small weight, column by column. Everything in double precision.
// data: w [out][in], power (one number an input), bits, correlation, step

/** h = D ((1 - c) I + c 1 1^T) D + 1 % of its mean diagonal, with D^2 = power. */
function hessian(power, c) {
  const h = power.map((p, i) => power.map((r, j) => (i === j ? p : c * Math.sqrt(p * r))));
  const ridge = (0.01 * sum(power)) / power.length;
  return h.map((row, i) => row.map((x, j) => (i === j ? x + ridge : x)));
}

/** Upper-triangular u with h^-1 = u^T u: the inverse of the upper factor r of h = r r^T. */
function inverseFactor(h) {
  const n = h.length;
  const r = h.map((row) => row.map(() => 0));
  for (let j = n - 1; j >= 0; j -= 1) {
    for (let i = j; i >= 0; i -= 1) {
      let rest = h[i][j];
      for (let k = j + 1; k < n; k += 1) rest -= r[i][k] * r[j][k];
      r[i][j] = i === j ? Math.sqrt(rest) : rest / r[j][j];
    }
  }
  const u = h.map((row) => row.map(() => 0));
  for (let j = 0; j < n; j += 1) {
    for (let i = j; i >= 0; i -= 1) {
      let rest = i === j ? 1 : 0;
      for (let k = i + 1; k <= j; k += 1) rest -= r[i][k] * u[k][j];
      u[i][j] = rest / r[i][i];
    }
  }
  return u;
}

/** The asymmetric grid of one row: scale, zero point, and rounding to its nearest point. */
function rowGrid(row, bits) {
  const top = 2 ** bits - 1;
  const hi = Math.max(max(row), 0), lo = Math.min(-max(row.map((x) => -x)), 0);
  const s = (hi - lo) / top || 1;
  const z = clamp(roundEven(-lo / s), 0, top);
  return { code: (x) => clamp(roundEven(x / s) + z, 0, top), value: (q) => s * (q - z) };
}

function loss(w, w_hat, h) {
  return sum(w.map((row, o) => {
    const d = row.map((x, i) => x - w_hat[o][i]);
    return sum(d.map((x, i) => x * sum(d.map((y, j) => h[i][j] * y))));
  }));
}

/** The sweep after `step` columns: the weights as they stand, codes so far, and both losses when all is done. */
export function compute({ w, power, bits, correlation, step }) {
  const h = hessian(power, correlation), u = inverseFactor(h);
  const grids = w.map((row) => rowGrid(row, bits));
  const now = w.map((row) => [...row]);
  const codes = w.map((row) => row.map(() => null));
  const w_hat = w.map((row) => row.map(() => 0));
  let shown = null;
  for (let i = 0; i <= power.length; i += 1) {
    if (i === step) shown = { now: now.map((row) => [...row]), codes: codes.map((row) => [...row]) };
    if (i === power.length) break;
    grids.forEach((grid, o) => {
      codes[o][i] = grid.code(now[o][i]);
      w_hat[o][i] = grid.value(codes[o][i]);
      const error = (now[o][i] - w_hat[o][i]) / u[i][i];
      for (let j = i; j < power.length; j += 1) now[o][j] -= error * u[i][j];
    });
  }
  const nearest = w.map((row, o) => row.map((x) => grids[o].code(x)));
  const rounded = nearest.map((row, o) => row.map((q) => grids[o].value(q)));
  return {
    ...shown, final: codes, nearest,
    moved: shown.now.map((row, o) => row.map((x, i) => x - w[o][i])),
    loss: loss(w, w_hat, h), nearest_loss: loss(w, rounded, h),
    flips: sum(codes.map((row, o) => row.filter((q, i) => q !== nearest[o][i]).length)),
  };
}

/** A cell for every weight: done columns grey, the next one framed, the others coloured by how far they were moved. */
function draw(root, width, height, { step, w }, result) {
  const columns = w[0].length, size = Math.min((width - 16) / columns, (height - 26) / w.length);
  const left = (width - size * columns) / 2;
  const largest = Math.max(max(result.moved.flat().map(Math.abs)), 1e-9);
  result.now.forEach((row, o) => row.forEach((x, i) => {
    const at = { x: left + i * size + 1, y: 4 + o * size + 1, width: size - 2, height: size - 2, rx: 3 };
    const moved = result.moved[o][i];
    const color = i < step ? "c-grey" : moved > 0 ? "c-blue" : "c-orange";
    root.append(svg("rect", { ...at, class: color, "fill-opacity": i < step ? 0.25 : 0.75 * Math.abs(moved) / largest }));
    const flipped = i < step && result.codes[o][i] !== result.nearest[o][i];
    const text = i < step ? String(result.codes[o][i]) : x.toFixed(2);
    root.append(svg("text", { class: flipped ? "strong" : "muted", x: at.x + at.width / 2, y: at.y + at.height / 2 + 4,
      "text-anchor": "middle", "font-size": size < 44 ? 10 : 13 }, flipped ? `${text}*` : text));
  }));
  if (step < columns) {
    root.append(svg("rect", { class: "s-red", fill: "none", "stroke-width": 2.5, x: left + step * size, y: 4, width: size, height: size * w.length, rx: 4 }));
  }
}

function describe({ step, w, bits, correlation }, result) {
  const columns = w[0].length;
  const state = step === 0 ? "Nothing is rounded yet." : step === columns ? "All columns are rounded."
    : `${step} of ${columns} columns are rounded; the others have moved by up to ${fmt(max(result.moved.flatMap((row) => row.slice(step)).map(Math.abs)))}.`;
  const gain = result.nearest_loss > 0 ? 100 * (1 - result.loss / result.nearest_loss) : 0;
  return (
    `${bits} bits, correlation ${correlation.toFixed(2)}. ${state} In the end ${result.flips} codes differ from nearest, ` +
    `and the output error is ${fmt(result.loss)} instead of ${fmt(result.nearest_loss)} (${gain.toFixed(0)} % less).`
  );
}

export default {
  render({ model, el }) {
    const items = {
      step: slider({ label: "columns rounded", min: 0, max: model.get("power").length }),
      correlation: slider({ label: "correlation of inputs", min: 0, max: 0.95, step: 0.05, format: (x) => x.toFixed(2) }),
      bits: slider({ label: "bits", min: 2, max: 5 }),
    };
    const inputs = () => Object.fromEntries(["w", "power", "bits", "correlation", "step"].map((key) => [key, model.get(key)]));
    let result = null;
    const view = picture({
      label: "The weight matrix: codes of rounded columns, current values of the others, blue moved up and orange moved down",
      height: (width) => 26 + Math.min((width - 16) / model.get("power").length, 60) * model.get("w").length,
      draw: (root, width, height) => draw(root, width, height, inputs(), result),
    });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), view.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      view.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
