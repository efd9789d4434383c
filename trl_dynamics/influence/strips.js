// The token strips: predicted change behind a token, measured change under it.
page.register("influence", function (root, data) {
  "use strict";
  const { make, options } = page;

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
    swatch.style.background = data.colors[answer.type] || "#8c8c8c";
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
    options(series, data.series.map((one) => one.label));
    if (data.series.length > 1) bar.append(series);
    bar.append(step, which);
    root.replaceChildren(bar, note, body);

    function current() { return data.series[Number(series.value)]; }

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

  startStrips(root);
});
