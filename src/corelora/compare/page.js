// Charts are drawn when they come into view, in the colours of the reader's mode; a click on a column sorts its table.

const specs = JSON.parse(document.getElementById("charts").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function config() {
  const small = window.innerWidth < 600;
  return {
    background: "transparent",
    autosize: { type: "fit-x", contains: "padding" }, // a long legend below must not press a chart flat
    legend: { orient: small ? "bottom" : "right", columns: small ? 2 : 1, labelLimit: small ? 150 : 260 },
    axis: { labelLimit: small ? 110 : 260, gridColor: "#8883" },
  };
}

function draw(element) {
  const spec = structuredClone(specs[element.dataset.chart]);
  spec.config = { ...spec.config, ...config() };
  const actions = { source: false, compiled: false, editor: false, export: true };
  vegaEmbed(element, spec, { actions, theme: dark.matches ? "dark" : undefined });
}

const coming = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      coming.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "400px" },
);
for (const element of document.querySelectorAll(".chart")) coming.observe(element);
dark.addEventListener("change", () => {
  for (const element of document.querySelectorAll(".chart.vega-embed")) draw(element);
});

// The number that a cell begins with; "1.20M" is more than "76,546".
function number(text) {
  const found = /^[-+]?[0-9][0-9.,]*(e[-+]?[0-9]+)?(M?)/.exec(text);
  return found ? parseFloat(found[0].replace(/,/g, "")) * (found[2] ? 1e6 : 1) : NaN;
}

function sortBy(head) {
  const down = head.dataset.down !== "1";
  head.dataset.down = down ? "1" : "";
  const text = (row) => row.cells[head.cellIndex].textContent;
  const order = (a, b) => {
    if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1); // empty cells stay last
    const difference = number(a) - number(b);
    return (down ? 1 : -1) * (isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
  };
  const body = head.closest("table").tBodies[0];
  body.append(...[...body.rows].sort((a, b) => order(text(a), text(b))));
}
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => sortBy(head));
