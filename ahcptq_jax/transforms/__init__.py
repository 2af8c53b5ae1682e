"""Rewritings of floating-point parameters that come before quantization."""
