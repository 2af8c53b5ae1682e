// A column of the array for CAG without permuted channels: ROWS products per cycle, each channel with its group's
// label, summed into one accumulator per group. With channels sorted by group, one plain accumulator serves instead.
module cag_column #(
    parameter ROWS = 4,
    parameter W_BITS = 4,
    parameter A_BITS = 4,
    parameter GROUP_BITS = 2,
    parameter ACC_BITS = 21
) (
    input  wire                                clk,
    input  wire                                clear,
    input  wire                                valid,
    input  wire [ROWS*W_BITS-1:0]              w,
    input  wire [ROWS*A_BITS-1:0]              a,
    input  wire [ROWS*GROUP_BITS-1:0]          group,
    output reg  [(ACC_BITS<<GROUP_BITS)-1:0]   acc
);
    localparam GROUPS = 1 << GROUP_BITS;
    integer g, row;
    reg [ACC_BITS-1:0] sum;
    always @(posedge clk)
        if (valid)
            for (g = 0; g < GROUPS; g = g + 1) begin
                sum = clear ? {ACC_BITS{1'b0}} : acc[g*ACC_BITS +: ACC_BITS];
                for (row = 0; row < ROWS; row = row + 1)
                    if (group[row*GROUP_BITS +: GROUP_BITS] == g)
                        sum = sum + w[row*W_BITS +: W_BITS] * a[row*A_BITS +: A_BITS];
                acc[g*ACC_BITS +: ACC_BITS] <= sum;
            end
endmodule
