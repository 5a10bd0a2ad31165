// Chapter 23: published perplexities of a model, by method and bits of a weight.
// data: rows (lists of model, metric, usual protocol?, method, setting, bits of a weight, activation bits, value, FP16 value),
// model, metric, kind ("weights" or "both"), measure ("difference" or "nll"), mix (rows of all protocols against the usual FP16)

const MEASURES = { difference: "perplexity added", nll: "loss added, nats a token" };
const METRICS = { wikitext2_ppl: "WikiText-2", c4_ppl: "C4" };
const COLOURS = ["blue", "red", "green", "purple", "orange", "sky", "grey"];

/** Points of the chosen rows, lowest first; how many lie below zero; where the picture ends. */
export function compute({ rows, model, metric, kind, measure, mix }) {
  const of_model = rows.filter((r) => r[0] === model && r[1] === metric), usual = of_model.filter((r) => r[2]);
  const base = usual.length ? usual.map((r) => r[8]).sort((a, b) => a - b)[Math.floor(usual.length / 2)] : null;
  const points = (mix ? of_model : usual)
    .filter((r) => (r[6] === 16) === (kind === "weights"))
    .map(([, , usual_, method, setting, bits, , value, own]) => {
      const fp16 = mix && !usual_ ? base ?? own : own; // the mistake: another protocol's value against this one's FP16
      return { method, setting, bits, usual: usual_, y: measure === "nll" ? Math.log(value / fp16) : value - fp16 };
    })
    .sort((a, b) => a.y - b.y);
  const ys = points.map((p) => p.y);
  const top = ys.length ? Math.max(1.25 * ys[Math.floor(0.8 * (ys.length - 1))], 1e-3) : 1;
  return { points, below: ys.filter((y) => y < 0).length, top, low: Math.min(0, 1.15 * (ys[0] ?? 0)), methods: [...new Set(points.map((p) => p.method))].sort() };
}

const colour = (r, method) => COLOURS[r.methods.indexOf(method) % COLOURS.length];
const SHAPES = [
  (x, y) => `M${x - 5},${y}a5,5 0 1,0 10,0a5,5 0 1,0 -10,0`, (x, y) => `M${x - 5},${y - 5}h10v10h-10z`,
  (x, y) => `M${x},${y - 6}L${x + 6},${y + 5}H${x - 6}z`, (x, y) => `M${x},${y - 7}L${x + 6},${y}L${x},${y + 7}L${x - 6},${y}z`,
];
const shape = (r, method) => SHAPES[r.methods.indexOf(method) % 4]; // four shapes and seven colours: 28 methods differ

function draw(root, width, height, r, measure) {
  if (!r.points.length) {
    root.append(svg("text", { class: "strong", x: 8, y: 30 }, "No published figure found."));
    return;
  }
  const [lo, hi] = extent(r.points.map((p) => p.bits)), left = 52, bottom = height - 42;
  const x = linear([lo - 0.3, hi + 0.3], [left, width - 12]), y = linear([r.low, r.top], [bottom, 26]);
  root.append(svg("text", { class: "strong", x: 4, y: 14 }, MEASURES[measure]));
  for (const t of ticks(r.low, r.top, 5)) {
    root.append(svg("line", { class: "rule", "stroke-opacity": t === 0 ? 1 : 0.4, x1: left, x2: width - 8, y1: y(t), y2: y(t) }));
    root.append(svg("text", { class: "muted", x: left - 5, y: y(t) + 4, "text-anchor": "end" }, fmt(t)));
  }
  for (const p of r.points) {
    const off = p.y > r.top, d = shape(r, p.method)(x(p.bits), off ? 26 : y(p.y));
    root.append(svg("path", { class: `c-${colour(r, p.method)}`, "fill-opacity": p.usual ? 0.85 : 0.35, d }));
    if (off) root.append(svg("path", { class: `s-${colour(r, p.method)}`, d: `M${x(p.bits)},20v-6m-3,3l3,-3l3,3` }));
  }
  axis(root, x, { y: bottom + 4, ticks: Math.min(6, Math.ceil(hi - lo) + 1), label: "bits of a weight" });
}

function describe({ model, metric, mix, kind }, r) {
  const what = `${model}, ${METRICS[metric]}, ${kind === "weights" ? "weights alone" : "weights and activations"}`;
  if (!r.points.length) return `${what}: no published figure found${mix ? "" : " in windows of 2,048"}.`;
  const best = r.points.slice(0, 3).map((p) => `${p.method} ${p.setting} ${fmt(p.y)}`).join("; ");
  const wrong = mix ? ` All protocols against one FP16 value: ${r.below} lie below zero.` : "";
  return `${what}: ${r.points.length} figures. Lowest: ${best}. ${r.points.filter((p) => p.y > r.top).length} lie above the picture.${wrong}`;
}

export default {
  render({ model, el }) {
    const rows = model.get("rows");
    const items = {
      model: choice({ label: "model", options: [...new Set(rows.map((r) => r[0]))].map((name) => [name, name]) }),
      metric: choice({ label: "text", options: Object.entries(METRICS) }),
      kind: choice({ label: "quantized", options: [["weights", "weights"], ["both", "weights and activations"]] }),
      measure: choice({ label: "measure", options: Object.entries(MEASURES) }),
      mix: toggle({ label: "mix protocols" }),
    };
    const inputs = () => ({ rows, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const view = picture({ label: "Points: what quantization added, against the bits of a weight", height: 300, draw: (root, width, height) => draw(root, width, height, result, model.get("measure")) });
    const names = h("div"), live = liveRegion();
    el.append(controls(...Object.values(items)), view.node, names, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      view.redraw();
      names.replaceChildren(h("ul", { class: "legend" }, result.methods.map((m) =>
        h("li", {}, svg("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" }, svg("path", { class: `c-${colour(result, m)}`, d: shape(result, m)(7, 7) })), m))));
      live.say(describe(inputs(), result));
    });
  },
};
