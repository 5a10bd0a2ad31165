// Chapter 13: a W4A8 dot product, from the bits of a byte that holds two 4-bit codes to the scaled sum.
// data: codes (8 weights, -8 to 7), x (8 activation codes, int8), sx (scale of the activations), sw (scale of the weights),
// mode ("channel": codes times 16, or "group": codes times a ratio, rounded to int8), byte (which pair is open, 0 to 3),
// first and second (the codes of that pair), ratio (s_g / s_c of the group mode)

const signed = (byte) => (byte > 127 ? byte - 256 : byte);

/** The bit pattern of a positive float16. */
function halfBits(value) {
  let exponent = Math.floor(Math.log2(value));
  if (2 ** exponent > value) exponent -= 1;
  return ((exponent + 15) << 10) | Math.round((value / 2 ** exponent - 1) * 1024);
}

/** What a kernel makes of one code: the byte it multiplies, and for groups the float16 sum that holds this byte. */
function operand(code, mode, ratio) {
  if (mode === "channel") return { byte: (code & 15) << 4, value: 16 * code };
  const half = f16(code * f16(ratio) + 1152); // a fused multiply-add: rounded once
  return { half, byte: (halfBits(half) & 255) ^ 128, value: roundEven(code * f16(ratio)) };
}

/** Bytes, operands, products and sums; `exact` is what the sum would be if no operand had wrapped. */
export function compute({ codes, x, sx, sw, mode, byte, first, second, ratio }) {
  const q = codes.map((code, i) => (i === 2 * byte ? first : i === 2 * byte + 1 ? second : code));
  const packed = [0, 2, 4, 6].map((i) => (q[i] & 15) | ((q[i + 1] & 15) << 4));
  const parts = q.map((code) => operand(code, mode, ratio));
  const operands = parts.map((part) => signed(part.byte));
  const products = operands.map((w, i) => w * x[i]);
  const total = sum(products), exact = sum(parts.map((part, i) => part.value * x[i]));
  const step = mode === "channel" ? sw / 16 : sw / f16(ratio);
  return {
    q, packed, operands, products, total, exact, step,
    halves: parts.map((part) => part.half ?? null),
    wrapped: parts.map((part, i) => part.value !== operands[i]),
    y: sx * step * total,
    wanted: sx * sw * sum(q.map((code, i) => code * x[i])),
  };
}

const bitsOf = (byte) => [7, 6, 5, 4, 3, 2, 1, 0].map((i) => (byte >> i) & 1);
const minus = (v) => String(v).replace("-", "−");

/** Eight boxes with the bits of a byte; colours by bit. */
function drawByte(root, left, top, byte, colours) {
  bitsOf(byte).forEach((bit, i) => {
    root.append(svg("rect", { class: colours[i], "fill-opacity": 0.3, x: left + 17 * i, y: top, width: 16, height: 22 }));
    root.append(svg("text", { class: "strong", x: left + 17 * i + 8, y: top + 16, "text-anchor": "middle" }, bit));
  });
}

const HALVES = [...Array(4).fill("c-orange"), ...Array(4).fill("c-blue")]; // upper nibble, lower nibble

/** From the open byte to its two operands. */
function drawOpen(root, width, result, { mode, byte, ratio }) {
  const i = 2 * byte, left = Math.max(8, width / 2 - 68);
  root.append(svg("text", { class: "strong", x: 8, y: 14 }, `byte ${byte}: two codes`));
  drawByte(root, left, 24, result.packed[byte], HALVES);
  root.append(svg("text", { class: "muted", x: left + 34, y: 62, "text-anchor": "middle" }, minus(result.q[i + 1])));
  root.append(svg("text", { class: "muted", x: left + 102, y: 62, "text-anchor": "middle" }, minus(result.q[i])));
  [[i, "first", "c-blue"], [i + 1, "second", "c-orange"]].forEach(([k, name, colour], row) => {
    const top = 80 + 96 * row, code = minus(result.q[k]), channel = mode === "channel";
    const how = channel
      ? [`${name} code: ${row ? "AND" : "shift"} the byte`, row ? "with 11110000" : "left by 4"]
      : [`${name} code: ${code} · ${fmt(f16(ratio), 4)} + 1152 → ${result.halves[k]}`, "low byte, top bit flipped"];
    how.forEach((text, line) => root.append(svg("text", { x: 8, y: top + 12 + 17 * line }, text)));
    const colours = channel ? [...Array(4).fill(colour), ...Array(4).fill("c-grey")] : Array(8).fill(colour);
    drawByte(root, 8, top + 38, result.operands[k] & 255, colours);
    root.append(svg("text", { class: "strong", x: 154, y: top + 54 }, `int8 ${minus(result.operands[k])}`));
    const note = channel ? `= 16 · ${code}` : result.wrapped[k] ? `not ${minus(roundEven(result.q[k] * f16(ratio)))}` : "";
    root.append(svg("text", { class: channel ? "muted" : "strong c-red", x: 8, y: top + 75 }, note));
  });
}

/** All eight products as bars, the open pair in its colours, wrapped ones in red; on a phone every other number is lower. */
function drawProducts(root, width, result, { x, byte }) {
  root.append(svg("text", { class: "strong", x: 8, y: 14 }, "codes of x, operands, products"));
  const reach = max(result.products.map(Math.abs)) || 1, wide = (width - 16) / 8;
  const y = linear([-reach, reach], [162, 76]);
  result.products.forEach((p, i) => {
    const centre = 8 + wide * (i + 0.5), lower = width < 460 && i % 2 ? 13 : 0;
    const colour = result.wrapped[i] ? "c-red" : i === 2 * byte ? "c-blue" : i === 2 * byte + 1 ? "c-orange" : "c-grey";
    const write = (v, at) => root.append(svg("text", { x: centre, y: at, "text-anchor": "middle" }, minus(v)));
    write(x[i], 34);
    write(result.operands[i], 52 + lower);
    root.append(svg("rect", { class: colour, x: centre - wide * 0.35, width: wide * 0.7, y: Math.min(y(0), y(p)), height: Math.max(1, Math.abs(y(p) - y(0))) }));
    write(p, 180 + lower);
  });
  root.append(svg("line", { class: "rule", x1: 8, x2: width - 8, y1: y(0), y2: y(0) }));
  root.append(svg("text", { class: "strong", x: 8, y: 216 }, `int32 sum ${minus(result.total)}`));
}

function describe({ mode, byte, first, second, ratio, sx }, result) {
  const bits = result.packed[byte].toString(2).padStart(8, "0"), i = 2 * byte;
  const start = `Byte ${byte} is ${bits}: codes ${minus(first)} and ${minus(second)}. `;
  const made = `Their operands are ${minus(result.operands[i])} and ${minus(result.operands[i + 1])}; the sum of all products is ${minus(result.total)}`;
  const scaled = `times ${fmt(sx)} · ${fmt(result.step)} gives ${minus(fmt(result.y, 4))}`;
  if (mode === "channel") return `${start}${made}, 16 times the plain ${minus(result.total / 16)}; ${scaled}.`;
  const bad = result.wrapped.filter(Boolean).length;
  const verdict = bad ? `${bad} of 8 operands left int8, the true sum is ${minus(result.exact)}` : "nothing wrapped";
  return `${start}At the ratio ${fmt(f16(ratio), 4)}, ${made.replace("Their", "their")} (${verdict}); ${scaled}, and the codes themselves give ${minus(fmt(result.wanted, 4))}.`;
}

export default {
  render({ model, el }) {
    const items = {
      mode: choice({ label: "kernel", options: [["channel", "per channel: code · 16"], ["group", "per group: code · ratio"]] }),
      byte: slider({ label: "byte", min: 0, max: 3 }),
      first: slider({ label: "first code", min: -8, max: 7, format: minus }),
      second: slider({ label: "second code", min: -8, max: 7, format: minus }),
      ratio: slider({ label: "ratio of groups", min: 0.25, max: 20, step: 0.25, format: (r) => fmt(r) }),
    };
    const fixed = Object.fromEntries(["codes", "x", "sx", "sw"].map((key) => [key, model.get(key)]));
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const open = picture({ label: "One byte, its two codes and the two int8 operands", height: 268, draw: (root, width) => drawOpen(root, width, result, inputs()) });
    const products = picture({ label: "Activation codes, operands, products and their sum", height: 224, draw: (root, width) => drawProducts(root, width, result, inputs()) });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), open.node, products.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      open.redraw();
      products.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
