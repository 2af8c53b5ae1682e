"""What runs a quantized model: products on codes, and layers in place of SAM's."""
