// From the text of the page to arrays of numbers: base64, gzip, and fewer bits than float32.
// weights.py writes what is read here.

const ARRAY_KINDS = {
  "<f4": Float32Array,
  "<f2": Uint16Array, // JavaScript has no arrays of half precision: see `fromHalf`
  "<u2": Uint16Array,
  "<i4": Int32Array,
};

/** The bytes of a base64 text. */
export function bytesFromBase64(text) {
  const clean = text.trim();
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(clean); // new and about 20 times as fast
  const characters = atob(clean);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/** The bytes that were compressed with gzip. */
export async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Numbers that stand in the page's JSON: {dtype, shape, data}. Half precision becomes float32. */
export function unpackNumbers({ dtype, data }) {
  const { buffer, byteOffset, byteLength } = bytesFromBase64(data);
  const Kind = ARRAY_KINDS[dtype];
  const numbers = new Kind(buffer.slice(byteOffset, byteOffset + byteLength));
  return dtype === "<f2" ? fromHalf(numbers, new Float32Array(numbers.length)) : numbers;
}

/** How many float32 numbers all tensors of the page's models have (size), and the longest row or
 * column of their matrices (widest). */
export function extentOf(models) {
  let [size, widest] = [0, 1];
  for (const { tensors, adapters = {} } of models) {
    for (const { shape } of Object.values(tensors)) {
      size += sizeOf(shape);
      widest = Math.max(widest, ...shape);
    }
    for (const { A, B } of Object.values(adapters)) { // the merged weights
      size += tensors[A].shape[1] * tensors[B].shape[0];
    }
  }
  return { size, widest };
}

/**
 * A model's tensors by name: Float32Arrays. bytes: of its blob. allocate: makes the arrays. first:
 * the tensors of the first model, of which a second one shares those that it does not have itself.
 */
export function readTensors({ tensors, adapters = {} }, bytes, allocate, first = {}) {
  const own = {};
  for (const name of Object.keys(tensors)) own[name] = readTensor(tensors[name], bytes, allocate);
  const found = { ...first, ...own };
  for (const [layer, adapter] of Object.entries(adapters)) {
    const name = `${layer}.weight`;
    const change = { a: own[adapter.A], b: own[adapter.B], scale: adapter.scale };
    found[name] = merged(found[name], change, tensors[adapter.A].shape[0], allocate);
  }
  return found;
}

function readTensor({ offset, shape, dtype, scale_offset: scaleOffset }, bytes, allocate) {
  const size = sizeOf(shape);
  const numbers = allocate(size);
  const part = (start, length) => bytes.buffer.slice(bytes.byteOffset + start,
    bytes.byteOffset + start + length);
  if (dtype === "float32") numbers.set(new Float32Array(part(offset, 4 * size)));
  else if (dtype === "float16") fromHalf(new Uint16Array(part(offset, 2 * size)), numbers);
  else {
    const scales = new Float32Array(part(scaleOffset, 4 * shape[0]));
    fromInt8Rows(new Int8Array(part(offset, size)), scales, numbers);
  }
  return numbers;
}

/** Each row of a matrix: integers times one scale. */
function fromInt8Rows(integers, scales, numbers) {
  const width = numbers.length / scales.length;
  for (let row = 0; row < scales.length; row++) {
    const end = (row + 1) * width;
    for (let i = row * width; i < end; i++) numbers[i] = integers[i] * scales[row];
  }
  return numbers;
}

/** IEEE 754 half precision: 1 bit of sign, 5 of exponent, 10 of fraction. */
function fromHalf(halves, numbers) {
  for (let i = 0; i < halves.length; i++) {
    const exponent = (halves[i] >> 10) & 31;
    const fraction = halves[i] & 1023;
    const size = exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25);
    numbers[i] = halves[i] >> 15 ? -size : size;
  }
  return numbers;
}

/** W + scale * B @ A, a layer with a low-rank adapter. a: (rank, in). b: (out, rank). */
function merged(weight, { a, b, scale }, rank, allocate) {
  const sum = allocate(weight.length);
  const inputs = a.length / rank;
  for (let i = 0; i < sum.length; i++) {
    const [row, column] = [Math.floor(i / inputs), i % inputs];
    let change = 0;
    for (let r = 0; r < rank; r++) change += b[row * rank + r] * a[r * inputs + column];
    sum[i] = weight[i] + scale * change;
  }
  return sum;
}

function sizeOf(shape) {
  return shape.reduce((a, b) => a * b, 1);
}
