"""What a quantized model is written as, and tables of it."""
