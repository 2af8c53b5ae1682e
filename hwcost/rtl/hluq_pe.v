// HLUQ element with a shift path and a multiply path, for codes in the layout of the hybrid quantizer:
//   code < levels   log code k:       acc_log += w << (MAX_SHIFT - k)
//   code == levels  zero:             nothing
//   code > levels   n = code - levels: acc_log += w << MAX_SHIFT, acc_uni += w * n
// The value of the sum is scale_log * 2^-MAX_SHIFT * acc_log + scale_uniform * acc_uni; the minimum goes into the bias.
module hluq_pe #(
    parameter W_BITS = 4,
    parameter A_BITS = 4,
    parameter MAX_SHIFT = 7,
    parameter ACC_BITS = 28
) (
    input  wire                clk,
    input  wire                clear,
    input  wire                valid,
    input  wire [A_BITS-1:0]   levels,
    input  wire [W_BITS-1:0]   w,
    input  wire [A_BITS-1:0]   a,
    output reg  [ACC_BITS-1:0] acc_log,
    output reg  [ACC_BITS-1:0] acc_uni
);
    wire is_zero    = a == levels;
    wire is_uniform = a > levels;
    wire [A_BITS-1:0] n     = is_uniform ? a - levels : {A_BITS{1'b0}};
    wire [A_BITS-1:0] shift = is_uniform ? MAX_SHIFT[A_BITS-1:0] : MAX_SHIFT[A_BITS-1:0] - a;
    wire [W_BITS+MAX_SHIFT-1:0] shifted = is_zero ? {(W_BITS+MAX_SHIFT){1'b0}} : {{MAX_SHIFT{1'b0}}, w} << shift;
    wire [W_BITS+A_BITS-1:0]    product = w * n;
    always @(posedge clk)
        if (valid) begin
            acc_log <= (clear ? {ACC_BITS{1'b0}} : acc_log) + shifted;
            acc_uni <= (clear ? {ACC_BITS{1'b0}} : acc_uni) + product;
        end
endmodule
