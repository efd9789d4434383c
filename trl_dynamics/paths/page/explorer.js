// The probe explorer: texts of probes with the path of every response.
page.register("probes", function (root, data) {
  "use strict";
  const { make, options, plain } = page;

  function signed(value) {
    return (value > 0 ? "+" : "") + plain(value);
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
    swatch.style.background = data.colors[response.type];
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
    row.append(name, text, steps.length > 1 ? spark(response.path, data.colors[response.type]) : make("span"), numbers);
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
    if (data.series.some((one) => one.probes.some((p) => p.answers.length))) {
      orders.push(["with greedy answers first", (p) => (p.answers.length ? 0 : 1)]);
    }
    let shown = [];
    options(series, data.series.map((one) => one.label));
    options(sort, orders.map((order) => order[0]));
    if (data.series.length > 1) bar.append(series);
    bar.append(sort, search, which, back, forth);
    root.replaceChildren(bar, note, body);

    function current() { return data.series[Number(series.value)]; }

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

  startExplorer(root);
});
