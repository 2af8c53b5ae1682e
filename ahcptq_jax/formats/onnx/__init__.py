"""Export to ONNX: a model, quantized or in floating point, as `encoder.onnx` and `decoder.onnx`.

Needs the extra `onnx`; importing this without it raises `InputError`.
"""

from ahcptq_jax.formats.onnx.export import export_onnx as export_onnx
