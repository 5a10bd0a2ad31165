// Chapter 14: keys of a real head, their outlier channels divided by λ = max|k|^α, and what a token loses in few bits.
// data: heads (each { name, keys [tokens][d], queries [queries][d] }), head (which), alpha (0 to 1), bits, token (which)

/** Largest |k| of each channel. */
const channelMax = (keys) => keys[0].map((_, c) => max(keys.map((k) => Math.abs(k[c]))));

/** λ of every channel, the same for the two that RoPE turns together. */
export function scales(keys, alpha) {
  const top = channelMax(keys), half = top.length / 2;
  return top.map((_, c) => {
    const pair = Math.max(top[c % half], top[(c % half) + half]);
    return pair > 0 ? pair ** alpha : 1;
  });
}

/** A token on an asymmetric grid of its own: codes, scale and zero point in float16, and the values they stand for. */
export function round(x, bits) {
  const levels = 2 ** bits - 1, lo = Math.min(0, ...x), hi = Math.max(0, ...x);
  const scale = f16((hi - lo) / levels) || 1;
  const zero = f16(Math.min(-lo / scale, levels));
  const codes = x.map((v) => clamp(roundEven(v / scale + zero), 0, levels));
  return { codes, scale, zero, values: codes.map((q) => scale * (q - zero)) };
}

/** Relative error of a token's scores with all queries, if its key becomes `got`. */
function scoreError(queries, key, got) {
  const dot = (q, k) => sum(q.map((v, c) => v * k[c]));
  const delta = key.map((v, c) => got[c] - v);
  return Math.sqrt(sum(queries.map((q) => dot(q, delta) ** 2)) / sum(queries.map((q) => dot(q, key) ** 2)));
}

/** The errors of all tokens at a strength. */
function errors({ keys, queries }, alpha, bits) {
  const by = scales(keys, alpha);
  return keys.map((k) => {
    const { values } = round(k.map((v, c) => v / by[c]), bits);
    return scoreError(queries, k, values.map((v, c) => v * by[c]));
  });
}

/** Ranges of the channels before and behind λ, the chosen token on its grid, and the mean error for α = 0, 0.1, … 1. */
export function compute({ heads, head, alpha, bits, token }) {
  const chosen = heads[head], by = scales(chosen.keys, alpha);
  const key = chosen.keys[token].map((v, c) => v / by[c]);
  const before = channelMax(chosen.keys);
  const all = errors(chosen, alpha, bits);
  return {
    before,
    after: before.map((v, c) => v / by[c]),
    key,
    ...round(key, bits),
    error: all[token],
    plain: errors(chosen, 0, bits)[token],
    mean: mean(all),
    curve: Array.from({ length: 11 }, (_, i) => mean(errors(chosen, i / 10, bits))),
  };
}

const percent = (v) => `${(100 * v).toFixed(1)} %`;

/** Bars of all channels, before (outlined) and behind λ (filled). */
function drawChannels(root, width, { before, after }) {
  const x = linear([0, before.length], [40, width - 8]), wide = x(1) - x(0);
  const y = linear([0, max([...before, ...after])], [118, 28]);
  root.append(svg("text", { class: "strong", x: 8, y: 13 }, "largest |k| of each channel"));
  before.forEach((v, c) => {
    root.append(svg("rect", { class: "c-grey", "fill-opacity": 0.45, x: x(c), width: Math.max(1, wide - 1), y: y(v), height: y(0) - y(v) }));
    root.append(svg("rect", { class: "c-blue", x: x(c) + wide / 4, width: Math.max(1, wide / 2), y: y(after[c]), height: y(0) - y(after[c]) }));
  });
  for (const v of [0, y.domain[1]]) root.append(svg("text", { class: "muted", x: 35, y: y(v) + 4, "text-anchor": "end" }, fmt(v, 2)));
  axis(root, x, { y: 118, ticks: 4, label: "channel; c and c + half turn together" });
}

/** The token behind λ as bars over the points of its grid. */
function drawToken(root, width, { key, codes, scale, zero, values }, { token, bits }) {
  const levels = 2 ** bits - 1, x = linear([0, key.length], [40, width - 8]), wide = x(1) - x(0);
  const y = linear([-zero, levels - zero], [140, 26]);
  root.append(svg("text", { class: "strong", x: 8, y: 13 }, `token ${token} behind λ, in codes`));
  if (bits <= 5)
    for (let q = 0; q <= levels; q += 1)
      root.append(svg("line", { class: "s-red", "stroke-opacity": 0.35, x1: 40, x2: width - 8, y1: y(q - zero), y2: y(q - zero) }));
  key.forEach((v, c) => {
    const at = clamp(v / scale, -zero, levels - zero);
    root.append(svg("rect", { class: "c-blue", x: x(c), width: Math.max(1, wide - 1), y: Math.min(y(0), y(at)), height: Math.max(1, Math.abs(y(at) - y(0))) }));
    root.append(svg("circle", { class: "c-red", cx: x(c + 0.5), cy: y(values[c] / scale), r: Math.min(2.5, wide / 2) }));
  });
  for (const q of [0, levels])
    root.append(svg("text", { class: "muted", x: 35, y: y(q - zero) + 4, "text-anchor": "end" }, q));
}

/** The mean error against α, the chosen strength marked. */
function drawCurve(root, width, { curve, mean: now }, { alpha }) {
  const x = linear([0, 1], [48, width - 16]), y = linear([0, max(curve)], [118, 34]);
  root.append(svg("text", { class: "strong", x: 8, y: 13 }, "error of the scores, mean over tokens"));
  const d = curve.map((v, i) => `${i ? "L" : "M"}${x(i / 10).toFixed(2)},${y(v).toFixed(2)}`).join("");
  root.append(svg("path", { class: "s-blue", fill: "none", d }), svg("circle", { class: "c-red", cx: x(alpha), cy: y(now), r: 5 }));
  root.append(svg("text", { class: "muted", x: x(0), y: y(curve[0]) - 8, "text-anchor": "middle" }, percent(curve[0])));
  axis(root, x, { y: 118, ticks: 5, label: "α" });
}

function describe({ heads, head, alpha, bits, token }, result) {
  const range = (values) => fmt(max(values) / values.slice().sort((a, b) => a - b)[Math.floor(values.length / 2)], 2);
  return (
    `${heads[head].name}, α = ${alpha}: the largest channel is ${range(result.before)} times the median one, ` +
    `${range(result.after)} times behind λ. At ${bits} bits the scores of token ${token} are off by ${percent(result.error)} ` +
    `(${percent(result.plain)} without λ), of all tokens by ${percent(result.mean)} on average.`
  );
}

export default {
  render({ model, el }) {
    const heads = model.get("heads");
    const items = {
      head: choice({ label: "head", options: heads.map(({ name }, i) => [i, name]) }),
      alpha: slider({ label: "strength α", min: 0, max: 1, step: 0.05, format: (x) => x.toFixed(2) }),
      bits: choice({ label: "bits", options: [2, 3, 4, 5, 8].map((b) => [b, String(b)]) }),
      token: slider({ label: "token", min: 0, max: heads[0].keys.length - 1 }),
    };
    const inputs = () => ({ heads, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const pictures = [
      picture({ label: "Largest magnitude of each key channel, before and behind λ", height: 156, draw: (root, width) => drawChannels(root, width, result) }),
      picture({ label: "A token of the head behind λ, over the codes of its grid", height: 152, draw: (root, width) => drawToken(root, width, result, inputs()) }),
      picture({ label: "Error of the scores against the strength", height: 158, draw: (root, width) => drawCurve(root, width, result, inputs()) }),
    ];
    const live = liveRegion();
    el.append(controls(...Object.values(items)), legend([["grey", "before"], ["blue", "behind λ"], ["red", "grid, and what is stored"]]));
    el.append(...pictures.map((p) => p.node), live.node);
    connect(model, items, () => {
      result = compute(inputs());
      pictures.forEach((p) => p.redraw());
      live.say(describe(inputs(), result));
    });
  },
};
