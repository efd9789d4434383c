const page = (function () {
  "use strict";
  const renderers = {};
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();
  const logSteps = document.getElementById("log-steps");
  const controls = Array.from(document.querySelectorAll("select[data-param]"));

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
    controls.filter((one) => has(one.dataset.param)).forEach((one) => view.signal(one.dataset.param, one.value));
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
  controls.forEach((one) => one.addEventListener("change", applyAll));
  dark.addEventListener("change", () => Array.from(views.keys()).forEach(draw));

  // For what a section's own script draws. Texts of runs are untrusted: they only ever become text nodes.
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

  function plain(value) {
    if (!Number.isFinite(value)) return "not finite";
    return (Math.abs(value) < 1e6 ? value.toFixed(2) : value.toExponential(2)).replace(/-/g, "−");
  }

  // A script calls register(name of its section, function of the place and its data).
  function register(name, start) {
    renderers[name] = start;
  }

  function startAll() {
    document.querySelectorAll("[data-widget]").forEach((place) => {
      renderers[place.dataset.widget](place, data.widgets[place.dataset.widget]);
    });
  }

  return { make: make, options: options, plain: plain, register: register, startAll: startAll };
})();
