;; Matrix products for linear.js: y = W x for groups of four tokens, with SIMD instructions that work
;; on four float32 numbers at once, one of each token. Build: wat2wasm kernel.wat -o kernel.wasm
;;
;; x: (groups, inputs, 4)    number i of the four tokens of a group side by side
;; w: (outputs, inputs)      as in nn.Linear
;; y: (groups, outputs, 4)
;;
;; Eight rows of W are multiplied at once: their eight sums stay in registers, and each number of x
;; is read once for all of them. `outputs` is a multiple of eight: rows beyond the end of W are read
;; from whatever follows it, and linear.js takes no notice of their sums.
(module
  (import "linear" "memory" (memory 1))
  (func (export "product")
    (param $x i32) (param $w i32) (param $y i32)          ;; where they begin, in bytes
    (param $groups i32) (param $outputs i32) (param $inputs i32)
    (local $row i32)                                      ;; bytes of a row of W
    (local $o i32) (local $group i32) (local $i i32)      ;; $i counts down
    (local $from_x i32) (local $to_y i32)
    (local $w0 i32) (local $w1 i32) (local $w2 i32) (local $w3 i32)
    (local $w4 i32) (local $w5 i32) (local $w6 i32) (local $w7 i32)
    (local $four v128)
    (local $s0 v128) (local $s1 v128) (local $s2 v128) (local $s3 v128)
    (local $s4 v128) (local $s5 v128) (local $s6 v128) (local $s7 v128)

    (local.set $row (i32.shl (local.get $inputs) (i32.const 2)))
    (loop $each_eight_outputs
      (local.set $group (i32.const 0))
      (local.set $from_x (local.get $x))
      (loop $each_group
        (local.set $w0 (local.get $w))
        (local.set $w1 (i32.add (local.get $w0) (local.get $row)))
        (local.set $w2 (i32.add (local.get $w1) (local.get $row)))
        (local.set $w3 (i32.add (local.get $w2) (local.get $row)))
        (local.set $w4 (i32.add (local.get $w3) (local.get $row)))
        (local.set $w5 (i32.add (local.get $w4) (local.get $row)))
        (local.set $w6 (i32.add (local.get $w5) (local.get $row)))
        (local.set $w7 (i32.add (local.get $w6) (local.get $row)))
        (local.set $s0 (v128.const f32x4 0 0 0 0))
        (local.set $s1 (v128.const f32x4 0 0 0 0))
        (local.set $s2 (v128.const f32x4 0 0 0 0))
        (local.set $s3 (v128.const f32x4 0 0 0 0))
        (local.set $s4 (v128.const f32x4 0 0 0 0))
        (local.set $s5 (v128.const f32x4 0 0 0 0))
        (local.set $s6 (v128.const f32x4 0 0 0 0))
        (local.set $s7 (v128.const f32x4 0 0 0 0))
        (local.set $i (i32.const 0))
        (loop $each_input
          ;; number i of four tokens, times number i of eight rows of W (each copied four times)
          (local.set $four (v128.load (local.get $from_x)))
          (local.set $s0 (f32x4.add (local.get $s0) (f32x4.mul (local.get $four)
            (v128.load32_splat (i32.add (local.get $w0) (local.get $i))))))
          (local.set $s1 (f32x4.add (local.get $s1) (f32x4.mul (local.get $four)
            (v128.load32_splat (i32.add (local.get $w1) (local.get $i))))))
          (local.set $s2 (f32x4.add (local.get $s2) (f32x4.mul (local.get $four)
            (v128.load32_splat (i32.add (local.get $w2) (local.get $i))))))
          (local.set $s3 (f32x4.add (local.get $s3) (f32x4.mul (local.get $four)
            (v128.load32_splat (i32.add (local.get $w3) (local.get $i))))))
          (local.set $s4 (f32x4.add (local.get $s4) (f32x4.mul (local.get $four)
            (v128.load32_splat (i32.add (local.get $w4) (local.get $i))))))
          (local.set $s5 (f32x4.add (local.get $s5) (f32x4.mul (local.get $four)
            (v128.load32_splat (i32.add (local.get $w5) (local.get $i))))))
          (local.set $s6 (f32x4.add (local.get $s6) (f32x4.mul (local.get $four)
            (v128.load32_splat (i32.add (local.get $w6) (local.get $i))))))
          (local.set $s7 (f32x4.add (local.get $s7) (f32x4.mul (local.get $four)
            (v128.load32_splat (i32.add (local.get $w7) (local.get $i))))))
          (local.set $from_x (i32.add (local.get $from_x) (i32.const 16)))
          (local.set $i (i32.add (local.get $i) (i32.const 4)))
          (br_if $each_input (i32.lt_u (local.get $i) (local.get $row))))

        ;; y[group][o ... o + 7], 16 bytes each
        (local.set $to_y (i32.add (local.get $y) (i32.shl (i32.add (local.get $o)
          (i32.mul (local.get $group) (local.get $outputs))) (i32.const 4))))
        (v128.store offset=0 (local.get $to_y) (local.get $s0))
        (v128.store offset=16 (local.get $to_y) (local.get $s1))
        (v128.store offset=32 (local.get $to_y) (local.get $s2))
        (v128.store offset=48 (local.get $to_y) (local.get $s3))
        (v128.store offset=64 (local.get $to_y) (local.get $s4))
        (v128.store offset=80 (local.get $to_y) (local.get $s5))
        (v128.store offset=96 (local.get $to_y) (local.get $s6))
        (v128.store offset=112 (local.get $to_y) (local.get $s7))
        (local.set $group (i32.add (local.get $group) (i32.const 1)))
        (br_if $each_group (i32.lt_u (local.get $group) (local.get $groups))))

      (local.set $w (i32.add (local.get $w) (i32.shl (local.get $row) (i32.const 3))))
      (local.set $o (i32.add (local.get $o) (i32.const 8)))
      (br_if $each_eight_outputs (i32.lt_u (local.get $o) (local.get $outputs))))))
