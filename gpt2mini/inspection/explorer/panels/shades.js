// Attention weights as pixels. Masked cells (keys after the query) stay transparent, so that a
// picture is a triangle, and "not allowed" does not look like "zero".

import { heat } from "../dom.js";

/** 256 colors from 0 to 1 as the 32-bit pixels of an ImageData. */
export function shades(full) {
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const [red, green, blue] = heat(i / 255, full);
    return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  });
}

/** Draw cells (query, key <= query) of weight(query, key), one pixel each. merged: so many tokens
 * share a pixel, which shows the largest of their weights. positive, negative: the shades of
 * weights above and below 0. */
export function paintTriangle(canvas, nTokens, weight, positive, options = {}) {
  const { merged = 1, negative = positive } = options;
  const size = Math.ceil(nTokens / merged);
  const largest = new Float32Array(size * size).fill(NaN);
  for (let query = 0; query < nTokens; query++) {
    const row = Math.floor(query / merged) * size;
    for (let key = 0; key <= query; key++) {
      const i = row + Math.floor(key / merged), x = weight(query, key);
      if (!(Math.abs(largest[i]) >= Math.abs(x))) largest[i] = x;
    }
  }
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size), pixels = new Uint32Array(image.data.buffer);
  largest.forEach((x, i) => {
    if (Number.isNaN(x)) return;
    const shadesOfSign = x < 0 ? negative : positive;
    pixels[i] = shadesOfSign[Math.round(255 * Math.min(1, Math.abs(x)))];
  });
  context.putImageData(image, 0, 0);
}
