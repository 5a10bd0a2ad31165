// Chapter 22: quality of every row of the matrix against what it costs, and the rows that nobody beats in both. As lqedu/book/pareto.py.
// data: rows (name, title, method, kind: "weights" or "both", values by key, moved: quality -> [difference to FP, standard error], why:
// key -> reason of a missing number), dense (values of FP by key), qualities and axes (key -> label, less: is better?, log);
// quality, x (keys of those), kind ("all", "weights", "both"), row (the name that is described)

const CAP = 10; // times the perplexity of FP: what is worse is drawn at the edge
const COLOURS = ["blue", "red", "green", "purple", "orange", "sky", "grey"];
const SHAPES = [
  (x, y) => `M${x - 5},${y}a5,5 0 1,0 10,0a5,5 0 1,0 -10,0`, (x, y) => `M${x - 5},${y - 5}h10v10h-10z`,
  (x, y) => `M${x},${y - 6}L${x + 6},${y + 5}H${x - 6}z`, (x, y) => `M${x},${y - 7}L${x + 6},${y}L${x},${y + 7}L${x - 6},${y}z`,
  (x, y) => `M${x},${y + 6}L${x + 6},${y - 5}H${x - 6}z`, (x, y) => `M${x - 2},${y - 6}h4v4h4v4h-4v4h-4v-4h-4v-4h4z`,
];

/** The points, who dominates whom, the front from its best x on, what is above the picture, and which rows have no number. */
export function compute({ rows, dense, qualities, axes, quality, x, kind }) {
  const chosen = rows.filter((r) => kind === "all" || r.kind === kind), has = (r) => x in r.values && quality in r.values;
  const cap = qualities[quality].log ? CAP * dense[quality] : Infinity;
  const cost = (p) => [axes[x].less ? p.x : -p.x, qualities[quality].less ? p.y : -p.y];
  const beats = (a, b) => {
    const [p, q] = [cost(a), cost(b)];
    return p[0] <= q[0] && p[1] <= q[1] && (p[0] < q[0] || p[1] < q[1]);
  };
  const points = chosen.filter(has).map((r) => ({ name: r.name, title: r.title, method: r.method, x: r.values[x], y: r.values[quality] }));
  for (const p of points) {
    p.beaten = points.filter((other) => beats(other, p)).map((other) => other.name);
    p.front = !p.beaten.length;
    p.above = p.y > cap;
  }
  const front = points.filter((p) => p.front).sort((a, b) => cost(a)[0] - cost(b)[0] || cost(a)[1] - cost(b)[1]).map((p) => p.name);
  const missing = chosen.filter((r) => !has(r)).map((r) => [r.title, r.why[x] ?? r.why[quality]]);
  return { points, front, missing, cap, above: points.filter((p) => p.above).length };
}

/** Round numbers between lo and hi for a scale of logarithms, or for a plain one. */
function marks(lo, hi, log) {
  if (!log) return ticks(lo, hi, 5);
  const found = [];
  for (let e = Math.floor(Math.log10(lo)); e <= Math.log10(hi); e += 1) found.push(...[1, 2, 5].map((f) => f * 10 ** e));
  const inside = found.filter((v) => v >= lo && v <= hi);
  return inside.length > 2 ? inside : ticks(lo, hi, 5);
}

/** A scale from the values to pixels, with room at both ends, and its marks. */
function scaleOf(values, [low, high], log, most = Infinity) {
  const kept = values.filter((v) => v <= most), ends = kept.length ? extent(kept) : [1, 2];
  if (kept.length < values.length) ends[1] = most;
  const to = log ? Math.log10 : (v) => v, [a, b] = ends.map(to), room = 0.04 * (b - a || 1);
  const flat = linear([a - room, b + (kept.length < values.length ? 0 : room)], [low, high]), back = log ? (v) => 10 ** v : (v) => v;
  return Object.assign((v) => flat(to(Math.min(v, most))), { marks: marks(...flat.domain.map(back), log) });
}

const styles = (rows) => {
  const methods = [...new Set(rows.map((r) => r.method))];
  return Object.fromEntries(methods.map((m, i) => [m, { colour: `c-${COLOURS[i % 7]}`, line: `s-${COLOURS[i % 7]}`, shape: SHAPES[i % 6] }]));
};
const shown = (key, v) => (key.endsWith("acc_norm") ? `${(100 * v).toFixed(1)} %` : key.startsWith("tokens") ? Math.round(v).toLocaleString("en-US") : fmt(v, 4));

function draw(root, width, height, { rows, dense, qualities, axes, quality, x: key, row }, r) {
  const about = qualities[quality], across = axes[key], share = quality.endsWith("acc_norm") ? 100 : 1;
  const fp = dense[quality], fastFp = dense[key]; // a speed, or nothing
  const title = [`${about.label}${share > 1 ? " in %" : ""}`, `${about.less ? "less" : "more"} is better`], lines = width < 420 ? title : [title.join(", ")];
  const left = 44, right = width - 12, top = 25 + 15 * lines.length + (fastFp ? 15 : 0), bottom = height - 44;
  lines.forEach((line, i) => root.append(svg("text", { class: "strong", x: 4, y: 14 + 15 * i }, line)));
  if (!r.points.length) {
    root.append(svg("text", { class: "muted", x: left, y: top + 20 }, "None of these rows has both numbers."));
    return;
  }
  const y = scaleOf([...r.points.map((p) => p.y), fp].map((v) => share * v), [about.less ? bottom - 18 : bottom, about.less ? top : top + 12], about.log, share * r.cap);
  const x = scaleOf([...r.points.map((p) => p.x), fastFp ?? r.points[0].x], [left + 8, right - 8], across.log);
  for (const t of y.marks) {
    root.append(svg("line", { class: "rule", "stroke-opacity": 0.45, x1: left, x2: right, y1: y(t), y2: y(t) }));
    root.append(svg("text", { class: "muted", x: left - 5, y: y(t) + 4, "text-anchor": "end" }, fmt(t)));
  }
  root.append(svg("line", { class: "rule", x1: left, x2: right, y1: bottom, y2: bottom }));
  for (const t of x.marks) {
    root.append(svg("line", { class: "rule", x1: x(t), x2: x(t), y1: bottom, y2: bottom + 4 }));
    root.append(svg("text", { class: "muted", x: x(t), y: bottom + 17, "text-anchor": "middle" }, t >= 1000 ? t.toLocaleString("en-US") : fmt(t)));
  }
  root.append(svg("text", { x: (left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, `${across.label}, ${across.less ? "less" : "more"} is better`));
  const dashed = { stroke: "currentColor", "stroke-dasharray": "5 4", "stroke-opacity": 0.8 }, level = y(share * fp);
  root.append(svg("line", { ...dashed, x1: left, x2: right, y1: level, y2: level }));
  if (fastFp) { // both numbers above the points and their arrows, where they cover none
    const at = x(fastFp), anchor = at < (left + right) / 2 ? "start" : "end";
    root.append(svg("line", { ...dashed, x1: at, x2: at, y1: top - 17, y2: bottom }));
    root.append(svg("text", { class: "strong", x: at, y: top - 21, "text-anchor": anchor }, `FP ${shown(quality, fp)} at ${shown(key, fastFp)}`));
  } else {
    root.append(svg("text", { class: "strong", x: left + 4, y: about.less ? level + 16 : level - 5 }, `FP ${shown(quality, fp)}`));
  }
  const style = styles(rows), at = Object.fromEntries(r.points.map((p) => [p.name, p]));
  for (const p of r.points) [p.px, p.py] = [x(p.x), y(share * p.y)];
  const stairs = r.front.map((name, i) => (i ? `H${at[name].px}V${at[name].py}` : `M${at[name].px},${about.less ? top : bottom}V${at[name].py}`));
  root.append(svg("path", { fill: "none", stroke: "currentColor", "stroke-width": 1.5, d: `${stairs.join("")}H${across.less ? right : left}` }));
  for (const p of [...r.points].sort((a, b) => a.front - b.front)) {
    const { colour, line, shape } = style[p.method], d = shape(p.px, p.py);
    root.append(svg("path", { class: p.front ? colour : line, d }));
    if (p.above) root.append(svg("path", { class: line, d: `M${p.px},${top - 8}v-9m-3.5,3.5l3.5,-3.5l3.5,3.5` }));
  }
  const mine = at[row];
  if (!mine) return;
  const after = mine.px < (left + right) / 2;
  root.append(svg("circle", { fill: "none", stroke: "currentColor", "stroke-width": 2, cx: mine.px, cy: mine.py, r: 10 }));
  const y0 = mine.above ? mine.py - 6 : mine.py + (mine.py > bottom - 30 ? -14 : 4), x0 = mine.px + (after ? 14 : -14);
  root.append(svg("text", { class: "strong", x: x0, y: y0, "text-anchor": after ? "start" : "end" }, mine.title));
}

/** What the chosen row costs, how far it is from FP, and whether another row beats it. */
function aboutRow({ rows, dense, qualities, axes, quality, x, row }, r) {
  const { title, values, moved, why, kind } = rows.find((one) => one.name === row), p = r.points.find((one) => one.name === row);
  if (!p) return `${title} is not shown: ${why[x] ?? why[quality] ?? (kind === "both" ? "it quantizes activations, too" : "it quantizes weights alone")}.`;
  const [by, error] = moved[quality], loss = quality.endsWith("_ppl"), size = loss ? 1 : 100, unit = loss ? "nats a token" : "points";
  const digits = (v) => (loss ? v.toFixed(4) : v.toFixed(2)), sign = by < 0 ? "−" : "+";
  const difference = `${sign}${digits(size * Math.abs(by))}${error === null ? "" : ` ± ${digits(size * error)}`} ${unit}`;
  const name = (one) => r.points.find((other) => other.name === one).title, many = p.beaten.length;
  return (
    `${title} – ${axes[x].label}: ${shown(x, values[x])}; ${qualities[quality].label}: ${shown(quality, values[quality])}, ` +
    `FP ${shown(quality, dense[quality])}; against FP ${difference}${error === null ? "" : " (paired standard error)"}. ` +
    (many ? `Beaten in both by ${name(p.beaten[0])}${many > 1 ? ` and ${many - 1} more` : ""}.` : "No row beats it in both.")
  );
}

/** The members of the front, and what the picture cannot show to scale. */
function aboutFront({ dense, axes, x }, { points, front, above }) {
  if (!points.length) return "None of these rows has both numbers.";
  const fp = dense[x], faster = points.filter((p) => p.x > fp).length; // only a speed has a value of FP
  const names = front.map((name) => points.find((p) => p.name === name)).map((p) => `${p.title}${p.above ? " (above the picture)" : ""}`);
  const edge = above ? ` Above the picture, over ${CAP} times FP's perplexity: ${above} of ${points.length} rows.` : "";
  const speed = fp ? ` FP itself: ${shown(x, fp)} ${axes[x].label}; ${faster || "no"} ${faster > 1 ? "rows are" : "row is"} faster.` : "";
  return `On the front, ${front.length} of ${points.length} rows: ${names.join("; ")}.${edge}${speed}`;
}

/** The rows without a number, a line for each reason; nothing where all are shown. */
function listMissing({ missing }) {
  if (!missing.length) return [];
  const reasons = [...new Set(missing.map(([, why]) => why))];
  const lines = reasons.map((why) => h("li", {}, `${missing.filter((m) => m[1] === why).map((m) => m[0]).join("; ")}: ${why}`));
  return [h("summary", {}, `Not shown: ${missing.length} ${missing.length > 1 ? "rows" : "row"}, and why`), h("ul", {}, lines)];
}

export default {
  render({ model, el }) {
    const fixed = Object.fromEntries(["rows", "dense", "qualities", "axes"].map((key) => [key, model.get(key)]));
    const labels = (table) => Object.entries(table).map(([key, { label }]) => [key, label]);
    const items = {
      quality: choice({ label: "quality", options: labels(fixed.qualities) }),
      x: choice({ label: "against", options: labels(fixed.axes) }),
      kind: choice({ label: "quantized", options: [["all", "all rows"], ["weights", "weights alone"], ["both", "weights and activations"]] }),
      row: choice({ label: "describe", options: fixed.rows.map((r) => [r.name, r.title]) }),
    };
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const view = picture({
      label: "Points: quality of every row against its cost; a line of steps joins the rows that nobody beats, a dashed one is FP",
      height: (width) => (width < 420 ? 350 : 400),
      draw: (root, width, height) => draw(root, width, height, inputs(), result),
    });
    const pick = (event, reach) => {
      const box = view.node.getBoundingClientRect(), far = (p) => Math.hypot(p.px - event.clientX + box.left, p.py - event.clientY + box.top);
      const near = result.points.filter((p) => far(p) <= reach).sort((a, b) => far(a) - far(b))[0];
      if (near && near.name !== model.get("row")) { model.set("row", near.name); model.save_changes(); }
    };
    view.node.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") pick(event, 9); });
    view.node.addEventListener("click", (event) => pick(event, 24));
    const style = styles(fixed.rows), mark = (d, attributes) => svg("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, svg("path", { ...attributes, d }));
    const key = h("ul", { class: "legend" }, Object.entries(style).map(([name, { colour, shape }]) => h("li", {}, mark(shape(7, 7), { class: colour }), name)),
      h("li", {}, mark("M1,1V7H8V12H14", { fill: "none", stroke: "currentColor", "stroke-width": 1.5 }), "front; filled: on it"));
    const live = liveRegion(), missing = h("details");
    live.node.style.whiteSpace = "pre-line";
    el.append(controls(...Object.values(items)), view.node, key, live.node, missing);
    connect(model, items, () => {
      result = compute(inputs());
      view.redraw();
      live.say(`${aboutRow(inputs(), result)}\n${aboutFront(inputs(), result)}`);
      missing.replaceChildren(...listMissing(result));
      missing.hidden = !result.missing.length;
    });
  },
};
