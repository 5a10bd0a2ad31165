// Chapter 03: how many windows does it take to see a difference? Unpaired and paired intervals from real losses.
// data: losses (name -> loss of each window; "fp32" is the reference), other, count, scale (share of the damage)

function stats(values) {
  const m = mean(values);
  const variance = sum(values.map((x) => (x - m) ** 2)) / (values.length - 1);
  return { mean: m, stderr: Math.sqrt(variance / values.length) };
}

/** Means and standard errors on the first `count` windows; the difference both ways; which intervals exclude zero. */
export function compute({ losses, other, count, scale = 1 }) {
  const base = losses.fp32.slice(0, count);
  // a fraction of the measured damage, window by window: a smaller difference with the same kind of noise
  const worse = base.map((x, i) => x + scale * (losses[other][i] - x));
  const a = stats(base), b = stats(worse);
  const paired = stats(worse.map((x, i) => x - base[i]));
  const unpaired = { mean: b.mean - a.mean, stderr: Math.hypot(a.stderr, b.stderr) };
  const seen = (d) => Math.abs(d.mean) > 2 * d.stderr;
  return { a, b, paired, unpaired, paired_seen: seen(paired), unpaired_seen: seen(unpaired) };
}

function drawBars(root, width, result) {
  const rows = [["unpaired", result.unpaired, "orange"], ["paired", result.paired, "blue"]];
  const ends = rows.flatMap(([, d]) => [d.mean - 2 * d.stderr, d.mean + 2 * d.stderr, 0]);
  const [lo, hi] = extent(ends);
  const pad = 0.05 * (hi - lo || 1);
  const x = linear([lo - pad, hi + pad], [8, width - 8]);
  rows.forEach(([name, d, color], i) => {
    const y = 40 + i * 52;
    root.append(svg("text", { class: "strong", x: 8, y: y - 14 }, `${name}: ${fmt(d.mean)} ± ${fmt(2 * d.stderr)} nats`));
    root.append(svg("line", { class: `s-${color}`, "stroke-width": 4, x1: x(d.mean - 2 * d.stderr), x2: x(d.mean + 2 * d.stderr), y1: y, y2: y }));
    root.append(svg("circle", { class: `c-${color}`, cx: x(d.mean), cy: y, r: 6 }));
  });
  root.append(svg("line", { class: "rule", x1: x(0), x2: x(0), y1: 30, y2: 112, "stroke-dasharray": "4 3" }));
  axis(root, x, { y: 116, ticks: width < 420 ? 4 : 7 });
}

function describe({ other, count, scale }, result) {
  const verdict = (seen) => (seen ? "resolves the difference" : "cannot tell it from zero");
  return (
    `${other} at ${Math.round(100 * scale)} % of its damage, ${count} windows: the unpaired interval ${verdict(result.unpaired_seen)}, ` +
    `the paired one ${verdict(result.paired_seen)}. Pairing makes the error bar ${fmt(result.unpaired.stderr / result.paired.stderr)} times shorter.`
  );
}

export default {
  render({ model, el }) {
    const names = Object.keys(model.get("losses")).filter((name) => name !== "fp32");
    const items = {
      other: choice({ label: "compare with", options: names.map((name) => [name, name]) }),
      count: slider({ label: "windows", min: 4, max: model.get("losses").fp32.length, step: 4 }),
      scale: slider({ label: "share of its damage", min: 0.02, max: 1, step: 0.02, format: (x) => `${Math.round(100 * x)} %` }),
    };
    const inputs = () => Object.fromEntries(["losses", "other", "count", "scale"].map((key) => [key, model.get(key)]));
    let result = null;
    const view = picture({
      label: "Two intervals for the difference in loss, unpaired above paired, with a line at zero",
      height: 142,
      draw: (root, width) => drawBars(root, width, result),
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
