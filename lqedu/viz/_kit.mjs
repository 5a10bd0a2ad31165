// What explorers share. The host puts this file in front of every explorer, so that all names here are in scope there.

// --- nodes ---------------------------------------------------------------------------------------------------------

function build(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** An HTML element: h("p", { class: "muted" }, "text"). */
export const h = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);

/** An SVG element. */
export const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// --- controls: native inputs inside their labels, so that no ids are needed ------------------------------------------

function control(label, input, read, write, extra = []) {
  const self = {
    node: h("label", { class: `control control-${input.type}` }, h("span", {}, label), input, ...extra),
    onInput: null,
    get value() { return read(); },
    set(value) { write(value); },
  };
  input.addEventListener("input", () => { self.set(read()); self.onInput?.(read()); });
  return self;
}

/** A slider with its value written beside it. */
export function slider({ label, min, max, step = 1, value = min, format = String, onInput = null }) {
  const input = h("input", { type: "range", min, max, step });
  const shown = h("output");
  const write = (x) => {
    input.value = x;
    shown.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", shown.textContent);
  };
  write(value);
  return Object.assign(control(label, input, () => Number(input.value), write, [shown]), { onInput });
}

/** A choice among [value, text] pairs; values keep their type. */
export function choice({ label, options, value = options[0][0], onInput = null }) {
  const input = h("select", {}, options.map(([, text]) => h("option", {}, text)));
  const write = (x) => { input.selectedIndex = options.findIndex(([known]) => known === x); };
  write(value);
  return Object.assign(control(label, input, () => options[input.selectedIndex]?.[0], write), { onInput });
}

/** A check box. */
export function toggle({ label, value = false, onInput = null }) {
  const input = h("input", { type: "checkbox" });
  const write = (x) => { input.checked = x; };
  write(value);
  return Object.assign(control(label, input, () => input.checked, write), { onInput });
}

/** A row of controls that wraps. */
export const controls = (...items) => h("div", { class: "controls" }, items.map((item) => item.node ?? item));

/** Tie controls to the model: connect(model, { bits: slider(…) }, draw) draws once, and again after every change. */
export function connect(model, items, draw) {
  for (const [key, item] of Object.entries(items)) {
    if (model.get(key) === undefined) throw new Error(`the explorer's data lack "${key}"`);
    item.set(model.get(key));
    item.onInput = (value) => { model.set(key, value); model.save_changes(); };
    model.on(`change:${key}`, () => { item.set(model.get(key)); draw(); });
  }
  draw();
}

/** Text that says what the picture shows, read out by screen readers when it changes. */
export function liveRegion() {
  const node = h("p", { class: "live", "aria-live": "polite", role: "status" });
  return { node, say(text) { if (node.textContent !== text) node.textContent = text; } };
}

/** A legend: legend([["blue", "weights"], …]); colours are those of the c- classes. */
export const legend = (items) =>
  h("ul", { class: "legend" }, items.map(([colour, text]) =>
    h("li", {}, svg("svg", { width: 12, height: 12, "aria-hidden": "true" }, svg("rect", { width: 12, height: 12, class: `c-${colour}` })), text)));

// --- pictures --------------------------------------------------------------------------------------------------------

/** An svg as wide as its container, redrawn in CSS pixels so that text keeps its size: draw(root, width, height). */
export function picture({ label, height, draw }) {
  const root = svg("g");
  const image = svg("svg", { role: "img", "aria-label": label }, root);
  const node = h("div", { class: "picture" }, image);
  let width = 0;
  const redraw = () => {
    if (!width) return;
    const tall = typeof height === "function" ? height(width) : height;
    image.setAttribute("viewBox", `0 0 ${width} ${tall}`);
    image.setAttribute("height", tall);
    root.replaceChildren();
    draw(root, width, tall);
  };
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now && now !== width) { width = now; redraw(); }
  }).observe(node);
  return { node, redraw };
}

/** A linear scale from a domain to a range of pixels. */
export function linear([d0, d1], [r0, r1]) {
  const slope = (r1 - r0) / (d1 - d0 || 1);
  return Object.assign((x) => r0 + (x - d0) * slope, { invert: (y) => d0 + (y - r0) / slope, domain: [d0, d1], range: [r0, r1] });
}

/** About n round numbers between lo and hi. */
export function ticks(lo, hi, n = 5) {
  if (!(hi > lo)) return [lo];
  const raw = (hi - lo) / n;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.ceil(lo / step), last = Math.floor(hi / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** A horizontal axis under y, for a scale. */
export function axis(root, scale, { y, ticks: n = 5, format = (x) => fmt(x), label = null }) {
  const [left, right] = scale.range;
  root.append(svg("line", { class: "rule", x1: left, x2: right, y1: y, y2: y }));
  for (const x of ticks(...scale.domain, n)) {
    root.append(
      svg("line", { class: "rule", x1: scale(x), x2: scale(x), y1: y, y2: y + 4 }),
      svg("text", { class: "muted", x: scale(x), y: y + 17, "text-anchor": "middle" }, format(x)));
  }
  if (label) root.append(svg("text", { x: (left + right) / 2, y: y + 34, "text-anchor": "middle" }, label));
}

/** Whether the reader asked for less motion: then nothing may move by itself. */
export const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// --- numbers ---------------------------------------------------------------------------------------------------------

export const sum = (values) => values.reduce((total, x) => total + x, 0);
export const mean = (values) => sum(values) / values.length;
export const max = (values) => values.reduce((best, x) => (x > best ? x : best), -Infinity);
export const extent = (values) => [-max(values.map((x) => -x)), max(values)];
export const clamp = (x, lo, hi) => Math.min(Math.max(x, lo), hi);

/** How many values fall into each of n equal bins of [lo, hi]. */
export function bins(values, lo, hi, n) {
  const counts = new Array(n).fill(0);
  for (const x of values) counts[clamp(Math.floor(((x - lo) / (hi - lo || 1)) * n), 0, n - 1)] += 1;
  return counts;
}

/** A number for people: three significant digits, a power of ten only for the very large and very small. */
export function fmt(x, digits = 3) {
  if (x === 0 || !Number.isFinite(x)) return String(x === 0 ? 0 : x);
  const far = Math.abs(x) >= 1e6 || Math.abs(x) < 1e-4;
  return far ? x.toExponential(digits - 1).replace("e+", "e") : String(Number(x.toPrecision(digits)));
}

/** The nearest float32. A float32 sum, difference, product or quotient is f32 of the one in doubles, exactly. */
export const f32 = Math.fround;

/** The nearest integer, ties to the even one, as torch.round. */
export function roundEven(x) {
  const r = Math.round(x);
  return Math.abs(x % 1) === 0.5 && r % 2 !== 0 ? r - 1 : r;
}

/** The nearest float16, ties to even. */
export function f16(x) {
  const a = Math.abs(x);
  if (!(a > 0) || a === Infinity) return x;
  let exponent = Math.floor(Math.log2(a));
  if (2 ** exponent > a) exponent -= 1; // log2 rounds, too
  else if (2 ** (exponent + 1) <= a) exponent += 1;
  const step = 2 ** (Math.max(exponent, -14) - 10); // below 2**-14, float16 is subnormal and its step stays
  const r = roundEven(a / step) * step;
  return Math.sign(x) * (r > 65504 ? Infinity : r);
}
