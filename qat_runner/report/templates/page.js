// Safe for colour-blind readers: Okabe and Ito's colours, darker on white and lighter on black.
const THEMES = {
  light: {ink: "#1b2230", soft: "#5d6778", grid: "#e4e8ee", back: "#ffffff",
    colours: ["#0072b2", "#d55e00", "#009e73", "#b8568f", "#a67c00", "#3d9bd1", "#7a5cc0", "#5d6778"]},
  dark: {ink: "#e3e8ef", soft: "#98a3b5", grid: "#2a313d", back: "#191f28",
    colours: ["#4ea8e6", "#f0894a", "#35c49a", "#e29cc6", "#e6b84a", "#9ad4f7", "#b7a4ee", "#98a3b5"]},
};

const byId = id => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const hovers = matchMedia("(hover: hover)").matches;  // a mouse, not a finger
let printing = false;

// Decode what `packed` of page.py encoded.
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const plotly = document.createElement("script");
plotly.textContent = await unpacked("plotly");
document.head.append(plotly);
const charts = JSON.parse(await unpacked("charts"));

const theme = () => THEMES[dark.matches && !printing ? "dark" : "light"];

// Replace colour indices by colours.
function painted(thing, colours) {
  if (thing.colour === undefined) return thing;
  const {colour, ...rest} = thing, color = colours[colour];
  const tinted = {...rest, line: {color, ...rest.line}};
  if (rest.type === "line") return tinted;  // a shape
  tinted.marker = {color, ...rest.marker};
  for (const bars of ["error_x", "error_y"]) if (rest[bars]) tinted[bars] = {color, ...rest[bars]};
  return tinted;
}

function axis(own, {grid, soft}) {
  const common = {gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true, fixedrange: !hovers};
  const title = {font: {color: soft, size: 12}, standoff: 8, ...own.title};
  return {...common, ...own, title, tickfont: {color: soft, size: 11, ...own.tickfont}};
}

function layoutOf(chart, view) {
  const colours = theme(), own = {...chart.layout, ...view.layout};
  const yaxis = {...chart.layout.yaxis, ...view.layout.yaxis};
  if (chart.logarithmic && byId(chart.logarithmic).checked) Object.assign(yaxis, {type: "log", dtick: 1});
  return {
    autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 40, r: 10, t: 8, b: 36},
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.ink},
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: {color: colours.soft}},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colours.soft, activecolor: colours.ink},
    hoverlabel: {bgcolor: colours.back, bordercolor: colours.grid, font: {color: colours.ink}, namelength: -1},
    ...own,
    dragmode: hovers ? "zoom" : false,  // a finger scrolls the page
    shapes: (own.shapes || []).map(shape => painted(shape, colours.colours)),
    xaxis: axis({...chart.layout.xaxis, ...view.layout.xaxis}, colours),
    yaxis: axis(yaxis, colours),
  };
}

function chosen(chart) {
  const selects = chart.selects.map(byId);
  return chart.views[selects.reduce((index, select) => index * select.options.length + select.selectedIndex, 0)];
}

// Split a name into lines that fit on a phone.
function folded(name = "") {
  const lines = [""];
  for (const part of name.split(/(?<=, )/))
    if (lines.at(-1) && lines.at(-1).length + part.length > 40) lines.push(part);
    else lines[lines.length - 1] += part;
  return lines;
}

function draw(chart) {
  const view = chosen(chart), place = byId(chart.id), narrow = place.clientWidth < 480;
  const named = view.traces.filter(trace => trace.showlegend !== false);
  const legend = named.reduce((lines, trace) => lines + folded(trace.name).length, 0);
  const room = narrow ? 16 * Math.max(legend - 3, 0) : 0;  // a long legend is a single column there
  const height = (view.height || chart.height) + room;
  const layout = {...layoutOf(chart, view), height};
  place.style.height = `${height}px`;
  const traces = view.traces.map(trace => painted(trace, theme().colours));
  if (narrow) for (const trace of traces) trace.name = folded(trace.name).join("<br>");
  const options = {responsive: true, displaylogo: false, displayModeBar: hovers ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
  return Plotly.react(place, traces, layout, options);
}

const drawAll = () => Promise.all(charts.map(draw));
for (const chart of charts) for (const id of [...chart.selects, chart.logarithmic].filter(Boolean))
  byId(id).addEventListener("change", () => draw(chart));
dark.addEventListener("change", drawAll);
function print(on) {  // lay out the page for paper before its charts are drawn
  printing = on;
  document.documentElement.classList.toggle("printing", on);
  drawAll();
}
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));
drawAll().then(() => { document.body.dataset.drawn = charts.length; });

// Click a header to sort a table by its column; empty cells come last in both directions.
function compare(a, b) {
  if ((a === "") !== (b === "")) return a === "" ? Infinity : -Infinity;
  return isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
}

function sortBy(head) {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const order = (a, b) => { const d = compare(key(a), key(b)); return isFinite(d) ? d * direction : Math.sign(d); };
  body.append(...[...body.rows].sort(order));
}
for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => sortBy(button.parentElement));

for (const box of document.querySelectorAll("[data-toggle]"))
  box.addEventListener("change", () => byId(box.dataset.toggle).classList.toggle("only-changed", box.checked));

async function copy(button) {
  const range = document.createRange();
  range.selectNodeContents(byId(button.dataset.copy));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  try { await navigator.clipboard.writeText(getSelection().toString()); } catch { document.execCommand("copy"); }
  button.textContent = "Copied";
}
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
