// The same sums as hluq_pe with one multiplication: the code is decoded once per row of the array into
//   operand = n * 2^FIELD + 2^(MAX_SHIFT - k)
// and w * operand carries both products, so that one DSP48E2 (27 x 18 bits, 48-bit accumulator) holds both sums.
// acc = {acc_uni (48 - FIELD bits), acc_log (FIELD bits)}. FIELD must hold acc_log: at 4 bits and FIELD = 22, sums of
// up to 2184 products; longer ones are read out in between.
module hluq_pe_dsp #(
    parameter W_BITS = 4,
    parameter OPERAND_BITS = 26,
    parameter ACC_BITS = 48
) (
    input  wire                    clk,
    input  wire                    clear,
    input  wire                    valid,
    input  wire [W_BITS-1:0]       w,
    input  wire [OPERAND_BITS-1:0] operand,
    output reg  [ACC_BITS-1:0]     acc
);
    always @(posedge clk)
        if (valid) acc <= (clear ? {ACC_BITS{1'b0}} : acc) + w * operand;
endmodule

// The decoder at the edge of the array, one for a row of elements.
module hluq_decode #(
    parameter A_BITS = 4,
    parameter MAX_SHIFT = 7,
    parameter FIELD = 22,
    parameter OPERAND_BITS = 26
) (
    input  wire [A_BITS-1:0]       levels,
    input  wire [A_BITS-1:0]       a,
    output wire [OPERAND_BITS-1:0] operand
);
    wire is_uniform = a > levels;
    wire is_zero    = a == levels || (!is_uniform && a > MAX_SHIFT);
    wire [A_BITS-1:0] n     = is_uniform ? a - levels : {A_BITS{1'b0}};
    wire [A_BITS-1:0] shift = is_uniform ? MAX_SHIFT : MAX_SHIFT - a;
    wire [FIELD-1:0]  power = is_zero ? {FIELD{1'b0}} : {{(FIELD-1){1'b0}}, 1'b1} << shift;
    assign operand = {n, power};
endmodule
