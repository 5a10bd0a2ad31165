// Chapter 21: a server under load, step by step: who runs, what memory holds, how long callers wait. As lqedu/evaluation/serving.py.
// data: costs (format -> rows, seconds, cached_token, prompt_pair, head_bytes, head_row, tokens: of memory), gaps (arrivals at one
// request a second), prompts, outputs (lengths), page, longest (tokens reserved where a cache lies in one piece), sequences (most in
// a step), prompt_tokens; format, batching ("continuous" or "static"), cache ("pages" or "reserved"), pace (4 log2 of requests a second)

function linearTime({ rows, seconds }, m) {
  const last = rows.length - 1;
  if (m > rows[last]) return (seconds[last] * m) / rows[last];
  const i = Math.max(1, rows.findIndex((r) => r >= m));
  const slope = (seconds[i] - seconds[i - 1]) / (rows[i] - rows[i - 1]);
  return m <= rows[0] ? seconds[0] : slope * (m - rows[i - 1]) + seconds[i - 1];
}


/** Runs the server until every request has its tokens. */
export function compute({ costs, gaps, prompts, outputs, page, longest, sequences, prompt_tokens, format, batching, cache, pace }) {
  const cost = costs[format], rate = 2 ** (pace / 4), count = gaps.length;
  const arrivals = gaps.map((g) => g / rate), paged = cache === "pages", joining = batching === "continuous";
  const most = joining ? prompt_tokens : Infinity; // a batch that nobody can join later starts as a whole
  const needed = (n) => Math.ceil(Math.max(n, paged ? 0 : longest) / page) * page;
  const done = Array(count).fill(0), first = Array(count).fill(0), steps = [], waiting = [];
  const length = (i) => prompts[i] + done[i];
  let running = [], next = 0, held = 0, now = arrivals[0], tokens = 0, repeated = 0;
  while (next < count || waiting.length || running.length) {
    if (!waiting.length && !running.length) now = Math.max(now, arrivals[next]);
    while (next < count && arrivals[next] <= now) waiting.push(next++);
    const decoding = [];
    for (const i of [...running]) {
      const more = needed(length(i) + 1) - needed(length(i));
      while (running.includes(i) && held + more > cost.tokens) {
        const last = running.pop();
        held -= needed(length(last));
        waiting.unshift(last);
      }
      if (running.includes(i)) { held += more; decoding.push(i); }
    }
    const taken = [], open = joining || !running.length;
    let prompt = 0;
    while (open && waiting.length && running.length < sequences) {
      const i = waiting[0], room = needed(length(i) + 1);
      if (held + room > cost.tokens || (taken.length && prompt + length(i) > most)) break;
      if (done[i]) repeated += 1;
      prompt += length(i);
      taken.push(waiting.shift());
      running.push(i);
      held += room;
    }
    const pairs = sum(taken.map((i) => (length(i) * (length(i) + 1)) / 2));
    const time =
      linearTime(cost, decoding.length + prompt) + sum(decoding.map(length)) * cost.cached_token + pairs * cost.prompt_pair +
      Math.max(cost.head_bytes, (decoding.length + taken.length) * cost.head_row);
    steps.push([now, time, running.length, held, waiting.length]);
    now += time;
    for (const i of [...decoding, ...taken]) {
      if (!done[i]) first[i] = now - arrivals[i];
      done[i] += 1;
      tokens += 1;
      if (done[i] === outputs[i]) {
        running = running.filter((j) => j !== i);
        held -= needed(length(i));
      }
    }
  }
  const busy = sum(steps.map((s) => s[1]));
  const batch = sum(steps.map((s) => s[1] * s[2])) / busy;
  return { steps, tokens, repeated, rate, seconds: now, speed: tokens / now, batch, wait: sum(first) / count, memory: cost.tokens };
}

const time_ = (t) => (t < 1 ? `${fmt(t * 1e3, 3)} ms` : `${fmt(t, 3)} s`);

/** Steps as an area over time: one column a pixel or two, the mean of the steps in it. */
function drawArea(root, width, r, { index, top, bottom, ceiling, colour, title }) {
  const x = linear([0, r.seconds], [8, width - 8]), y = linear([0, ceiling], [bottom, top + 8]);
  const columns = Array.from({ length: Math.floor((width - 16) / 2) }, () => [0, 0]);
  for (const step of r.steps) {
    const c = columns[Math.min(columns.length - 1, Math.floor((step[0] / r.seconds) * columns.length))];
    c[0] += step[1];
    c[1] += step[1] * step[index];
  }
  root.append(svg("text", { class: "strong", x: 8, y: top }, title));
  columns.forEach(([t, v], i) => {
    if (t) root.append(svg("rect", { class: colour, x: 8 + 2 * i, width: 2, y: y(v / t), height: bottom - y(v / t) }));
  });
  root.append(svg("line", { class: "rule", x1: 8, x2: x(r.seconds), y1: bottom, y2: bottom }));
}

function draw(root, width, height, r) {
  const most = max(r.steps.map((s) => s[2])), queue = max(r.steps.map((s) => s[4]));
  drawArea(root, width, r, { index: 2, top: 14, bottom: 84, ceiling: most, colour: "c-blue", title: `sequences in a step, at most ${most}` });
  drawArea(root, width, r, { index: 3, top: 104, bottom: 174, ceiling: r.memory, colour: "c-purple", title: `memory held, of ${fmt(r.memory)} tokens` });
  drawArea(root, width, r, { index: 4, top: 194, bottom: 264, ceiling: queue || 1, colour: "c-orange", title: `requests waiting, at most ${queue}` });
  root.append(svg("text", { class: "muted", x: width - 8, y: height - 4, "text-anchor": "end" }, `${fmt(r.seconds)} seconds`));
}

const describe = ({ format, batching, cache }, r) =>
  `${format}, ${batching} batching, cache in ${cache === "pages" ? "pages" : "one piece a sequence"}, ${fmt(r.rate)} requests a second: ` +
  `${fmt(r.speed, 4)} tokens a second, ${fmt(r.batch, 3)} sequences in a step on average, ${time_(r.wait)} to the first token; ` +
  `${r.repeated ? `${r.repeated} prompts had to be taken in again.` : "nobody was pushed out."}`;

export default {
  render({ model, el }) {
    const items = {
      format: choice({ label: "format", options: Object.keys(model.get("costs")).map((name) => [name, name]) }),
      batching: choice({ label: "batching", options: [["continuous", "step by step"], ["static", "batch by batch"]] }),
      cache: choice({ label: "cache", options: [["pages", "in pages"], ["reserved", "in one piece"]] }),
      pace: slider({ label: "requests a second", min: 0, max: 28, format: (p) => fmt(2 ** (p / 4), 3) }),
    };
    const names = ["costs", "gaps", "prompts", "outputs", "page", "longest", "sequences", "prompt_tokens"];
    const fixed = Object.fromEntries(names.map((key) => [key, model.get(key)]));
    const inputs = () => ({ ...fixed, ...Object.fromEntries(Object.keys(items).map((key) => [key, model.get(key)])) });
    let result = null;
    const areas = picture({
      label: "Areas over time: sequences in a step, memory held, requests waiting",
      height: 284,
      draw: (root, width, height) => draw(root, width, height, result),
    });
    const live = liveRegion();
    el.append(controls(...Object.values(items)), areas.node, live.node);
    connect(model, items, () => {
      result = compute(inputs());
      areas.redraw();
      live.say(describe(inputs(), result));
    });
  },
};
