// Sliders for temperature, top-k and top-p, each with its exact number, which can be typed too.

import { make } from "../dom.js";

const CONTROLS = [
  { field: "temperature", name: "temperature", min: 0, max: 2, step: 0.05,
    says: "below 1 favors likely tokens, above 1 unlikely ones; 0 takes the most likely" },
  { field: "topK", name: "top-k", min: 0, max: 100, step: 1, typedMax: 1e6,
    says: "keep the k most likely tokens; 0 keeps all" },
  { field: "topP", name: "top-p", min: 0.01, max: 1, step: 0.01,
    says: "keep the fewest most likely tokens that have this probability together; 1 keeps all" },
];

export function samplingControls(app, parent) {
  const box = make("div", null, parent, { class: "sampling" });
  const draws = CONTROLS.map((control) => samplingControl(app, box, control));
  const help = make("details", null, parent, { class: "muted" });
  make("summary", "what these do", help);
  for (const { name, says } of CONTROLS) make("p", `${name}: ${says}.`, help);
  return { draw() { draws.forEach((draw) => draw()); } };
}

function samplingControl(app, parent, { field, name, min, max, step, typedMax = max, says }) {
  const id = `next-${field}`;
  make("label", name, parent, { for: id, title: says });
  const slider = make("input", null, parent, { type: "range", id, min, max, step });
  const typed = make("input", null, parent, {
    type: "number", min, max: typedMax, step: field === "topK" ? 1 : "any", class: "short",
    "aria-label": name });
  let isSliding = false; // one movement of the slider is one change to undo
  slider.addEventListener("input", () => {
    app.set({ [field]: Number(slider.value) }, { undo: !isSliding });
    isSliding = true;
  });
  slider.addEventListener("change", () => { isSliding = false; });
  typed.addEventListener("change", () => {
    const value = Number(typed.value);
    if (typed.value === "" || Number.isNaN(value)) typed.value = app.state[field];
    else app.set({ [field]: Math.min(typedMax, Math.max(min, value)) });
  });
  return function draw() {
    const value = app.state[field];
    slider.value = value;
    slider.setAttribute("aria-valuetext", field === "topK" && value === 0 ? "all" : String(value));
    if (document.activeElement !== typed || Number(typed.value) !== value) typed.value = value;
  };
}
