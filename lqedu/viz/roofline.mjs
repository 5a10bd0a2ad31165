// Chapter 01: what bounds a step of decoding, memory or arithmetic, as batch and context grow?
// data: llms (name -> {linear, head, layers, heads, kv_heads, head_dim}), formats (name -> {weight, peak}), base (FP16 peak),
// bandwidth (bytes/s), llm, format, cache (bits), exponent (log2 of the batch), reach (log2 of the context, or 0 for none)

/** Bytes, operations, intensity and the two times of one step that adds a token to each of `batch` sequences. */
export function compute({ llm, format, cache, batch, context, llms, formats, base, bandwidth }) {
  const { linear: inner, head, layers, heads, kv_heads, head_dim } = llms[llm];
  const { weight, peak } = formats[format];
  const weights = (inner * weight + head * 16) / 8;
  const kv = batch * context * 2 * layers * kv_heads * ((head_dim * cache) / 8 + (cache >= 16 ? 0 : 4));
  const quantized = 2 * inner * batch;
  const rest = (2 * head + 4 * layers * heads * head_dim * context) * batch; // head and attention stay in 16 bits
  const ops = quantized + rest, bytes = weights + kv;
  const memory = bytes / bandwidth, arithmetic = quantized / peak + rest / base;
  const time = Math.max(memory, arithmetic);
  return {
    ops, weights, kv, bytes, intensity: ops / bytes, memory, arithmetic, time,
    rate: ops / time, per_token: time / batch,
    bound: memory >= arithmetic ? "memory" : "arithmetic",
  };
}

const power = (e) => (e === 0 ? 1 : 2 ** e);
const reached = (e) => (e === 0 ? 0 : 2 ** e);
const seconds = (t) => (t < 1e-3 ? `${fmt(t * 1e6)} µs` : `${fmt(t * 1e3)} ms`);
const size = (b) => (b < 1e9 ? `${fmt(b / 1e6)} MB` : `${fmt(b / 1e9)} GB`);

/** Axes of powers of ten, the roof of every format, and where the step stands. */
function drawRoof(root, width, height, inputs, result) {
  const left = 50, right = width - 12, top = 26, bottom = height - 40;
  const x = linear([-1, 4], [left, right]);
  const y = linear([11, 15.4], [bottom, top]);
  const at = (intensity, rate) => [x(Math.log10(intensity)), y(Math.log10(rate))];
  for (let e = 11; e <= 15; e += 1) {
    root.append(
      svg("line", { class: "rule", x1: left, x2: right, y1: y(e), y2: y(e) }),
      svg("text", { class: "muted", x: left - 6, y: y(e) + 4, "text-anchor": "end" }, `${fmt(10 ** (e - 12))} T`));
  }
  const names = Object.keys(inputs.formats);
  for (const name of [...names.filter((other) => other !== inputs.format), inputs.format]) {
    const chosen = name === inputs.format, { peak } = inputs.formats[name];
    const [x0, y0] = at(0.1, 0.1 * inputs.bandwidth), [x1, y1] = at(peak / inputs.bandwidth, peak), [x2] = at(1e4, peak);
    root.append(svg("path", {
      class: chosen ? "s-blue" : "s-grey", fill: "none", "stroke-width": chosen ? 3 : 1,
      "stroke-dasharray": chosen ? null : "4 4", d: `M${x0},${y0}L${x1},${y1}H${x2}`,
    }));
  }
  const [px, py] = at(result.intensity, result.rate);
  root.append(
    svg("line", { class: "s-orange", x1: px, x2: px, y1: py, y2: bottom, "stroke-dasharray": "2 3" }),
    svg("circle", { class: "c-red", cx: px, cy: py, r: 7 }),
    svg("text", { class: "strong", x: 8, y: 14 }, "operations per second"));
  axis(root, x, { y: bottom + 2, ticks: 5, format: (e) => String(10 ** e), label: null });
  root.append(svg("text", { class: "muted", x: right, y: height - 4, "text-anchor": "end" }, "operations per byte"));
}

/** Two bars: how long memory (weights, then cache) and arithmetic would take alone. */
function drawBars(root, width, result) {
  const x = linear([0, result.time], [8, width - 8]);
  const split = (result.memory * result.weights) / result.bytes;
  const bar = (from, to, y, colour) =>
    root.append(svg("rect", { class: colour, x: x(from), y, width: Math.max(x(to) - x(from), 1), height: 14 }));
  root.append(
    svg("text", { class: "strong", x: 8, y: 14 }, `memory: ${seconds(result.memory)}`),
    svg("text", { class: "strong", x: 8, y: 56 }, `arithmetic: ${seconds(result.arithmetic)}`));
  bar(0, split, 20, "c-orange");
  if (result.kv > 0) bar(split, result.memory, 20, "c-purple");
  bar(0, result.arithmetic, 62, "c-green");
}

function describe({ llm, format, cache, batch, context }, result) {
  const many = batch === 1 ? "1 sequence" : `${batch} sequences`;
  return (
    `${llm}, ${format}, ${cache}-bit cache, ${many} of ${context} tokens: a step reads ${size(result.weights)} of weights and ` +
    `${size(result.kv)} of cache and does ${fmt(result.ops / 1e9)} billion operations, ${fmt(result.intensity)} a byte. ` +
    `It is bound by ${result.bound}: at least ${seconds(result.time)} a step, ${seconds(result.per_token)} a token.`
  );
}

export default {
  render({ model, el }) {
    const keys = (name) => Object.keys(model.get(name)).map((key) => [key, key]);
    const items = {
      llm: choice({ label: "model", options: keys("llms") }),
      format: choice({ label: "weights and arithmetic", options: keys("formats") }),
      cache: choice({ label: "cache", options: [[16, "16 bits"], [8, "8 bits"], [4, "4 bits"]] }),
      exponent: slider({ label: "sequences", min: 0, max: 12, format: (e) => String(power(e)) }),
      reach: slider({ label: "context", min: 0, max: 17, format: (e) => `${reached(e)} tokens` }),
    };
    const fixed = ["llms", "formats", "base", "bandwidth", "llm", "format", "cache"];
    const inputs = () => ({
      ...Object.fromEntries(fixed.map((key) => [key, model.get(key)])),
      batch: power(model.get("exponent")), context: reached(model.get("reach")),
    });
    let result = null;
    const roof = picture({
      label: "Roofline: operations per second against operations per byte, with the decoding step as a dot",
      height: (width) => (width < 420 ? 250 : 300),
      draw: (root, width, height) => drawRoof(root, width, height, inputs(), result),
    });
    const bars = picture({
      label: "Bars: time for memory, split into weights and cache, and time for arithmetic",
      height: 82,
      draw: (root, width) => drawBars(root, width, result),
    });
    const key = legend([["orange", "weights"], ["purple", "cache"], ["green", "arithmetic"]]);
    const live = liveRegion();
    el.append(controls(...Object.values(items)), roof.node, bars.node, key, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      roof.redraw();
      bars.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
