// Chapter 12: the 16 codes of one group on the line of channel codes, and whether int8 holds what they decode to.
// data: lo and hi (smallest and largest channel code of the group), protective (limit of channel codes), zero ("code" or "offset")

const INT8 = [-128, 127];

/** What int8 keeps of an integer. */
const wrap = (v) => ((((v + 128) % 256) + 256) % 256) - 128;

/** The group's scale and zero point, its 16 points, and which of them rounding can reach: ProgressiveGrid.fit and encode. */
export function compute({ lo: given_lo, hi: given_hi, protective, zero }) {
  const lo = Math.max(given_lo, -protective), hi = Math.min(given_hi, protective);
  const scale = Math.max(1, roundEven((hi - lo) / 15));
  const z = zero === "code" ? clamp(roundEven(-lo / scale), 0, 15) : -lo;
  const decode = (q) => (zero === "code" ? (q - z) * scale : q * scale - z);
  const encode = (w) => clamp(zero === "code" ? roundEven(w / scale) + z : roundEven((w + z) / scale), 0, 15);
  const points = Array.from({ length: 16 }, (_, q) => decode(q));
  const fits = (v) => v >= INT8[0] && v <= INT8[1];
  const codes = [encode(lo), encode(hi)], ends = codes.map(decode);
  return {
    lo, hi, scale, zero: z, points, codes, ends, wrapped: ends.map(wrap),
    overflow: !ends.every(fits), outside: points.filter((v) => !fits(v)).length,
    cut: [Math.max(0, points[0] - lo), Math.max(0, hi - points[15])],
  };
}

const EDGE = 152, SIDE = 12;

/** The line of channel codes with int8's range, the group's range, its 16 points, and where what overflows ends up. */
function drawLine(root, width, r, protective) {
  const x = linear([-EDGE, EDGE], [SIDE, width - SIDE]), line = 92;
  const box = (lo, hi, y, height, attributes) =>
    root.append(svg("rect", { x: x(lo), width: Math.max(1, x(hi) - x(lo)), y, height, ...attributes }));
  root.append(svg("text", { class: "strong", x: SIDE, y: 13 }, "channel codes; grey: outside int8"));
  box(-EDGE, INT8[0] - 0.5, 22, 124, { class: "c-grey", "fill-opacity": 0.3 });
  box(INT8[1] + 0.5, EDGE, 22, 124, { class: "c-grey", "fill-opacity": 0.3 });
  for (const at of [-protective, protective])
    root.append(svg("line", { class: "s-green", "stroke-dasharray": "4 4", x1: x(at), x2: x(at), y1: 22, y2: 146 }));
  box(r.lo, r.hi, 44, 12, { class: "c-blue" });
  root.append(svg("text", { x: x((r.lo + r.hi) / 2), y: 38, "text-anchor": "middle" }, `the group: ${r.lo} … ${r.hi}`));
  root.append(svg("line", { class: "rule", x1: SIDE, x2: width - SIDE, y1: line, y2: line }));
  r.points.forEach((v, q) => {
    const reached = q >= r.codes[0] && q <= r.codes[1], bad = v < INT8[0] || v > INT8[1];
    const colour = bad ? "red" : "orange";
    root.append(svg("circle", { class: reached ? `c-${colour}` : `s-${colour}`, cx: x(v), cy: line, r: bad ? 6 : 4 }));
  });
  r.ends.forEach((v, i) => {
    if (r.wrapped[i] === v) return;
    const from = x(v), to = x(r.wrapped[i]);
    root.append(
      svg("path", { class: "s-red", d: `M${from},${line + 8}V122H${to}V${line + 10}`, "stroke-dasharray": "5 3" }),
      svg("text", { x: (from + to) / 2, y: 137, "text-anchor": "middle" }, `${v} is stored as ${r.wrapped[i]}`));
  });
  axis(root, x, { y: 146, ticks: width < 420 ? 5 : 9 });
}

/** The 16 codes with what they decode to, two rows of eight; a frame marks what rounding reaches. */
function drawTable(root, width, r) {
  const wide = (width - 2 * SIDE) / 8;
  root.append(svg("text", { class: "strong", x: SIDE, y: 13 }, "codes and what they decode to"));
  r.points.forEach((v, q) => {
    const left = SIDE + (q % 8) * wide, top = 22 + Math.floor(q / 8) * 48, bad = v < INT8[0] || v > INT8[1];
    if (q >= r.codes[0] && q <= r.codes[1])
      root.append(svg("rect", { class: bad ? "s-red" : "s-orange", x: left + 2, y: top, width: wide - 4, height: 42 }));
    root.append(
      svg("text", { class: "muted", x: left + wide / 2, y: top + 16, "text-anchor": "middle" }, q),
      svg("text", { class: bad ? "strong" : "", x: left + wide / 2, y: top + 35, "text-anchor": "middle" }, v));
  });
}

function describe({ protective, zero }, r) {
  const kind = zero === "code" ? "a zero point before the scale" : "an offset after the scale";
  const cut = r.cut[0] + r.cut[1] ? ` The 16 points miss ${r.cut[0]} at the lower and ${r.cut[1]} at the upper end.` : "";
  const bad = r.ends.map((v, i) => [v, r.wrapped[i]]).filter(([v, w]) => v !== w);
  const end = bad.length
    ? ` Overflow: ${bad.map(([v, w]) => `${v} is stored as ${w}`).join(", ")}.`
    : r.outside
      ? ` No overflow by rounding, but ${r.outside} of the 16 codes would overflow if something else chose ${r.outside > 1 ? "them" : "it"}.`
      : " Every code fits int8.";
  return (
    `Channel codes up to ± ${protective}, ${kind}: the group from ${r.lo} to ${r.hi} gets the scale ${r.scale} and ` +
    `${zero === "code" ? "the zero point" : "the offset"} ${r.zero}; its ends decode to ${r.ends[0]} and ${r.ends[1]}.${cut}${end}`
  );
}

export default {
  render({ model, el }) {
    const items = {
      lo: slider({ label: "smallest in the group", min: -127, max: 0 }),
      hi: slider({ label: "largest in the group", min: 0, max: 127 }),
      protective: slider({ label: "protective range", min: 100, max: 127, format: (v) => `± ${v}` }),
      zero: choice({ label: "zero point", options: [["code", "before the scale"], ["offset", "offset after it"]] }),
    };
    const inputs = () => Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)]));
    let result = null;
    const line = picture({
      label: "The group and its sixteen points on the line of channel codes, with the limits of int8",
      height: 176,
      draw: (root, width) => drawLine(root, width, result, inputs().protective),
    });
    const codes = picture({ label: "What each code decodes to", height: 120, draw: (root, width) => drawTable(root, width, result) });
    const live = liveRegion();
    const key = legend([["blue", "range of the group"], ["orange", "points (filled, framed: reached by rounding)"], ["red", "outside int8"], ["green", "protective range"]]);
    el.append(controls(...Object.values(items)), key, line.node, codes.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      line.redraw();
      codes.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
