"""FPGA boards and designs: constants with sources, cycles, energy, and the area of elements."""
