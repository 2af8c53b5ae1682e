"""The page to try a quantized SAM beside the floating-point one; `experiments.demo` serves it."""
