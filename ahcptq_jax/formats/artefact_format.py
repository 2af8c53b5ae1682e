"""The constants that the writer and the reader of artefacts share: name, version and element types of the format."""

import re

import numpy as np

FORMAT = "ahcptq_jax"
# The version that is written; the reader takes this one and all before it.
VERSION = 2

# The checksum of the header, which is taken with its own digits replaced by zeros.
DIGEST = re.compile(rb'"header_sha256":"([0-9a-f]{64})"')
NO_DIGEST = "0" * 64
DTYPES = {"F16": np.float16, "F32": np.float32, "U8": np.uint8, "U16": np.uint16}
# How the sentence of every refusal ends.
REMEDY = "save it again with Quantized.save, or copy it again"
