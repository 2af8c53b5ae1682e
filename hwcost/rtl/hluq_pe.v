// HLUQ element with a shift path and a multiply path, for codes in the layout of the hybrid quantizer:
//   code < levels   log code k:        acc_log += w << (MAX_SHIFT - k), nothing where k > MAX_SHIFT
//   code == levels  zero:              nothing
//   code > levels   n = code - levels: acc_log += w << MAX_SHIFT, acc_uni += w * n
// The sum is worth scale_log * 2^-MAX_SHIFT * acc_log + scale_uniform * acc_uni; the minimum goes into the bias.
// With levels = 0 it is a plain multiply-accumulate in acc_uni, so that uniform layers run on it as well.
module hluq_pe #(
    parameter W_BITS = 4,
    parameter A_BITS = 4,
    parameter MAX_SHIFT = 7,
    parameter LOG_BITS = 24,
    parameter UNI_BITS = 21
) (
    input  wire                clk,
    input  wire                clear,
    input  wire                valid,
    input  wire [A_BITS-1:0]   levels,
    input  wire [W_BITS-1:0]   w,
    input  wire [A_BITS-1:0]   a,
    output reg  [LOG_BITS-1:0] acc_log,
    output reg  [UNI_BITS-1:0] acc_uni
);
    wire is_uniform = a > levels;
    wire is_zero    = a == levels || (!is_uniform && a > MAX_SHIFT);
    wire [A_BITS-1:0] n     = is_uniform ? a - levels : {A_BITS{1'b0}};
    wire [A_BITS-1:0] shift = is_uniform ? MAX_SHIFT : MAX_SHIFT - a;
    wire [W_BITS+MAX_SHIFT-1:0] shifted = is_zero ? {(W_BITS+MAX_SHIFT){1'b0}} : {{MAX_SHIFT{1'b0}}, w} << shift;
    wire [W_BITS+A_BITS-1:0]    product = w * n;
    always @(posedge clk)
        if (valid) begin
            acc_log <= (clear ? {LOG_BITS{1'b0}} : acc_log) + shifted;
            acc_uni <= (clear ? {UNI_BITS{1'b0}} : acc_uni) + product;
        end
endmodule
