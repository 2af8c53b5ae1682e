// AGQ element: softmax codes k stand for 2^(-k/TAU), so values are shifted, and summed apart for each k mod TAU:
//   acc[k mod TAU] += v << (MAX_SHIFT - k div TAU), nothing where k div TAU > MAX_SHIFT;
//   the last code (all ones) is zero.
// Outside, sum r is scaled by 2^(-r/TAU). TAU = 2^TAU_LOG2 is 1, 2 or 4.
module agq_pe #(
    parameter V_BITS = 4,
    parameter A_BITS = 4,
    parameter TAU_LOG2 = 1,
    parameter MAX_SHIFT = 7,
    parameter ACC_BITS = 24
) (
    input  wire                              clk,
    input  wire                              clear,
    input  wire                              valid,
    input  wire [V_BITS-1:0]                 v,
    input  wire [A_BITS-1:0]                 a,
    output reg  [(ACC_BITS<<TAU_LOG2)-1:0]   acc
);
    localparam TAU = 1 << TAU_LOG2;
    wire [A_BITS-1:0] octave = a >> TAU_LOG2;
    wire [A_BITS-1:0] rest   = a & (TAU - 1);
    wire is_zero = &a || octave > MAX_SHIFT;
    wire [A_BITS-1:0] shift = MAX_SHIFT - octave;
    wire [V_BITS+MAX_SHIFT-1:0] shifted = is_zero ? {(V_BITS+MAX_SHIFT){1'b0}} : {{MAX_SHIFT{1'b0}}, v} << shift;
    integer r;
    always @(posedge clk)
        if (valid)
            for (r = 0; r < TAU; r = r + 1)
                acc[r*ACC_BITS +: ACC_BITS] <= (clear ? {ACC_BITS{1'b0}} : acc[r*ACC_BITS +: ACC_BITS])
                                             + (rest == r ? shifted : {(V_BITS+MAX_SHIFT){1'b0}});
endmodule
