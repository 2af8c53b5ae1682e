// Several products in one DSP48E2: the weights of LANES columns lie side by side in one operand and the levels of ROWS
// rows in the other, so far apart that no product reaches into the next, and every product has its own accumulator:
//   acc[i*ROWS + j] += w[i] * level[j]
// Weights and levels are unsigned, so that the products are exact and nothing is corrected. Signed operands of 27 and
// 18 bits hold unsigned ones of 26 and 17: with 4-bit weights two products at 8-bit levels, three at 7, four at 6.
module level_lanes #(
    parameter LANES = 2,
    parameter ROWS = 1,
    parameter W_BITS = 4,
    parameter LEVEL_BITS = 8,
    parameter ACC_BITS = 25
) (
    input  wire                           clk,
    input  wire                           clear,
    input  wire                           valid,
    input  wire [LANES*W_BITS-1:0]        w,
    input  wire [ROWS*LEVEL_BITS-1:0]     level,
    output reg  [LANES*ROWS*ACC_BITS-1:0] acc
);
    localparam STEP = W_BITS + LEVEL_BITS;  // bits of a product
    localparam W_WIDE = (LANES - 1) * ROWS * STEP + W_BITS;
    localparam LEVEL_WIDE = (ROWS - 1) * STEP + LEVEL_BITS;
    reg  [W_WIDE-1:0] w_wide;
    reg  [LEVEL_WIDE-1:0] level_wide;
    wire [LANES*ROWS*STEP-1:0] products = w_wide * level_wide;
    integer i, j;
    always @* begin
        w_wide = {W_WIDE{1'b0}};
        level_wide = {LEVEL_WIDE{1'b0}};
        for (i = 0; i < LANES; i = i + 1) w_wide[i*ROWS*STEP +: W_BITS] = w[i*W_BITS +: W_BITS];
        for (j = 0; j < ROWS; j = j + 1) level_wide[j*STEP +: LEVEL_BITS] = level[j*LEVEL_BITS +: LEVEL_BITS];
    end
    always @(posedge clk)
        if (valid)
            for (i = 0; i < LANES * ROWS; i = i + 1)
                acc[i*ACC_BITS +: ACC_BITS] <= (clear ? {ACC_BITS{1'b0}} : acc[i*ACC_BITS +: ACC_BITS])
                                             + products[i*STEP +: STEP];
endmodule
