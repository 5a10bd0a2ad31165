// Chapter 24: which method keeps all limits, and which of those is the fastest. As lqedu/book/choosing.py.
// data: options (name, loss, at_most, effort, hardware, layouts, form, and by shape weights and page, in bytes), points (shape ->
// work -> [form, batch, context, tokens a second]), shapes (step, library, embedding: bytes), tie; hardware, shape, memory (GB),
// exponent and reach (log2 of texts and of tokens each), work, level (an index of LOSSES), effort (0 to 2), layout

export const LOSSES = [0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.11, 0.15, 0.2, 0.3, 0.5, 1.2];
const EFFORTS = ["no data", "calibration text", "training"];
const PAGE = 64;

/** Tokens a second of each form at the recorded point nearest to a batch and a context, and that point. */
function nearest(rows, batch, context) {
  const distance = ([, b, c]) => [Math.abs(Math.log(c / context)), Math.abs(Math.log(b / batch)), b, c];
  const less = (p, q) => { const i = p.findIndex((x, k) => x !== q[k]); return i >= 0 && p[i] < q[i]; };
  const best = rows.map(distance).reduce((p, q) => (less(q, p) ? q : p));
  const here = rows.filter(([, b, c]) => b === best[2] && c === best[3]);
  return { batch: best[2], context: best[3], tokens: Object.fromEntries(here.map(([form, , , t]) => [form, t])) };
}

/** Every option: bytes, score, limits it breaks; and the names of the best, of those nobody dominates, of the closest. */
export function compute({ options, points, shapes, tie, hardware, shape, memory, batch, context, work, loss, effort, layout }) {
  const { step, library, embedding } = shapes[shape], room = memory * 1e9;
  const at = nearest(points[shape][work], batch, context);
  const read = (o) => o.weights[shape] - embedding + (batch * context * o.page[shape]) / PAGE;
  const rows = options.map((o) => {
    const bytes = o.weights[shape] + batch * (Math.ceil(context / PAGE) * o.page[shape] + step) + library;
    const measured = hardware === "hopper" ? (at.tokens[o.form] ?? null) : null;
    const counted = hardware !== "hopper" && work === "decode" ? read(options[0]) / read(o) : 0;
    const checks = {
      hardware: o.hardware.includes(hardware), memory: bytes <= room, loss: o.at_most <= loss, effort: o.effort <= effort,
      layout: o.layouts.includes(layout),
    };
    const broken = Object.keys(checks).filter((key) => !checks[key]);
    let excess = checks.hardware ? 0 : Infinity;
    if (!checks.memory) excess += Math.log(bytes / room);
    if (!checks.loss && o.at_most > 1e-3) excess += Math.log(o.at_most / Math.max(loss, 1e-3));
    excess += 2 * !checks.effort + 2 * !checks.layout;
    return { name: o.name, loss: o.loss, effort: o.effort, bytes, measured: measured !== null, score: measured ?? counted, broken, excess };
  });
  const key = (r) => [-r.score, r.loss, r.bytes, r.effort];
  const dominates = (a, b) => {
    const [p, q] = [key(a), key(b)];
    return p.every((x, i) => x <= q[i]) && p.some((x, i) => x !== q[i]);
  };
  const order = (p, q) => { const i = p.findIndex((x, k) => x !== q[k]); return i < 0 ? 0 : p[i] - q[i]; };
  const kept = rows.filter((r) => !r.broken.length);
  const front = kept.filter((r) => !kept.some((other) => dominates(other, r))).sort((a, b) => order(key(a), key(b)));
  const near = front.filter((r) => r.score >= (1 - tie) * front[0].score);
  const best = [...near].sort((a, b) => order([a.loss, -a.score, a.bytes], [b.loss, -b.score, b.bytes]))[0];
  const closest = kept.length ? null : rows.reduce((p, q) => (q.excess < p.excess ? q : p));
  return {
    rows: rows.map(({ name, bytes, measured, score, broken }) => ({ name, bytes, measured, score, broken })),
    best: best?.name ?? null, frontier: front.map((r) => r.name), closest: closest?.name ?? null, batch: at.batch, context: at.context,
  };
}

const score = ({ score, measured }, hardware) =>
  score ? (measured ? `${fmt(score)} tokens/s` : `bytes ÷ ${fmt(score)}`) : hardware === "hopper" ? "not timed" : "unknown";

/** A bar for each candidate, the best first; below them the others, with the limits they break. */
function draw(root, width, { hardware, memory, batch, context, loss }, { rows, best, frontier }) {
  const kept = rows.filter((r) => !r.broken.length), most = Math.max(1e-9, max(kept.map((r) => r.score)));
  const rank = (r) => (r.name === best ? -1 : frontier.includes(r.name) ? frontier.indexOf(r.name) : 50 + r.broken.length);
  const left = 140, x = linear([0, most], [left, width - 118]);
  const limits = `${memory} GB, ${batch} × ${context.toLocaleString("en-US")} tokens, at most ${loss} nats`;
  root.append(svg("text", { class: "strong", x: 4, y: 13 }, limits));
  [...rows].sort((a, b) => rank(a) - rank(b)).forEach((r, i) => {
    const y = 24 + 19 * i, chosen = r.name === best;
    root.append(svg("text", { class: chosen ? "strong" : "muted", x: 4, y: y + 12 }, r.name));
    if (r.broken.length) {
      root.append(svg("text", { class: "muted", x: left, y: y + 12 }, `✗ ${r.broken.join(", ")}`));
      return;
    }
    const colour = chosen ? "c-purple" : frontier.includes(r.name) ? "c-blue" : "c-grey";
    root.append(
      svg("rect", { class: colour, x: left, y, width: Math.max(x(r.score) - left, 2), height: 14 }),
      svg("text", { class: chosen ? "strong" : "muted", x: x(r.score) + 5, y: y + 12 }, score(r, hardware)));
  });
}

function describe({ hardware, shape, memory, batch, context, work, loss, effort, layout }, { rows, best, frontier, closest, ...at }) {
  const tool = layout === "any" ? "" : `, to be loaded as ${layout}`;
  const asked =
    `${shape} on ${hardware}, ${fmt(memory)} GB, ${batch} × ${context.toLocaleString("en-US")} tokens, ${work}, loss up to ` +
    `${loss} nats, ${EFFORTS[effort]}${tool}: `;
  const find = (name) => rows.find((r) => r.name === name);
  if (best === null) return `${asked}nothing keeps all limits; ${closest} comes closest, but for ${find(closest).broken.join(" and ")}.`;
  const others = frontier.filter((name) => name !== best), point = `, recorded at ${at.batch} × ${at.context}`;
  return (
    `${asked}${best}, ${fmt(find(best).bytes / 1e9)} GB, ${score(find(best), hardware)}${find(best).measured ? point : ""}. ` +
    (others.length ? `Not worse in everything: ${others.join(", ")}.` : "It beats or equals all other candidates in everything.")
  );
}

export default {
  render({ model, el }) {
    const data = Object.fromEntries(["options", "points", "shapes", "tie"].map((key) => [key, model.get(key)]));
    const layouts = [...new Set(data.options.flatMap((o) => o.layouts))];
    const items = {
      hardware: choice({ label: "hardware", options: [["hopper", "Hopper GPU"], ["ampere", "Ampere GPU"], ["cpu", "CPU"]] }),
      shape: choice({ label: "model", options: Object.keys(data.shapes).map((name) => [name, name]) }),
      memory: slider({ label: "memory", min: 3, max: 96, format: (g) => `${g} GB` }),
      exponent: slider({ label: "texts at once", min: 0, max: 9, format: (e) => String(2 ** e) }),
      reach: slider({ label: "tokens of each", min: 8, max: 15, format: (e) => (2 ** e).toLocaleString("en-US") }),
      work: choice({ label: "time goes into", options: [["decode", "writing tokens"], ["prefill", "reading prompts"]] }),
      level: slider({ label: "loss allowed", min: 0, max: LOSSES.length - 1, format: (i) => `${LOSSES[i]} nats` }),
      effort: choice({ label: "effort allowed", options: EFFORTS.map((text, i) => [i, text]) }),
      layout: choice({ label: "format to load", options: layouts.map((name) => [name, name]) }),
    };
    const inputs = () => {
      const { exponent, reach, level, ...rest } = Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)]));
      return { ...data, ...rest, batch: 2 ** exponent, context: 2 ** reach, loss: LOSSES[level] };
    };
    let result = null;
    const bars = picture({
      label: "Bars: speed of every option that keeps the limits; the others with the limits they break",
      height: 19 * data.options.length + 28, draw: (root, width) => draw(root, width, inputs(), result),
    });
    const key = legend([["purple", "recommended"], ["blue", "another trade-off"], ["grey", "beaten by one of these"]]);
    const live = liveRegion();
    el.append(controls(...Object.values(items)), bars.node, key, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      bars.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
