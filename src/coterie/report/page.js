"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const layer = document.getElementById("layer");
const coarse = matchMedia("(pointer: coarse)").matches;
const PAPER = 680; // pixels of a printed page between its margins
const NARROW = 400; // figures below this width have shorter names, and their scales above them
const plots = new Map();

async function unpack(element) {
  const bytes = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  element.remove();
  document.head.append(script);
}

function axis(given, narrow) {
  const shown = { zeroline: false, fixedrange: coarse, ...given };
  if (narrow && shown.ticktext) shown.ticktext = shown.ticktext.map((name) => (name.length > 12 ? "…" + name.slice(-11) : name));
  return shown;
}

// plotly puts a legend below the plot only as far as it is told to: as many rows as its names need.
function legend(figure, width) {
  if (!figure.layout.legend) return { showlegend: false, space: 0 };
  const longest = Math.max(...figure.data.map((trace) => trace.name.length));
  const columns = Math.max(1, Math.floor((width - 40) / (7 * longest + 46)));
  const space = 19 * Math.ceil(figure.data.length / columns) + 10;
  const place = { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, traceorder: "normal", itemclick: "toggle" };
  return { showlegend: true, legend: place, space };
}

function narrowed(trace) {
  if (trace.type !== "heatmap") return trace;
  const { title, ...bar } = trace.colorbar;
  const above = { orientation: "h", x: 0.5, y: 1, yanchor: "bottom", thickness: 8, ypad: 4, nticks: 4 };
  return { ...trace, colorbar: { ...bar, ...above, title: { ...title, side: "top" } } };
}

function layout(figure, width) {
  const narrow = width < NARROW;
  const { space, ...named } = legend(figure, width);
  const title = figure.layout.xaxis?.title ? 44 : 30;
  return {
    font: { family: getComputedStyle(document.body).fontFamily, size: 11.5 },
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", height: figure.height,
    margin: { l: 46, r: 10, t: 12, b: title + space }, dragmode: coarse ? false : "zoom",
    hoverlabel: { bgcolor: "#1d2733", bordercolor: "#1d2733", font: { color: "#fff" }, namelength: -1 },
    ...figure.layout, ...named,
    xaxis: axis(figure.layout.xaxis, narrow), yaxis: axis(figure.layout.yaxis, narrow),
  };
}

async function draw() {
  const config = { displayModeBar: false, responsive: true };
  for (const figure of report.figures) {
    const div = document.querySelector(`.plot[data-key="${figure.key}"]`);
    const width = div.clientWidth;
    const data = width < NARROW ? figure.data.map(narrowed) : figure.data;
    await Plotly.newPlot(div, data, layout(figure, width), config);
    plots.set(figure.key, div);
    div.on("plotly_click", (event) => {
      const path = [event.points[0].text, event.points[0].y].find((value) => report.paths.includes(value));
      if (path) choose(report.views.findLastIndex((view) => view.length === 1 && report.paths[view[0]] === path));
    });
    const chooser = div.closest("figure").querySelector(".chooser");
    chooser?.addEventListener("change", () => show(figure, Number(chooser.value)));
  }
}

function show(figure, view) {
  return Plotly.restyle(plots.get(figure.key), structuredClone(figure.views[view]));
}

function choose(view) {
  layer.value = view;
  for (const span of document.querySelectorAll(".shown")) span.textContent = layer.selectedOptions[0].textContent;
  for (const figure of report.figures) if (figure.chooser === "layer") show(figure, view);
  colour();
}

// Texts. A token's gates in a layer: an expert's index, or [expert, hundredths, ...], or null.
function share(token, layers) {
  const total = new Array(report.experts.length).fill(0);
  let seen = 0;
  for (const at of layers) {
    const gates = token.gates[at];
    if (gates === null) continue;
    seen += 1;
    if (typeof gates === "number") total[gates] += 1;
    else for (let i = 0; i < gates.length; i += 2) total[gates[i]] += gates[i + 1] / 100;
  }
  return total.map((value) => (seen ? value / seen : 0));
}

const largest = (values) => values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
const first = (gates) => (typeof gates === "number" ? gates : gates[0]);

function tokens() {
  const found = [];
  for (const text of document.querySelectorAll("#texts .text")) {
    const { tokens } = report.texts[text.dataset.text];
    text.querySelectorAll(".token").forEach((span, i) => found.push([span, tokens[i]]));
  }
  return found;
}

function colour() {
  const layers = report.views[layer.value];
  for (const [span, token] of tokens()) {
    const shares = share(token, layers), top = largest(shares), seen = shares[top] > 0;
    span.style.setProperty("--c", seen ? report.colours[top] : "transparent");
    span.dataset.expert = seen ? report.experts[top] : "";
  }
}

function element(tag, content, colour) {
  const made = document.createElement(tag);
  if (colour) made.style.setProperty("--c", colour);
  made.append(...[content].flat().filter((each) => each !== undefined));
  return made;
}

function tell(span, token) {
  const tip = document.getElementById("tip"), chosen = report.views[layer.value];
  const shares = share(token, chosen);
  const ranked = shares.map((value, i) => [value, i]).filter(([value]) => value > 0).sort((a, b) => b[0] - a[0]);
  const rows = ranked.slice(0, 5).map(([value, i]) => {
    const bar = element("i", [], report.colours[i]);
    bar.style.width = `${100 * value}%`;
    const row = element("div", [element("span", report.experts[i]), bar, element("span", `${Math.round(100 * value)}%`)]);
    row.className = "row";
    return row;
  });
  const strips = report.kinds.slice(0, 16).map(({ label, members }) => {
    const cells = element("div", members.map((at) => {
      const gates = token.gates[at];
      const cell = element("i", [], gates === null ? "transparent" : report.colours[first(gates)]);
      if (gates !== null && typeof gates !== "number") cell.style.opacity = 0.3 + 0.7 * (gates[1] / 100);
      if (chosen.length === 1 && chosen[0] === at) cell.className = "here";
      return cell;
    }));
    cells.className = "cells";
    const strip = element("div", [element("span", label.length > 15 ? "…" + label.slice(-14) : label), cells]);
    strip.className = "strip";
    return strip;
  });
  const depth = element("div", "which expert answers, by kind, shallow to deep");
  depth.className = "note";
  tip.replaceChildren(element("b", token.piece), ...rows, depth, ...strips);
  tip.hidden = false;
  const at = span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - size.width - 8))}px`;
  const below = at.bottom + 8;
  tip.style.top = `${below + size.height < innerHeight ? below : Math.max(8, at.top - size.height - 8)}px`;
}

for (const [span, token] of tokens()) {
  span.removeAttribute("title"); // it serves where no script runs
  for (const event of ["pointerenter", "focus", "click"]) span.addEventListener(event, () => tell(span, token));
  for (const event of ["pointerleave", "blur"]) span.addEventListener(event, () => (document.getElementById("tip").hidden = true));
}
layer.addEventListener("change", () => choose(Number(layer.value)));
colour();

function resize(figure, size) {
  const div = plots.get(figure.key);
  div.style.height = `${size.height}px`;
  return Plotly.relayout(div, size);
}

addEventListener("beforeprint", () => {
  for (const figure of report.figures) resize(figure, { width: PAPER, height: Math.min(figure.height, 360) });
});
addEventListener("afterprint", () => {
  for (const figure of report.figures) resize(figure, { width: null, autosize: true, height: figure.height });
});

unpack(document.getElementById("plotly")).then(draw).then(
  () => (document.documentElement.dataset.drawn = report.figures.length),
  (error) => {
    for (const div of document.querySelectorAll(".plot")) {
      div.style.height = "auto";
      if (!div.classList.contains("js-plotly-plot")) div.textContent = "This browser cannot draw the figure: " + error.message;
    }
    throw error;
  },
);
