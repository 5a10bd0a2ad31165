// Chapter 16: every value of a small float on a line, with a tensor dropped on it and integers of the same width below.
// data: tensors (by name, magnitudes over the largest one, which is among them), tensor, exponent, mantissa (bits), bias (added
// to 2^(exponent-1) - 1), special ("ieee", "fn", "fnuz", "none"), shift (powers of two above the scale that puts the largest
// magnitude onto the largest value), axis ("log" or "linear")

const LOST = { ieee: (M) => 2 ** M, fn: () => 1, fnuz: () => 0, none: () => 0 }; // top codes that are no numbers

/** The non-negative values of a format, in the order of their codes. */
export function values({ exponent, mantissa, bias, special }) {
  const b = 2 ** (exponent - 1) - 1 + (special === "fnuz" ? 1 : 0) + bias;
  const codes = 2 ** (exponent + mantissa) - LOST[special](mantissa);
  return Array.from({ length: codes }, (_, code) => {
    const e = Math.floor(code / 2 ** mantissa), m = code % 2 ** mantissa;
    return (m + (e > 0 ? 2 ** mantissa : 0)) * 2 ** (Math.max(e, 1) - b - mantissa);
  });
}

/** Distance between the values around x > 0, for normal numbers from low on. */
function spacing(x, low, mantissa) {
  let e = Math.floor(Math.log2(x));
  if (2 ** e > x) e -= 1; // log2 rounds, too
  else if (2 ** (e + 1) <= x) e += 1;
  return Math.max(2 ** e, low) * 2 ** -mantissa;
}

/** The format, and what it and integers of the same width make of the tensor. */
export function compute(inputs) {
  const { tensors, tensor, exponent, mantissa, shift } = inputs;
  const all = values(inputs), top = all[all.length - 1];
  const normal = all[2 ** mantissa], tiny = all[1], levels = 2 ** (exponent + mantissa) - 1;
  const scale = 2 ** shift / top, step = top / levels; // integers whose largest code is the largest value
  const x = tensors[tensor].map((v) => v / scale);
  const float = (v) => { const d = spacing(v || tiny, normal, mantissa); return Math.min(roundEven(v / d) * d, top); };
  const integer = (v) => Math.min(roundEven(v / step), levels) * step;
  const energy = sum(x.map((v) => v * v));
  const numbers = (round) => {
    const got = x.map(round);
    return {
      error: sum(got.map((v, i) => (v - x[i]) ** 2)) / energy,
      zeros: got.filter((v, i) => v === 0 && x[i] > 0).length / x.length,
    };
  };
  return {
    all, top, normal, tiny, step, x, mantissa,
    float: numbers(float), integer: numbers(integer),
    saturated: x.filter((v) => v > top * (1 + 1e-12)).length / x.length,
  };
}

/** Where numbers go, across the picture, in the units of the format. */
function place(r, axisKind, width) {
  const ends = [Math.log2(r.tiny) - 2.5, Math.log2(r.top) + 3.5];
  if (axisKind === "log") {
    const at = linear(ends, [8, width - 50]);
    return { x: (v) => at(Math.log2(v)), invert: (px) => 2 ** at.invert(px), at, of: Math.log2, format: (e) => `2^${fmt(e)}` };
  }
  const at = linear([0, r.top * 1.12], [8, width - 50]);
  return { x: at, invert: at.invert, at, of: (v) => v, format: (v) => fmt(v) };
}

function drawLine(root, width, r, kind) {
  const p = place(r, kind, width), [lo, hi] = p.at.domain, n = Math.max(24, Math.min(72, Math.floor(width / 9)));
  const seen = r.x.filter((v) => v > 0).map(p.of), wide = (hi - lo) / n, y = linear([0, 1], [104, 22]);
  const counts = bins(seen.filter((v) => v >= lo && v <= hi), lo, hi, n), most = max(counts) || 1;
  root.append(svg("text", { class: "strong", x: 8, y: 13 }, "the tensor, scaled"));
  counts.forEach((count, i) => {
    if (!count) return;
    const from = lo + i * wide, [low, high] = [from, from + wide].map((v) => (kind === "log" ? 2 ** v : v));
    const colour = low >= r.top ? "red" : (low + high) / 2 < r.tiny / 2 ? "orange" : "blue";
    const left = p.at(from), tall = y(0) - y(count / most);
    root.append(svg("rect", { class: `c-${colour}`, x: left + 0.5, width: Math.max(p.at(from + wide) - left - 1, 1), y: y(count / most), height: tall }));
  });
  root.append(svg("line", { class: "rule", x1: 8, x2: width - 50, y1: 104, y2: 104 }));
  const marks = (list, top, colour) =>
    root.append(svg("path", { class: `s-${colour} ticks`, "stroke-width": 1, d: list.map((v) => `M${p.x(v).toFixed(1)},${top}v13`).join("") }));
  const integers = Array.from({ length: Math.round(r.top / r.step) }, (_, i) => (i + 1) * r.step);
  root.append(svg("text", { x: 8, y: 122 }, "values of the float"), svg("text", { x: 8, y: 156 }, "integers of the same width"));
  marks(r.all.filter((v) => v > 0), 127, "red");
  marks(integers, 161, "green");
  axis(root, p.at, { y: 180, ticks: width < 420 ? 4 : 8, format: p.format, label: "magnitude in units of the format" });
}

/** Half a spacing over the number: the largest relative error. */
function drawError(root, width, r, kind) {
  const p = place(r, kind, width), y = linear([-9, 0], [128, 20]);
  const bound = (d, v) => clamp(Math.log2(v > r.top ? 1 - r.top / v : Math.min(d / 2 / v, 1)), -9, 0);
  const path = (f) => {
    const points = [];
    for (let px = 9; px <= width - 50; px += 1) points.push(`${px},${y(f(p.invert(px))).toFixed(1)}`);
    return `M${points.join("L")}`;
  };
  root.append(svg("text", { class: "strong", x: 8, y: 12 }, "largest relative error"));
  for (const [e, text] of [[0, "100 %"], [-4, "6 %"], [-8, "0.4 %"]]) {
    root.append(svg("line", { class: "rule", "stroke-opacity": 0.5, x1: 8, x2: width - 50, y1: y(e), y2: y(e) }));
    root.append(svg("text", { class: "muted", x: width - 2, y: y(e) + 4, "text-anchor": "end" }, text));
  }
  root.append(svg("path", { class: "s-green", "stroke-dasharray": "5 3", d: path((v) => bound(r.step, v)) }));
  root.append(svg("path", { class: "s-red", d: path((v) => bound(spacing(v, r.normal, r.mantissa), v)) }));
}

const percent = (v) => (v >= 0.1 || v === 0 ? `${(100 * v).toFixed(0)} %` : `${fmt(100 * v, 2)} %`);

function describe({ exponent, mantissa, bias, special, shift, tensor, axis: kind }, r) {
  const ends = { ieee: "infinities and NaN as in IEEE", fn: "one NaN", fnuz: "NaN in place of minus zero", none: "no NaN" }[special];
  const places = shift === 0 ? "the largest magnitude on the largest value" : `a scale 2^${shift} times that`;
  return (
    `E${exponent}M${mantissa}, bias ${2 ** (exponent - 1) - 1 + (special === "fnuz" ? 1 : 0) + bias}, ${ends}: ${r.all.length - 1} positive values from ${fmt(r.tiny)} ` +
    `to ${fmt(r.top)}, full precision from ${fmt(r.normal)}; ${kind} axis. ${tensor}, ${places}: ${percent(r.float.zeros)} become zero, ` +
    `${percent(r.saturated)} saturate, error ${percent(r.float.error)} of the energy. Integers of ${1 + exponent + mantissa} bits: ` +
    `${percent(r.integer.zeros)} become zero, error ${percent(r.integer.error)}.`
  );
}

export default {
  render({ model, el }) {
    const tensors = model.get("tensors");
    const items = {
      tensor: choice({ label: "tensor", options: Object.keys(tensors).map((name) => [name, name]) }),
      exponent: slider({ label: "exponent bits", min: 2, max: 5 }),
      mantissa: slider({ label: "mantissa bits", min: 1, max: 5 }),
      bias: slider({ label: "bias", min: -4, max: 4, format: (b) => (b ? `standard ${b > 0 ? "+" : "−"} ${Math.abs(b)}` : "standard") }),
      special: choice({ label: "top codes", options: [["fn", "FN: one NaN"], ["ieee", "IEEE"], ["fnuz", "FNUZ"], ["none", "no NaN"]] }),
      shift: slider({ label: "scale", min: -3, max: 16, format: (e) => (e ? `fitted × 2^${e}` : "fitted") }),
      axis: choice({ label: "axis", options: [["log", "logarithmic"], ["linear", "linear"]] }),
    };
    const inputs = () => ({ tensors, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const line = picture({
      label: "Histogram of the tensor's magnitudes above the values of the float and those of integers of the same width",
      height: 222,
      draw: (root, width) => drawLine(root, width, result, inputs().axis),
    });
    const error = picture({
      label: "Largest relative error of the float and of the integers, along the same axis",
      height: 136,
      draw: (root, width) => drawError(root, width, result, inputs().axis),
    });
    const live = liveRegion();
    const names = [["blue", "kept"], ["orange", "rounds to zero"], ["red", "the float; saturates"], ["green", "integers"]];
    el.append(controls(...Object.values(items)), legend(names), line.node, error.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      line.redraw();
      error.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
