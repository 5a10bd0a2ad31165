// Chapter 18: where every kernel was measured under its roof, as the number of rows M grows.
// data: kernels (name -> {bits of a stored weight, act: bytes of an activation, peak: operations/s, measured: shape -> [[M, µs], …]}),
// shapes (name -> [out, in]), bandwidth (bytes/s), shape, kernel (its roof is the thick one), exponent (log2 of M)

/** Bytes, operations, the two bounds and, where M was measured, the time beside them, for every kernel. */
export function compute({ kernels, shapes, bandwidth, shape, exponent }) {
  const m = 2 ** exponent, [n, k] = shapes[shape];
  return Object.fromEntries(Object.entries(kernels).map(([name, { bits, act, peak, measured }]) => {
    const point = (rows) => {
      const bytes = (n * k * bits) / 8 + rows * k * act + rows * n * 2, ops = 2 * rows * n * k;
      const memory = bytes / bandwidth, arithmetic = ops / peak;
      return { rows, bytes, ops, intensity: ops / bytes, memory, arithmetic, floor: Math.max(memory, arithmetic) };
    };
    const points = (measured[shape] ?? []).map(([rows, us]) => {
      const at = point(rows);
      return { ...at, time: us / 1e6, rate: at.ops / (us / 1e6), share: at.floor / (us / 1e6) };
    });
    return [name, { ...point(m), peak, points, here: points.find((p) => p.rows === m) ?? null }];
  }));
}

const COLOURS = ["grey", "blue", "orange", "green", "purple", "sky"];
const micro = (t) => `${fmt(t * 1e6, 3)} µs`;

function drawRoof(root, width, height, { bandwidth, kernel }, r) {
  const left = 46, right = width - 12, top = 26, bottom = height - 40;
  const x = linear([0, 3.9], [left, right]), y = linear([12, 15.3], [bottom, top]);
  const at = (intensity, rate) => [x(Math.log10(intensity)), y(Math.log10(rate))];
  root.append(svg("text", { class: "strong", x: 8, y: 14 }, "operations per second"));
  for (let e = 12; e <= 15; e += 1) {
    root.append(svg("line", { class: "rule", "stroke-opacity": 0.5, x1: left, x2: right, y1: y(e), y2: y(e) }));
    root.append(svg("text", { class: "muted", x: left - 4, y: y(e) + 4, "text-anchor": "end" }, `${fmt(10 ** (e - 12))} T`));
  }
  const names = Object.keys(r);
  for (const name of [...names.filter((other) => other !== kernel), kernel]) {
    const chosen = name === kernel, colour = COLOURS[names.indexOf(name) % COLOURS.length], { peak, points, here } = r[name];
    const [x0, y0] = at(1, bandwidth), [x1, y1] = at(peak / bandwidth, peak), [x2] = at(10 ** 3.9, peak);
    if (chosen) root.append(svg("path", { class: `s-${colour}`, "stroke-width": 2, d: `M${x0},${y0}L${x1},${y1}H${x2}` }));
    for (const p of points) {
      const [px, py] = at(p.intensity, p.rate);
      root.append(svg("circle", { class: `c-${colour}`, "fill-opacity": chosen ? 1 : 0.55, cx: px, cy: py, r: p === here ? 7 : chosen ? 4 : 3 }));
    }
    if (chosen && points.length > 1) {
      const line = points.map((p) => at(p.intensity, p.rate).map((v) => v.toFixed(1)).join(",")).join("L");
      root.append(svg("path", { class: `s-${colour}`, "stroke-dasharray": "3 3", d: `M${line}` }));
    }
  }
  const [gx] = at(r[kernel].intensity, 1e12);
  root.append(svg("line", { class: "s-red", "stroke-dasharray": "2 3", x1: gx, x2: gx, y1: top, y2: bottom }));
  axis(root, x, { y: bottom + 2, ticks: 4, format: (e) => String(10 ** e) });
  root.append(svg("text", { class: "muted", x: right, y: height - 4, "text-anchor": "end" }, "operations per byte"));
}

/** One row a kernel: the floor at this M as a bar, the measured time as a mark behind it. */
function drawTimes(root, width, r) {
  const names = Object.keys(r), wide = max(names.flatMap((name) => [r[name].floor, r[name].here?.time ?? 0]));
  const x = linear([0, wide], [8, width - 8]);
  names.forEach((name, i) => {
    const { floor, memory, arithmetic, here } = r[name], top = 40 * i, colour = COLOURS[i % COLOURS.length];
    const times = `floor ${micro(floor)}${here ? `, measured ${micro(here.time)}` : ""}`;
    root.append(svg("text", { class: "strong", x: 8, y: top + 13 }, name));
    root.append(svg("text", { class: "muted", x: width - 8, y: top + 13, "text-anchor": "end" }, times));
    root.append(svg("rect", { class: `c-${colour}`, "fill-opacity": memory >= arithmetic ? 0.45 : 0.9, x: 8, y: top + 18, width: Math.max(x(floor) - 8, 1), height: 12 }));
    if (here) root.append(svg("line", { class: "s-red", "stroke-width": 3, x1: x(here.time), x2: x(here.time), y1: top + 15, y2: top + 33 }));
  });
}

function describe({ shape, kernel, exponent }, r) {
  const { intensity, memory, arithmetic, floor, here } = r[kernel];
  const bound = memory >= arithmetic ? "memory" : "the tensor cores";
  const found = here ? `It was measured at ${micro(here.time)}, ${fmt(100 * here.share, 2)} % of what is possible.` : "This M was not measured.";
  return `${kernel}, ${shape}, M = ${2 ** exponent}: ${fmt(intensity, 3)} operations a byte, bound by ${bound}, at least ${micro(floor)}. ${found}`;
}

export default {
  render({ model, el }) {
    const keys = (name) => Object.keys(model.get(name)).map((key) => [key, key]);
    const items = {
      kernel: choice({ label: "kernel", options: keys("kernels") }),
      shape: choice({ label: "weight", options: keys("shapes") }),
      exponent: slider({ label: "rows M", min: 0, max: 13, format: (e) => String(2 ** e) }),
    };
    const fixed = Object.fromEntries(["kernels", "shapes", "bandwidth"].map((key) => [key, model.get(key)]));
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const roof = picture({
      label: "Roofline: operations per second against operations per byte, a dot for every measured number of rows",
      height: (width) => (width < 420 ? 260 : 320),
      draw: (root, width, height) => drawRoof(root, width, height, inputs(), result),
    });
    const times = picture({
      label: "For every kernel the least time at this M as a bar, and the measured time as a mark",
      height: () => 40 * Object.keys(result).length,
      draw: (root, width) => drawTimes(root, width, result),
    });
    const live = liveRegion();
    const names = [...Object.keys(fixed.kernels).map((name, i) => [COLOURS[i % COLOURS.length], name]), ["red", "this M; measured time"]];
    el.append(controls(...Object.values(items)), legend(names), roof.node, times.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      roof.redraw();
      times.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
