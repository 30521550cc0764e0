// A small chart with one column for each token of the text, from left to right.

import { clear, make, svg } from "../dom.js";

const STRIP_HEIGHT = 100; // in the chart's own unit; one column is 10 wide
const COLUMN_WIDTH = 10;

/** Build a chart; choose(token): called for the column that is clicked. Returns a function that
 * draws { app, columns, summary, legend }. A column: { text, tokens, title, bars }; a bar:
 * { left, right, low, high, kind } in shares of the column's width and of the chart's height. */
export function tokenStrip(parent, choose) {
  const chart = svg("svg", null, parent, { class: "strip", preserveAspectRatio: "none",
    role: "img" });
  const ends = make("div", null, parent, { class: "strip-ends muted", "aria-hidden": "true" });
  const [first, last] = [make("span", null, ends), make("span", null, ends)];
  const said = make("p", null, parent);
  const explained = make("p", null, parent, { class: "muted explanation" });
  let shown = [];
  chart.addEventListener("click", (event) => {
    const { left, width } = chart.getBoundingClientRect();
    const column = shown[Math.floor(((event.clientX - left) / width) * shown.length)];
    if (column) choose(column.tokens.at(-1));
  });
  return function draw({ app, columns, summary, legend }) {
    shown = columns;
    chart.setAttribute("viewBox", `0 0 ${COLUMN_WIDTH * columns.length} ${STRIP_HEIGHT}`);
    chart.setAttribute("aria-label", summary);
    clear(chart);
    columns.forEach((column, i) => {
      drawStripColumn(chart, column, i * COLUMN_WIDTH, column.tokens.includes(app.token));
    });
    [first.textContent, last.textContent] = [columns[0].text, columns.at(-1).text];
    said.textContent = summary;
    explained.textContent = legend;
  };
}

function drawStripColumn(chart, { bars, title }, start, isChosen) {
  const column = svg("g", null, chart);
  svg("title", title, column);
  svg("rect", null, column, { x: start, y: 0, width: COLUMN_WIDTH, height: STRIP_HEIGHT,
    class: isChosen ? "chosen" : "behind" });
  for (const { left, right, low, high, kind } of bars) {
    svg("rect", null, column, {
      x: start + left * COLUMN_WIDTH,
      y: (1 - high) * STRIP_HEIGHT,
      width: (right - left) * COLUMN_WIDTH,
      height: Math.max(1, (high - low) * STRIP_HEIGHT),
      class: kind,
    });
  }
}

/** -ln p of all tokens of a group in nats; null for the first, which nothing predicts. */
export function groupSurprise(reading, { tokens }) {
  const surprises = tokens.map((t) => reading.surprise(t));
  return surprises.includes(null) ? null : surprises.reduce((sum, x) => sum + x, 0);
}
