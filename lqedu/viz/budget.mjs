// Chapter 25: the smallest stored model that meets a budget of memory and one of quality, picked from recorded results.
// data: rows ([{name, bits, loss, stderr, text}]: bits per weight, nats above dense, its error, whether text was read),
// linear and other (parameters), memory (MB), quality (nats), rest (bits of the other parameters), free (only without text)

const TOP = 1.2; // nats: what is worse stands at the upper edge

/** Megabytes of every row, whether it meets the budgets, and the pick: fewest bytes, then least loss; -1 if none does. */
export function compute({ rows, linear: weights, other, memory, quality, rest, free }) {
  const size = rows.map((row) => (weights * row.bits + other * rest) / 8e6);
  const small = size.map((mb) => mb <= memory);
  const good = rows.map((row) => row.loss + 2 * row.stderr <= quality);
  const meets = rows.map((row, i) => small[i] && good[i] && !(free && row.text));
  let pick = -1;
  rows.forEach((row, i) => {
    const better = pick < 0 || size[i] < size[pick] || (size[i] === size[pick] && row.loss < rows[pick].loss);
    if (meets[i] && better) pick = i;
  });
  const count = (flags) => sum(flags.map(Number));
  return { size, meets, pick, small: count(small), good: count(good), both: count(meets), dense: (other * rest) / 8e6 };
}

function draw(root, width, { rows, memory, quality }, { size, meets, pick }) {
  const left = 44, bottom = 206;
  const x = linear([40, 260], [left, width - 14]), y = linear([0, TOP], [bottom, 28]);
  const edge = clamp(memory, 40, 260), line = clamp(quality, 0, TOP);
  root.append(
    svg("text", { class: "strong", x: 8, y: 14 }, "loss above dense, nats"),
    svg("rect", { class: "c-green", "fill-opacity": 0.15, x: left, y: y(line), width: Math.max(x(edge) - left, 1), height: Math.max(bottom - y(line), 1) }),
    svg("line", { class: "s-green", "stroke-dasharray": "5 3", x1: x(edge), x2: x(edge), y1: 28, y2: bottom }),
    svg("line", { class: "s-green", "stroke-dasharray": "5 3", x1: left, x2: width - 14, y1: y(line), y2: y(line) }));
  for (const at of ticks(0, TOP, 4))
    root.append(svg("text", { class: "muted", x: left - 6, y: y(at) + 4, "text-anchor": "end" }, fmt(at)));
  const order = rows.map((_, i) => i).sort((a, b) => (a === pick) - (b === pick)); // the pick on top
  for (const i of order) {
    const place = { cx: x(clamp(size[i], 40, 260)), cy: y(clamp(rows[i].loss, 0, TOP)) };
    const chosen = i === pick;
    root.append(svg("circle", { ...place, class: chosen ? "c-orange" : meets[i] ? "c-blue" : "c-grey", r: chosen ? 8 : 5 }));
  }
  if (pick >= 0) {
    const at = x(clamp(size[pick], 40, 260)), right = at > width / 2;
    root.append(svg("text", { class: "strong", x: at + (right ? -12 : 12), y: y(clamp(rows[pick].loss, 0, TOP)) - 10, "text-anchor": right ? "end" : "start" }, rows[pick].name));
  }
  axis(root, x, { y: bottom, ticks: width < 420 ? 4 : 7, label: "MB of weights" });
}

function describe({ rows, memory, quality, rest, free }, { size, pick, small, good, both, dense }) {
  const asked = `At most ${memory} MB and ${fmt(quality)} nats, the rest in ${rest} bits, which takes ${fmt(dense)} MB${free ? ", no calibration text" : ""}: `;
  const counts = `${small} of ${rows.length} results are small enough, ${good} good enough, ${both} all that was asked. `;
  if (pick < 0) return `${asked}${counts}Nothing to pick: give more memory, accept more loss, or store the rest in fewer bits.`;
  const row = rows[pick];
  return `${asked}${counts}The pick is ${row.name}: ${fmt(size[pick])} MB, ${fmt(row.loss)} ± ${fmt(row.stderr, 2)} nats.`;
}

export default {
  render({ model, el }) {
    const items = {
      memory: slider({ label: "memory", min: 40, max: 260, step: 2, format: (mb) => `${mb} MB` }),
      quality: slider({ label: "loss allowed", min: 0, max: TOP, step: 0.01, format: (x) => `${fmt(x)} nats` }),
      rest: choice({ label: "embedding and norms in", options: [[32, "32 bits"], [16, "16 bits"], [8.5, "8 bits, g32"]] }),
      free: toggle({ label: "without calibration text" }),
    };
    const keys = ["rows", "linear", "other", ...Object.keys(items)];
    const inputs = () => Object.fromEntries(keys.map((key) => [key, model.get(key)]));
    let result = null;
    const view = picture({
      label: "Recorded results by megabytes and loss, with the two budgets as lines and the pick marked",
      height: 248, draw: (root, width) => draw(root, width, inputs(), result),
    });
    const key = legend([["orange", "the pick"], ["blue", "meets both budgets"], ["grey", "does not"], ["green", "budgets"]]);
    const live = liveRegion();
    el.append(controls(...Object.values(items)), view.node, key, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      view.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
