(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();
  const logSteps = document.getElementById("log-steps");
  const measure = document.getElementById("measure");

  function theme() {
    const text = dark.matches ? "#c9ced6" : "#3a3f47";
    const grid = dark.matches ? "#3a414b" : "#d9dce1";
    return {
      axis: { labelColor: text, titleColor: text, gridColor: grid },
      legend: { labelColor: text, titleColor: text },
      title: { color: text },
      text: { color: text },
    };
  }

  function applySettings(spec, view) {
    const has = (name) => (spec.params || []).some((param) => param.name === name);
    if (has("log_steps")) view.signal("log_steps", logSteps.checked);
    if (measure && has("measure")) view.signal("measure", measure.value);
    return view.runAsync();
  }

  function draw(place) {
    const spec = Object.assign({ config: data.config }, data.charts[place.dataset.chart]);
    const actions = { export: true, source: false, compiled: false, editor: false };
    return window
      .vegaEmbed(place, spec, { renderer: "svg", actions: actions, config: theme() })
      .then((result) => {
        views.set(place, { spec: spec, view: result.view });
        place.style.minHeight = "";
        return applySettings(spec, result.view);
      })
      .catch((error) => { place.textContent = "This chart could not be drawn: " + error.message; });
  }

  function applyAll() {
    views.forEach((entry) => applySettings(entry.spec, entry.view));
  }

  // One chart after the other, top to bottom: the first ones are there at once, and printing finds them all.
  const places = Array.from(document.querySelectorAll("[data-chart]"));
  places.forEach((place) => {
    const height = data.charts[place.dataset.chart].height;
    place.style.minHeight = (typeof height === "number" ? height + 60 : 200) + "px";
  });
  places.reduce((earlier, place) => earlier.then(() => draw(place)), Promise.resolve());
  logSteps.addEventListener("change", applyAll);
  if (measure) measure.addEventListener("change", applyAll);
  dark.addEventListener("change", () => Array.from(views.keys()).forEach(draw));

  // The probe explorer. Probe texts are untrusted: they only ever become text nodes.
  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function options(select, labels) {
    select.replaceChildren(...labels.map((label, index) => {
      const option = make("option", "", label);
      option.value = String(index);
      return option;
    }));
  }

  function ends(response) {
    return [response.path[0], response.path[response.path.length - 1]].map((value) => (value === null ? NaN : value));
  }

  function change(probe, type) {
    const response = probe.responses.find((one) => one.type === type);
    if (!response) return NaN;
    const [start, end] = ends(response);
    return end - start;
  }

  function signed(value) {
    return (value > 0 ? "+" : "") + plain(value);
  }

  function plain(value) {
    if (!Number.isFinite(value)) return "not finite";
    return (Math.abs(value) < 1e6 ? value.toFixed(2) : value.toExponential(2)).replace(/-/g, "−");
  }

  // Runs of known values, each a line of its own.
  function pieces(path) {
    const found = [[]];
    path.forEach((value, index) => (value === null ? found.push([]) : found[found.length - 1].push([index, value])));
    return found.filter((piece) => piece.length);
  }

  function spark(path, color) {
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    const lines = pieces(path), points = lines.flat();
    const values = points.map((point) => point[1]);
    const low = Math.min(...values), span = Math.max(Math.max(...values) - low, 0.1);
    const x = (index) => 3 + (114 * index) / Math.max(path.length - 1, 1);
    const y = (value) => 39 - (36 * (value - low)) / span;
    svg.setAttribute("viewBox", "0 0 120 42");
    lines.forEach((piece) => {
      const line = document.createElementNS(ns, "polyline");
      line.setAttribute("points", piece.map((p) => x(p[0]).toFixed(1) + "," + y(p[1]).toFixed(1)).join(" "));
      line.setAttribute("fill", "none");
      line.setAttribute("stroke", color);
      line.setAttribute("stroke-width", "1.8");
      svg.append(line);
    });
    points.slice(-1).forEach((p) => {
      const dot = document.createElementNS(ns, "circle");
      dot.setAttribute("cx", x(p[0]));
      dot.setAttribute("cy", y(p[1]));
      dot.setAttribute("r", "2.6");
      dot.setAttribute("fill", color);
      svg.append(dot);
    });
    return svg;
  }

  function responseRow(response, steps) {
    const row = make("div", "response");
    const name = make("div", "name");
    const swatch = make("i");
    swatch.style.background = data.explorer.colors[response.type];
    const length = response.tokens + " tokens" + (response.cut ? ", cut" : "");
    name.append(swatch, document.createTextNode(response.type + " · " + length));
    const text = make("div", "text", response.text);
    text.title = "click to unfold";
    text.addEventListener("click", () => text.classList.toggle("open"));
    const [start, end] = ends(response);
    const numbers = make("div", "numbers");
    if (steps.length > 1) {
      numbers.append(document.createTextNode(plain(start) + " → " + plain(end) + "  "));
      if (Number.isFinite(end - start)) numbers.append(make("b", end > start ? "up" : end < start ? "down" : "", signed(end - start)));
    } else {
      numbers.textContent = plain(end);
    }
    row.append(name, text, steps.length > 1 ? spark(response.path, data.explorer.colors[response.type]) : make("span"), numbers);
    return row;
  }

  function answerRow(answer) {
    const row = make("div", "response answer");
    const parts = ["greedy answer at step " + answer.step, answer.tokens + " tokens, " + (answer.ended ? "ended by itself" : "cut")];
    if (answer.logp !== null) parts.push(plain(answer.logp) + " nats per token");
    else if (answer.tokens) parts.push("log-probability not finite");
    parts.push("longest repeat " + answer.repeat);
    const text = make("div", "text", answer.text);
    text.title = "click to unfold";
    text.addEventListener("click", () => text.classList.toggle("open"));
    row.append(make("div", "name", parts.join(" · ")), text);
    return row;
  }

  function startExplorer(root) {
    const bar = make("div", "bar");
    const series = make("select"), sort = make("select"), which = make("select", "which");
    const search = make("input");
    search.type = "search";
    search.placeholder = "search prompts and ids";
    const back = make("button", "", "←"), forth = make("button", "", "→");
    back.title = "previous probe";
    forth.title = "next probe";
    const note = make("p", "hint");
    const body = make("div", "probe");
    const orders = [
      ["in the order of the set", null],
      ["chosen fell most first", (p) => change(p, "chosen")],
      ["chosen rose most first", (p) => -change(p, "chosen")],
      ["rejected fell most first", (p) => change(p, "rejected")],
      ["margin shrank most first", (p) => change(p, "chosen") - change(p, "rejected")],
    ];
    if (data.explorer.series.some((one) => one.probes.some((p) => p.answers.length))) {
      orders.push(["with greedy answers first", (p) => (p.answers.length ? 0 : 1)]);
    }
    let shown = [];
    options(series, data.explorer.series.map((one) => one.label));
    options(sort, orders.map((order) => order[0]));
    if (data.explorer.series.length > 1) bar.append(series);
    bar.append(sort, search, which, back, forth);
    root.replaceChildren(bar, note, body);

    function current() { return data.explorer.series[Number(series.value)]; }

    function preview(probe) {
      const last = probe.prompt[probe.prompt.length - 1].text.replace(/\s+/g, " ").trim();
      return probe.id + " · " + (last.length > 90 ? last.slice(0, 90) + "…" : last);
    }

    function list() {
      const wanted = search.value.toLowerCase();
      const key = orders[Number(sort.value)][1];
      shown = current().probes.filter((p) => [p.id, ...p.prompt.map((turn) => turn.text)].some((text) => text.toLowerCase().includes(wanted)));
      if (key) {
        const rank = (probe) => { const value = key(probe); return Number.isNaN(value) ? Infinity : value; };
        shown = shown.map((probe) => [rank(probe), probe]).sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0)).map((pair) => pair[1]);
      }
      options(which, shown.map(preview));
      const one = current();
      const capped = one.probes.length < one.total ? "The first " + one.probes.length + " of " + one.total + " probes are in this file; all are in the records. " : "";
      note.textContent = capped + shown.length + " probes listed. Values are log-probabilities per token (nats)" +
        (one.steps.length > 1 ? ", step " + one.steps[0] + " to " + one.steps[one.steps.length - 1] + "; every small path " +
          (one.steps.length < one.recorded ? "draws " + one.steps.length + " of " + one.recorded + " steps and " : "") + "has its own scale." : ".");
      show();
    }

    function show() {
      const index = shown.length ? Number(which.value) : -1;
      back.disabled = index <= 0;
      forth.disabled = index < 0 || index >= shown.length - 1;
      if (index < 0) {
        body.replaceChildren(make("p", "nothing", "No prompt and no id contains this text."));
        return;
      }
      const probe = shown[index];
      const prompt = make("div", "prompt");
      probe.prompt.forEach((turn) => {
        const block = make("div", "turn");
        if (turn.role) block.append(make("b", "", turn.role));
        block.append(document.createTextNode(turn.text));
        prompt.append(block);
      });
      body.replaceChildren(
        prompt, ...probe.answers.map(answerRow), ...probe.responses.map((response) => responseRow(response, current().steps)));
    }

    function move(by) {
      which.value = String(Number(which.value) + by);
      show();
    }

    back.addEventListener("click", () => move(-1));
    forth.addEventListener("click", () => move(1));
    which.addEventListener("change", show);
    [series, sort].forEach((control) => control.addEventListener("change", list));
    search.addEventListener("input", list);
    list();
  }
  if (data.explorer.series.length) startExplorer(document.getElementById("explorer"));

  // The token strips: predicted change behind a token, measured change under it.
  function tint(value, limit) {
    const strength = Math.min(Math.abs(value) / limit, 1);
    return "rgba(" + (value >= 0 ? "67, 147, 195, " : "214, 96, 77, ") + (0.85 * strength).toFixed(3) + ")";
  }

  function exact(value) {
    if (!Number.isFinite(value)) return "not finite";
    return (value > 0 ? "+" : "") + value.toPrecision(3).replace(/-/g, "−");
  }

  function strip(answer, index, limit) {
    const row = make("div", "strip"), name = make("div", "name"), swatch = make("i"), values = answer.steps[index];
    swatch.style.background = data.explorer.colors[answer.type] || "#8c8c8c";
    name.append(swatch);
    row.append(name);
    if (values === null) {
      name.append(document.createTextNode(answer.type + " · not recorded at this step"));
      return row;
    }
    name.append(document.createTextNode(answer.type + " · predicted " + exact(values.means[0]) + ", measured " +
      exact(values.means[1]) + " nats per token" + (answer.left_out ? " · the last " + answer.left_out + " tokens are left out" : "")));
    const tokens = make("div", "tokens");
    answer.tokens.forEach((text, place) => {
      const token = make("span", "", text.replace(/\n/g, "⏎"));
      token.style.backgroundColor = tint(values.predicted[place], limit);
      token.style.borderBottomColor = tint(values.true[place], limit);
      token.title = "predicted " + exact(values.predicted[place]) + ", measured " + exact(values.true[place]) + " nats";
      tokens.append(token);
    });
    row.append(tokens);
    return row;
  }

  function startStrips(root) {
    const bar = make("div", "bar"), series = make("select"), step = make("select"), which = make("select", "which");
    const note = make("p", "hint"), body = make("div", "probe");
    options(series, data.strips.map((one) => one.label));
    if (data.strips.length > 1) bar.append(series);
    bar.append(step, which);
    root.replaceChildren(bar, note, body);

    function current() { return data.strips[Number(series.value)]; }

    function preview(probe) {
      const text = probe.prompt.replace(/\s+/g, " ").trim();
      return probe.id + (text ? " · " + (text.length > 90 ? text.slice(0, 90) + "…" : text) : "");
    }

    function list() {
      const one = current();
      options(step, one.steps.map((number) => "step " + number));
      step.value = String(one.steps.length - 1);
      options(which, one.probes.map(preview));
      show();
    }

    function show() {
      const one = current(), index = Number(step.value), probe = one.probes[Number(which.value)], limit = one.limits[index];
      note.textContent = (one.probes.length < one.total ? "The " + one.probes.length + " of " + one.total + " probes that the last recorded step moved most" :
        "All probes") + ", those moved most first; full colour from ±" + limit.toPrecision(2) + " nats on.";
      body.replaceChildren(...probe.answers.map((answer) => strip(answer, index, limit)));
    }

    series.addEventListener("change", list);
    [step, which].forEach((control) => control.addEventListener("change", show));
    list();
  }
  if (data.strips.length) startStrips(document.getElementById("strips"));
})();
