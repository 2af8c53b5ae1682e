"""What quantization must know of a model."""
