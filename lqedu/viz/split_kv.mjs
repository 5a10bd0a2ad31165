// Chapter 20: how a decoding step's attention is cut into programs, and what idle processors and partial results cost.
// data: processors, resident (programs a processor runs at once), bandwidth (bytes/s), heads, kv_heads, size (of a head),
// records (name -> bytes of a token of a head), cache (a name), batch and reach (log2 of the sequences and of their tokens),
// splits (log2 of the parts of a sequence)

/** Programs, their rounds, the share of places that work, bytes read and the bytes of partial results. */
export function compute({ processors, resident, bandwidth, heads, kv_heads, size, records, cache, batch, reach, splits }) {
  const sequences = 2 ** batch, tokens = 2 ** reach, parts = Math.min(2 ** splits, tokens / 64);
  const programs = sequences * kv_heads * parts, places = processors * resident;
  const rounds = Math.ceil(programs / places), busy = programs / (rounds * places);
  const read = sequences * kv_heads * tokens * 2 * records[cache];
  const partial = parts > 1 ? 2 * 4 * sequences * heads * parts * (size + 2) : 0; // written and read again, float32
  const loads = Array.from({ length: processors }, (_, i) => Math.floor(programs / processors) + (i < programs % processors ? 1 : 0));
  const even = programs / processors / Math.max(...loads);
  const flight = Math.min(1, programs / places); // less than a full set of programs has less than enough bytes in flight
  const share = even * flight ** 0.5; // half the programs do better than half the bandwidth: measured ones lie near the root
  return { parts, programs, rounds, busy, read, partial, loads, even, share, floor: read / bandwidth, time: (read / share + partial) / bandwidth };
}

const size_ = (b) => (b < 1e6 ? `${fmt(b / 1e3)} kB` : b < 1e9 ? `${fmt(b / 1e6)} MB` : `${fmt(b / 1e9)} GB`);
const micro = (t) => `${fmt(t * 1e6, 3)} µs`;

/** One bar a processor: how many programs it gets. */
function drawLoads(root, width, r) {
  const y = linear([0, max(r.loads) || 1], [96, 22]), wide = (width - 16) / r.loads.length;
  root.append(svg("text", { class: "strong", x: 8, y: 13 }, "programs of each processor"));
  r.loads.forEach((n, i) => root.append(svg("rect", { class: n ? "c-blue" : "c-grey", x: 8 + wide * i, width: Math.max(wide - 0.5, 0.5), y: y(n), height: Math.max(96 - y(n), n ? 1 : 0) })));
  root.append(svg("line", { class: "rule", x1: 8, x2: width - 8, y1: 96, y2: 96 }));
}

function drawTimes(root, width, r) {
  const x = linear([0, Math.max(r.time, r.floor)], [8, width - 8]);
  [["bytes of the cache at full bandwidth", r.floor, "c-green"], ["estimated with idle places and partial results", r.time, "c-orange"]].forEach(([text, t, colour], i) => {
    root.append(svg("text", { class: "strong", x: 8, y: 14 + 42 * i }, `${text}: ${micro(t)}`));
    root.append(svg("rect", { class: colour, x: 8, y: 20 + 42 * i, width: Math.max(x(t) - 8, 1), height: 14 }));
  });
}

function describe({ cache, batch, reach }, r) {
  return (
    `${2 ** batch} sequences of ${2 ** reach} tokens, ${cache}: ${r.programs} programs in ${r.rounds} ${r.rounds > 1 ? "rounds" : "round"}, ${fmt(100 * r.even, 3)} % ` +
    `of the busiest processor's work on average. ${size_(r.read)} of cache take ${micro(r.floor)}; ` +
    `${r.partial ? `partial results are ${size_(r.partial)} more` : "nothing has to be put together"}. Estimate ${micro(r.time)}.`
  );
}

export default {
  render({ model, el }) {
    const items = {
      cache: choice({ label: "cache", options: Object.keys(model.get("records")).map((name) => [name, name]) }),
      batch: slider({ label: "sequences", min: 0, max: 7, format: (e) => String(2 ** e) }),
      reach: slider({ label: "tokens of each", min: 8, max: 16, format: (e) => String(2 ** e) }),
      splits: slider({ label: "parts of a sequence", min: 0, max: 7, format: (e) => String(2 ** e) }),
    };
    const fixed = Object.fromEntries(["processors", "resident", "bandwidth", "heads", "kv_heads", "size", "records"].map((key) => [key, model.get(key)]));
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const loads = picture({ label: "Bars: programs of each processor", height: 104, draw: (root, width) => drawLoads(root, width, result) });
    const times = picture({ label: "Bars: time of the bytes, and estimated time", height: 84, draw: (root, width) => drawTimes(root, width, result) });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), loads.node, times.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      loads.redraw();
      times.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
