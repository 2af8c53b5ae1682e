// The table at the edge of the array, one for a row of elements: a code of an activation becomes the whole level that
// it stands for. Channels of different groups read different parts of the table: the address is the group's label and
// the code. It is written once for each layer and read asynchronously, as distributed memory is.
module level_table #(
    parameter A_BITS = 4,
    parameter GROUP_BITS = 0,
    parameter LEVEL_BITS = 8
) (
    input  wire                         clk,
    input  wire                         write,
    input  wire [A_BITS+GROUP_BITS-1:0] write_address,
    input  wire [LEVEL_BITS-1:0]        write_level,
    input  wire [A_BITS+GROUP_BITS-1:0] address,  // {group, code}
    output wire [LEVEL_BITS-1:0]        level
);
    reg [LEVEL_BITS-1:0] levels [0:(1<<(A_BITS+GROUP_BITS))-1];
    always @(posedge clk)
        if (write) levels[write_address] <= write_level;
    assign level = levels[address];
endmodule
