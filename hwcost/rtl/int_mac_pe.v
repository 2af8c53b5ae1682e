// Multiply-accumulate of unsigned codes: acc += w * a. The element that every uniform layer needs.
// Zero points are corrected outside, from the sums of the codes.
module int_mac_pe #(
    parameter W_BITS = 4,
    parameter A_BITS = 4,
    parameter ACC_BITS = 21
) (
    input  wire                clk,
    input  wire                clear,  // starts a new sum with this product
    input  wire                valid,
    input  wire [W_BITS-1:0]   w,
    input  wire [A_BITS-1:0]   a,
    output reg  [ACC_BITS-1:0] acc
);
    wire [W_BITS+A_BITS-1:0] product = w * a;
    always @(posedge clk)
        if (valid) acc <= (clear ? {ACC_BITS{1'b0}} : acc) + product;
endmodule
