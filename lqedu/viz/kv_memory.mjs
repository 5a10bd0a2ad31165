// Chapter 15: what the keys and values of a batch of texts take, and how many texts fit beside the weights.
// data: models (name -> {layers, kv_heads, head_dim, params in billions}), model (a name), and what it fills in: layers,
// kv_heads, head_dim, params; weight (bits), key and value ("16", "8", "fp8" or "4"), exponent (log2 of the sequences),
// reach (log2 of the tokens of each), card (GB)

const FORMATS = [["16", "16 bits"], ["8", "8 bits"], ["fp8", "FP8"], ["4", "4 bits"]];
const FILLED = ["layers", "kv_heads", "head_dim", "params"];

/** Bytes of one token of one head: codes, and FP16 scale and zero point where the format has them. */
function vector(format, dim) {
  if (format === "16") return 2 * dim;
  if (format === "fp8") return dim + 2;
  return Math.ceil((dim * Number(format)) / 8) + 4;
}

/** Bytes of a token, of the cache and of the weights; what is left of the card, and how many such sequences fit on it. */
export function compute({ layers, kv_heads, head_dim, params, weight, key, value, sequences, context, card }) {
  const token = (k, v) => layers * kv_heads * (vector(k, head_dim) + vector(v, head_dim));
  const weights = (params * 1e9 * weight) / 8, room = Math.max(0, card * 1e9 - weights);
  const fit = (bytes) => Math.floor(room / (bytes * context));
  const bytes = token(key, value), cache = bytes * sequences * context;
  return {
    token: bytes, cache, weights, free: card * 1e9 - weights - cache, fit: fit(bytes), tokens: Math.floor(room / bytes),
    fits: FORMATS.map(([format]) => fit(token(format, format))),
  };
}

const size = (b) => (b < 1e6 ? `${fmt(b / 1e3)} kB` : b < 1e9 ? `${fmt(b / 1e6)} MB` : `${fmt(b / 1e9)} GB`);
const many = (n, one, more) => `${n.toLocaleString("en-US")} ${n === 1 ? one : more}`;

/** Weights and cache side by side, over a frame as wide as the card. */
function drawCard(root, width, { card }, { weights, cache, free }) {
  const x = linear([0, Math.max(card * 1e9, weights + cache)], [8, width - 8]);
  root.append(svg("text", { class: "strong", x: 8, y: 14 }, free < 0 ? `${size(-free)} too much` : `${size(free)} left`));
  const bar = (from, to, colour) =>
    root.append(svg("rect", { class: colour, x: x(from), y: 24, width: Math.max(x(to) - x(from), 1), height: 30 }));
  bar(0, weights, "c-orange");
  bar(weights, weights + cache, "c-purple");
  const edge = x(card * 1e9);
  root.append(
    svg("rect", { class: "s-blue", fill: "none", "stroke-width": 2, x: 8, y: 20, width: edge - 8, height: 38 }),
    svg("text", { class: "muted", x: edge, y: 74, "text-anchor": edge > 90 ? "end" : "start" }, `${card} GB card`));
}

/** How many sequences of this length each format leaves room for. */
function drawFits(root, width, { key, value }, { fits, fit }) {
  const most = Math.max(1, max([...fits, fit])), left = 76;
  const x = linear([0, most], [left, width - 74]);
  root.append(svg("text", { class: "strong", x: 8, y: 14 }, "sequences that fit beside the weights"));
  FORMATS.forEach(([format, text], i) => {
    const y = 24 + 26 * i, chosen = key === format && value === format;
    root.append(
      svg("text", { class: chosen ? "strong" : "muted", x: 8, y: y + 14 }, text),
      svg("rect", { class: chosen ? "c-purple" : "c-grey", x: left, y, width: Math.max(x(fits[i]) - left, 1), height: 18 }),
      svg("text", { class: "muted", x: x(fits[i]) + 5, y: y + 14 }, fits[i].toLocaleString("en-US")));
  });
  if (key !== value)
    root.append(svg("line", { class: "s-purple", "stroke-width": 3, x1: x(fit), x2: x(fit), y1: 20, y2: 124 }));
}

function describe(inputs, { token, cache, weights, free, fit, tokens }) {
  const { layers, kv_heads, head_dim, params, weight, key, value, sequences, context, card } = inputs;
  const name = (format) => FORMATS.find(([known]) => known === format)[1];
  const left = free < 0 ? `${size(-free)} more than a card of ${card} GB has` : `which leaves ${size(free)} of ${card} GB`;
  return (
    `${layers} layers, ${many(kv_heads, "key head", "key heads")} of ${head_dim}, ${fmt(params)} billion weights at ${weight} bits; keys in ` +
    `${name(key)}, values in ${name(value)}: a token takes ${size(token)}. ${many(sequences, "sequence", "sequences")} of ` +
    `${many(context, "token", "tokens")} take ${size(cache)} beside ${size(weights)} of weights, ${left}. ` +
    `There is room for ${many(fit, "such sequence", "such sequences")}, or for ${many(tokens, "token", "tokens")} of any texts.`
  );
}

export default {
  render({ model, el }) {
    const models = model.get("models");
    const items = {
      model: choice({ label: "model", options: Object.keys(models).map((name) => [name, name]) }),
      layers: slider({ label: "layers", min: 1, max: 128 }),
      kv_heads: slider({ label: "key heads", min: 1, max: 64 }),
      head_dim: slider({ label: "head size", min: 32, max: 256, step: 32 }),
      params: slider({ label: "weights", min: 0.1, max: 72, step: 0.1, format: (x) => `${x} billion` }),
      weight: choice({ label: "weights in", options: [[16, "16 bits"], [8, "8 bits"], [4.125, "4 bits, g128"]] }),
      key: choice({ label: "keys in", options: FORMATS }),
      value: choice({ label: "values in", options: FORMATS }),
      exponent: slider({ label: "sequences", min: 0, max: 10, format: (e) => String(2 ** e) }),
      reach: slider({ label: "tokens of each", min: 7, max: 17, format: (e) => (2 ** e).toLocaleString("en-US") }),
      card: choice({ label: "card", options: [[24, "24 GB"], [80, "80 GB"]] }),
    };
    const keys = [...FILLED, "weight", "key", "value", "card"];
    const inputs = () => ({
      ...Object.fromEntries(keys.map((key) => [key, model.get(key)])),
      sequences: 2 ** model.get("exponent"), context: 2 ** model.get("reach"),
    });
    let result = null;
    const card = picture({
      label: "Bar: weights and cache against the memory of the card",
      height: 82, draw: (root, width) => drawCard(root, width, inputs(), result),
    });
    const fits = picture({
      label: "Bars: how many sequences of this length fit, by format of keys and values",
      height: 132, draw: (root, width) => drawFits(root, width, inputs(), result),
    });
    const key = legend([["orange", "weights"], ["purple", "keys and values"]]);
    const live = liveRegion();
    el.append(controls(...Object.values(items)), card.node, key, fits.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      card.redraw();
      fits.redraw();
      live.say(describe(inputs(), result));
    });
    model.on("change:model", () => {
      for (const name of FILLED) model.set(name, models[model.get("model")][name]);
      model.save_changes();
    });
  },
};
