"""The checker of shapes and types that `conftest.py` puts on the project's functions while tests run."""

import jax
from beartype import BeartypeConf, FrozenDict, beartype

# JAX takes an array of NumPy or a number wherever it takes one of its own arrays, and so do our functions; an integer
# passes for a float, as in PEP 484.
_OVERRIDES = FrozenDict({jax.Array: jax.typing.ArrayLike})
check = beartype(conf=BeartypeConf(hint_overrides=_OVERRIDES, is_pep484_tower=True))
