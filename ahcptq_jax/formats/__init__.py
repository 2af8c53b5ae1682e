"""The file formats of a quantized model, and the table that summarizes it."""
