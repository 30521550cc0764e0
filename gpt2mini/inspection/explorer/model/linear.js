// Matrix products, where nearly all time goes. y = W x + b for some rows of x, as nn.Linear.
//
// Two ways give the same numbers up to rounding: plain JavaScript, and the same loop in WebAssembly
// (kernel.wat), which multiplies four numbers in one instruction. The second reads its arguments
// from a memory of its own, in which the weights of the model then have to lie: `allocate`.

const ROWS_AT_ONCE = 32; // of x, in the kernel's memory
const IN_GROUP = 4; // rows of x that are multiplied together
const OUTPUTS_AT_ONCE = 8; // of the kernel

class PlainLinear {
  kind = "JavaScript";

  allocate(size) {
    return new Float32Array(size);
  }

  // y = W x + b. x: rows of `inputs` numbers. weight: (outputs, inputs). bias: (outputs) or null.
  product(x, weight, bias, y, { first, end }, inputs) {
    const outputs = weight.length / inputs;
    const pairs = outputs - (outputs % 2);
    const fours = end - ((end - first) % 4);
    for (let o = 0; o < pairs; o += 2) {
      for (let t = first; t < fours; t += 4) eightProducts(x, t, weight, o, inputs, y, outputs);
    }
    oneByOne(x, weight, y, inputs, { first, end: fours }, { first: pairs, end: outputs });
    oneByOne(x, weight, y, inputs, { first: fours, end }, { first: 0, end: outputs });
    if (bias) addBias(y, bias, { first, end });
  }
}

// Four rows of x times two rows of W: each number that is read serves several sums.
function eightProducts(x, t, weight, o, size, y, outputs) {
  const x0 = t * size;
  const w0 = o * size;
  let [a0, a1, a2, a3] = [0, 0, 0, 0];
  let [b0, b1, b2, b3] = [0, 0, 0, 0];
  for (let i = 0; i < size; i++) {
    const a = weight[w0 + i];
    const b = weight[w0 + size + i];
    const r0 = x[x0 + i];
    const r1 = x[x0 + size + i];
    const r2 = x[x0 + 2 * size + i];
    const r3 = x[x0 + 3 * size + i];
    a0 += a * r0;
    a1 += a * r1;
    a2 += a * r2;
    a3 += a * r3;
    b0 += b * r0;
    b1 += b * r1;
    b2 += b * r2;
    b3 += b * r3;
  }
  const at = t * outputs + o;
  y[at] = a0;
  y[at + 1] = b0;
  y[at + outputs] = a1;
  y[at + outputs + 1] = b1;
  y[at + 2 * outputs] = a2;
  y[at + 2 * outputs + 1] = b2;
  y[at + 3 * outputs] = a3;
  y[at + 3 * outputs + 1] = b3;
}

// What is left over.
function oneByOne(x, weight, y, size, rows, outputs) {
  const width = weight.length / size;
  for (let o = outputs.first; o < outputs.end; o++) {
    for (let t = rows.first; t < rows.end; t++) {
      let sum = 0;
      for (let i = 0; i < size; i++) sum += weight[o * size + i] * x[t * size + i];
      y[t * width + o] = sum;
    }
  }
}

function addBias(y, bias, { first, end }) {
  const size = bias.length;
  for (let t = first; t < end; t++) {
    for (let o = 0; o < size; o++) y[t * size + o] += bias[o];
  }
}

/** The products by the kernel. Its memory: weights of `size` numbers, then some rows of x and y. */
class WasmLinear {
  kind = "WebAssembly";

  constructor(kernel, memory, { size, widest }) {
    this.kernel = kernel;
    this.memory = memory;
    this.size = size;
    this.used = 0;
    this.plain = new PlainLinear();
    this.x = new Float32Array(memory.buffer, 4 * size, ROWS_AT_ONCE * widest);
    this.y = new Float32Array(memory.buffer, 4 * (size + this.x.length), ROWS_AT_ONCE * widest);
  }

  static async make(bytes, { size, widest }) {
    const even = Math.ceil(widest / OUTPUTS_AT_ONCE) * OUTPUTS_AT_ONCE;
    const pages = Math.ceil((4 * (size + 2 * ROWS_AT_ONCE * even)) / 65536);
    const memory = new WebAssembly.Memory({ initial: pages, maximum: pages });
    const { instance } = await WebAssembly.instantiate(bytes, { linear: { memory } });
    return new WasmLinear(instance.exports.product, memory, { size, widest: even });
  }

  allocate(size) {
    if (this.used + size > this.size) throw new Error("more weights than the memory was made for");
    this.used += size;
    return new Float32Array(this.memory.buffer, 4 * (this.used - size), size);
  }

  // As of PlainLinear. The weights are in the memory; rows of x and y are copied in and out.
  product(x, weight, bias, y, rows, inputs) {
    if (weight.buffer !== this.memory.buffer) {
      this.plain.product(x, weight, bias, y, rows, inputs);
      return;
    }
    const outputs = weight.length / inputs;
    const even = Math.ceil(outputs / OUTPUTS_AT_ONCE) * OUTPUTS_AT_ONCE;
    for (let first = rows.first; first < rows.end; first += ROWS_AT_ONCE) {
      const part = { first, end: Math.min(first + ROWS_AT_ONCE, rows.end) };
      const groups = Math.ceil((part.end - first) / IN_GROUP);
      this.copyIn(x, part, inputs);
      this.kernel(
        this.x.byteOffset, weight.byteOffset, this.y.byteOffset, groups, even, inputs,
      );
      this.copyOut(y, part, outputs, even);
    }
    if (bias) addBias(y, bias, rows);
  }

  // Number i of the four rows of a group side by side: place (group, i, row in the group).
  copyIn(x, { first, end }, inputs) {
    for (let t = first; t < end; t++) {
      const start = placeOf(t - first, inputs);
      for (let i = 0; i < inputs; i++) this.x[start + i * IN_GROUP] = x[t * inputs + i];
    }
  }

  copyOut(y, { first, end }, outputs, even) {
    for (let t = first; t < end; t++) {
      const start = placeOf(t - first, even);
      for (let o = 0; o < outputs; o++) y[t * outputs + o] = this.y[start + o * IN_GROUP];
    }
  }
}

// Where a row begins among groups of four rows.
function placeOf(row, width) {
  const group = Math.floor(row / IN_GROUP);
  return group * width * IN_GROUP + (row % IN_GROUP);
}

/** The fastest way that this browser has. kernel: the bytes of kernel.wasm, or null to compute in
 * JavaScript. extent: see `extentOf` in weights.js. */
export async function makeLinear(kernel, extent) {
  try {
    return kernel ? await WasmLinear.make(kernel, extent) : new PlainLinear();
  } catch {
    return new PlainLinear(); // no WebAssembly, no SIMD, or not enough memory in one piece
  }
}
