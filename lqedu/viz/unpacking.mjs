// Chapter 19: eight 4-bit codes in one 32-bit register, and what each kernel's unpacking makes of the bits.
// data: codes (8 nibbles of the word, 0 to 15), trick ("magic", "upper", "add" or "flip"), place (which nibble is edited, 0 to 7),
// code (its value), scale (the integer group scale), zero (the zero point)

const ONES = 0x01010101, LOW = 0x0f0f0f0f;
const u32 = (x) => x >>> 0;
const bytes = (word) => [0, 8, 16, 24].map((shift) => (word >>> shift) & 255);
const int8 = (byte) => (byte > 127 ? byte - 256 : byte);

/** The value of a positive normal float16 from its bits. */
const half = (bits) => (1 + (bits & 1023) / 1024) * 2 ** ((bits >> 10) - 15);
const halves = (word) => [half(word & 65535), half(word >>> 16)];

/** Byte by byte a + b, without carries between bytes. */
const addBytes = (a, b) => u32(((a & 0x7f7f7f7f) + (b & 0x7f7f7f7f)) ^ ((a ^ b) & 0x80808080));

const step = (text, word, kind, values, cost) => ({ text, word: word === null ? null : u32(word), kind, values, cost });

/** W4A16: a nibble in the mantissa of 1024 is 1024 + q, one place further 1024 + 16 q. */
function magic(word) {
  const steps = [], got = [];
  for (const shift of [0, 8]) {
    const w = word >>> shift;
    if (shift) steps.push(step("w >> 8", w, "bits", [], 1));
    const low = (w & 0x000f000f) | 0x64006400, high = (w & 0x00f000f0) | 0x64006400;
    steps.push(step("(w & 000f000f) | 64006400", low, "half", halves(u32(low)), 1));
    steps.push(step("… − 1024", null, "half", halves(u32(low)).map((v) => v - 1024), 1));
    steps.push(step("(w & 00f000f0) | 64006400", high, "half", halves(u32(high)), 1));
    steps.push(step("… · 1/16 − 64", null, "half", halves(u32(high)).map((v) => v / 16 - 64), 1));
    got.push(...halves(u32(low)).map((v) => v - 1024), ...halves(u32(high)).map((v) => v / 16 - 64));
  }
  return { steps, operands: [0, 2, 4, 6, 1, 3, 5, 7].map((i) => got[i]) };
}

/** QQQ per channel: a signed nibble in the upper half of its byte is 16 times the code. */
function upper(word) {
  const shifted = u32(word << 4), low = u32(shifted & 0xf0f0f0f0), high = u32(word & 0xf0f0f0f0);
  const steps = [
    step("w << 4", shifted, "bits", [], 1),
    step("… & f0f0f0f0", low, "int8", bytes(low).map(int8), 1),
    step("w & f0f0f0f0", high, "int8", bytes(high).map(int8), 1),
  ];
  return { steps, operands: interleave(bytes(low).map(int8), bytes(high).map(int8)) };
}

/** Two-level scales: four codes times a scale in one 32-bit product; then either an addition of bytes or a flip of top bits. */
function twoLevel(word, scale, zero, flip) {
  const steps = [], parts = [];
  const a = flip ? (128 - zero * scale) & 255 : -zero * scale & 255;
  for (const [text, part, cost] of [["w & 0f0f0f0f", word & LOW, 1], ["(w >> 4) & 0f0f0f0f", (word >>> 4) & LOW, 2]]) {
    steps.push(step(text, part, "uint8", bytes(part), cost));
    let word8 = u32(Math.imul(part, scale));
    if (flip) {
      word8 = u32(word8 + Math.imul(a, ONES));
      steps.push(step(`… · ${scale} + ${a} · 01010101`, word8, "uint8", bytes(word8), 1));
      word8 = u32(word8 ^ 0x80808080);
      steps.push(step("… ^ 80808080", word8, "int8", bytes(word8).map(int8), 1));
    } else {
      steps.push(step(`… · ${scale}`, word8, "uint8", bytes(word8), 1));
      word8 = addBytes(word8, u32(Math.imul(a, ONES)));
      steps.push(step(`bytes + ${a}`, word8, "int8", bytes(word8).map(int8), 4));
    }
    parts.push(bytes(word8).map(int8));
  }
  return { steps, operands: interleave(...parts) };
}

const interleave = (low, high) => low.flatMap((v, i) => [v, high[i]]);

/** Every step of one unpacking, the eight operands in the order of the nibbles, what they ought to be, and the instructions. */
export function compute({ codes, trick, place, code, scale, zero }) {
  const q = codes.map((c, i) => (i === place ? code : c));
  const word = u32(q.reduce((total, c, i) => total | (c << (4 * i)), 0));
  const signed = q.map((c) => (c > 7 ? c - 16 : c));
  const made = trick === "magic" ? magic(word) : trick === "upper" ? upper(word) : twoLevel(word, scale, zero, trick === "flip");
  const wanted = trick === "magic" ? q : trick === "upper" ? signed.map((c) => 16 * c) : q.map((c) => (c - zero) * scale);
  return { q, word, ...made, wanted, instructions: sum(made.steps.map((s) => s.cost)), wrong: made.operands.filter((v, i) => v !== wanted[i]).length };
}

const minus = (v) => String(v).replace("-", "−");
const hex = (word) => word.toString(16).padStart(8, "0");
const COLOURS = ["c-blue", "c-orange"];

/** 32 boxes, the top bit on the left, nibble by nibble in two colours; one nibble framed. */
function drawWord(root, width, top, word, place) {
  const box = (width - 16) / 32;
  for (let bit = 31; bit >= 0; bit -= 1) {
    const nibble = bit >> 2, left = 8 + box * (31 - bit);
    root.append(svg("rect", { class: COLOURS[nibble % 2], "fill-opacity": nibble === place ? 0.6 : 0.22, x: left, y: top, width: box - 0.7, height: 18 }));
    const text = svg("text", { class: (word >>> bit) & 1 ? "strong" : "muted", x: left + box / 2, y: top + 13, "text-anchor": "middle" }, (word >>> bit) & 1);
    if (width < 420) text.setAttribute("font-size", "9");
    root.append(text);
  }
}

const tall = (s) => (s.word === null ? 22 : 50); // a step without bits of its own is a line of numbers

function drawSteps(root, width, r, place) {
  root.append(svg("text", { class: "strong", x: 8, y: 14 }, `the word, ${hex(r.word)}`));
  drawWord(root, width, 20, r.word, place);
  let top = 52;
  for (const s of r.steps) {
    root.append(svg("text", { x: 8, y: top + 12 }, s.text));
    if (s.values.length) root.append(svg("text", { class: "strong", x: width - 8, y: top + 12, "text-anchor": "end" }, s.values.map(minus).reverse().join("  ")));
    if (s.word !== null) drawWord(root, width, top + 18, s.word, -1);
    top += tall(s);
  }
}

const NAMES = { magic: "W4A16, magic number", upper: "QQQ, upper nibble", add: "QServe, multiply and add bytes", flip: "multiply-add and flip" };

function describe({ trick, scale, zero }, r) {
  const two = trick === "add" || trick === "flip";
  const how = two ? ` with scale ${scale} and zero point ${zero}` : "";
  const verdict = r.wrong ? `${r.wrong} of 8 are wrong: ${scale} · 15 or the result does not fit a byte` : two ? "all are (q − z) · s" : trick === "upper" ? "all are 16 times the code" : "all are the codes";
  return `${NAMES[trick]}${how}: the operands are ${r.operands.map(minus).join(", ")}; ${verdict}. ${r.instructions} instructions for 8 weights, ${fmt(r.instructions / 8, 3)} each.`;
}

export default {
  render({ model, el }) {
    const items = {
      trick: choice({ label: "unpacking", options: Object.entries(NAMES) }),
      place: slider({ label: "nibble", min: 0, max: 7 }),
      code: slider({ label: "its bits", min: 0, max: 15, format: (c) => c.toString(2).padStart(4, "0") }),
      scale: slider({ label: "group scale", min: 1, max: 20 }),
      zero: slider({ label: "zero point", min: 0, max: 15 }),
    };
    const codes = model.get("codes");
    const inputs = () => ({ codes, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const steps = picture({
      label: "The bits of the packed word and of every intermediate result, with the numbers they stand for",
      height: () => 56 + sum(result.steps.map(tall)),
      draw: (root, width) => drawSteps(root, width, result, inputs().place),
    });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), steps.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      steps.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
