// Chapter 17: the scale of a tensor whose largest magnitude jumps, from its own amax or from those of the steps before.
// data: noise (log2 of the amax of each step, without the jump), levels (log2 of each value over the amax, at most 0), format
// ("E4M3" or "E5M2"), scaling ("delayed" or "current"), reach (log2 of the history's length), margin, jump (powers of two
// that the amax changes by at step 24), lasting (the jump stays; otherwise it is one step long)

const FORMATS = { E4M3: { top: Math.log2(448), bottom: -9 }, E5M2: { top: Math.log2(57344), bottom: -16 } };
const AT = 24;

/** For each step: log2 of the amax, of the scale, and the shares of the values that saturate and that round to zero. */
export function compute({ noise, levels, format, scaling, reach, margin, jump, lasting }) {
  const { top, bottom } = FORMATS[format];
  const amax = noise.map((v, t) => v + ((lasting ? t >= AT : t === AT) ? jump : 0));
  return amax.map((now, t) => {
    const before = amax.slice(Math.max(0, t - 2 ** reach), t);
    const from = scaling === "current" ? now : before.length ? max(before) : noise[0];
    const scale = from + margin - top;
    const share = (test) => levels.filter((level) => test(now + level - scale)).length / levels.length;
    return { amax: now, scale, saturated: share((v) => v > top + 1e-9), lost: share((v) => v <= bottom - 1) };
  });
}

/** The amax between the largest value that the scale can hold and the smallest that does not round to zero. */
function drawRange(root, width, steps, format) {
  const { top, bottom } = FORMATS[format];
  const highs = steps.map((s) => s.scale + top), lows = steps.map((s) => s.scale + bottom - 1), own = steps.map((s) => s.amax);
  const low = Math.floor(-max([...lows, ...own].map((v) => -v))), high = Math.ceil(max([...highs, ...own]));
  const x = linear([0, steps.length - 1], [44, width - 12]), y = linear([low, high], [178, 12]);
  for (const v of ticks(low, high, 5)) {
    root.append(svg("line", { class: "rule", "stroke-opacity": 0.4, x1: 44, x2: width - 12, y1: y(v), y2: y(v) }));
    root.append(svg("text", { class: "muted", x: 38, y: y(v) + 4, "text-anchor": "end" }, v));
  }
  const line = (values, colour, dash) =>
    root.append(svg("path", { class: colour, fill: "none", "stroke-width": 2, "stroke-dasharray": dash,
      d: values.map((v, t) => `${t ? "L" : "M"}${x(t).toFixed(1)},${y(v).toFixed(1)}`).join("") }));
  line(highs, "s-red", "6 3");
  line(lows, "s-orange", "2 3");
  line(own, "s-blue");
  axis(root, x, { y: 184, ticks: 6, label: "step" });
}

/** Shares as bars: saturated upwards, rounded to zero downwards. */
function drawShares(root, width, steps) {
  const x = linear([0, steps.length - 1], [44, width - 12]), wide = Math.max(1, (width - 56) / steps.length - 1);
  const tall = (share) => 62 * Math.sqrt(share); // a root, so that a percent is seen beside a hundred
  root.append(svg("line", { class: "rule", x1: 44, x2: width - 12, y1: 70, y2: 70 }));
  for (const [share, text] of [[1, "100 %"], [0.1, "10 %"]])
    for (const side of [-1, 1])
      root.append(svg("text", { class: "muted", x: 38, y: 74 + side * tall(share), "text-anchor": "end" }, text));
  steps.forEach(({ saturated, lost }, t) => {
    const left = x(t) - wide / 2;
    root.append(svg("rect", { class: "c-red", x: left, width: wide, y: 70 - tall(saturated), height: tall(saturated) }));
    root.append(svg("rect", { class: "c-orange", x: left, width: wide, y: 70, height: tall(lost) }));
  });
}

const times = (j) => (j < 0 ? `÷ ${2 ** -j}` : `× ${2 ** j}`);
const percent = (v) => `${(100 * v).toFixed(1)} %`;

function describe({ format, scaling, reach, margin, jump, lasting }, steps) {
  const worst = max(steps.map((s) => s.lost)), bad = steps.filter((s) => s.saturated > 0).length;
  const long = steps.filter((s) => s.lost > 2 * steps[AT - 1].lost && s.lost > 0.01).length;
  const source = scaling === "current" ? "the tensor itself" : `the last ${2 ** reach} step${reach ? "s" : ""}`;
  return (
    `${format}, scale from ${source}, margin ${margin}; the amax ${times(jump)} at step ${AT}, ` +
    `${lasting ? "for good" : "for one step"}. ${percent(steps[AT].saturated)} of the values saturate at that step ` +
    `(${bad} steps have some). At most ${percent(worst)} of the values become zero; in ${long} steps that share is ` +
    `above one percent and more than twice what it was before.`
  );
}

export default {
  render({ model, el }) {
    const items = {
      format: choice({ label: "format", options: Object.keys(FORMATS).map((name) => [name, name]) }),
      scaling: choice({ label: "scaling", options: [["delayed", "delayed"], ["current", "current"]] }),
      reach: slider({ label: "history", min: 0, max: 6, format: (h) => `${2 ** h} step${h ? "s" : ""}` }),
      margin: slider({ label: "margin", min: 0, max: 8 }),
      jump: slider({ label: "jump", min: -12, max: 12, format: times }),
      lasting: toggle({ label: "the jump lasts" }),
    };
    const fixed = { noise: model.get("noise"), levels: model.get("levels") };
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let steps = null;
    const range = picture({
      label: "Log2 of the amax of each step, of the largest value its scale can hold, and of the smallest that survives",
      height: 226,
      draw: (root, width) => drawRange(root, width, steps, inputs().format),
    });
    const shares = picture({
      label: "Share of the values that saturate (up) and that round to zero (down), at each step",
      height: 142,
      draw: (root, width) => drawShares(root, width, steps),
    });
    const live = liveRegion();
    const names = [["blue", "log2 of the amax"], ["red", "top of the range; saturated"], ["orange", "bottom of the range; rounded to zero"]];
    el.append(controls(...Object.values(items)), legend(names), range.node, shares.node, live.node);
    connect(model, items, () => {
      steps = compute(inputs());
      range.redraw();
      shares.redraw();
      live.say(describe(inputs(), steps));
    });
  },
};
