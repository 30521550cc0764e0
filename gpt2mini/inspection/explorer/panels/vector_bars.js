// A vector as a row of bars, up for positive numbers and down for negative ones.

import { fixed } from "./attention_arithmetic.js";
import { color, make } from "../dom.js";

const HEIGHT = 40; // pixels

/** A labelled picture in a parent; returns a function that draws a vector and its description.
 * marked: index of a number that is pointed out; largest: the size that fills the height. */
export function vectorBars(parent) {
  const figure = make("div", null, parent, { class: "vector" });
  const label = make("span", null, figure, { class: "vector-label" });
  const canvas = make("canvas", null, figure, { role: "img" });
  let shown = [];
  canvas.addEventListener("pointermove", ({ offsetX }) => {
    const i = Math.floor((offsetX / canvas.clientWidth) * shown.length);
    if (i in shown) canvas.title = `number ${i}: ${fixed(shown[i], 3)}`;
  });
  return function draw(text, vector, { marked = -1, largest = null } = {}) {
    shown = vector;
    const most = largest ?? vector.reduce((size, x) => Math.max(size, Math.abs(x)), 0);
    if (label.textContent !== text) label.textContent = text;
    canvas.setAttribute("aria-label", `${text}: ${vector.length} numbers, the largest in size ` +
      `${most.toFixed(2)}`);
    paintBars(canvas, vector, most || 1, marked);
  };
}

function paintBars(canvas, vector, largest, marked) {
  const width = Math.max(2, Math.floor(512 / vector.length)), half = HEIGHT / 2;
  canvas.width = width * vector.length;
  canvas.height = HEIGHT;
  const context = canvas.getContext("2d"), css = (name) => `rgb(${color(name).join(" ")})`;
  context.fillStyle = css("--line");
  context.fillRect(0, half - 0.5, canvas.width, 1);
  if (marked >= 0) context.fillRect(marked * width, 0, width, HEIGHT);
  vector.forEach((x, i) => {
    const length = (Math.abs(x) / largest) * (half - 1);
    context.fillStyle = css(x < 0 ? "--heat-negative" : "--heat-full");
    context.fillRect(i * width, x < 0 ? half : half - length, Math.max(1, width - 1), length);
  });
}
