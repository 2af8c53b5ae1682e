"""A rule of a recipe: which quantizer and which widths the sites of a pattern get."""

import dataclasses
import re

from sam_flax.errors import InputError

# The kind of sites that stay in floating point by decision, not by oversight.
FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class Rule:
    """The quantizer kind and widths of all sites that match a pattern.

    Each field that a rule leaves None is decided by the next rule that matches the same site: a rule of widths alone
    keeps the kind that its architecture gives.

    Attributes:
        pattern: a regular expression that matches whole site paths, such as "image_encoder/.*/mlp/lin2/input".
        kind: name of a quantizer kind, or "float".
        a_bits: bits of the activations at the site; None at the end is `QuantConfig.a_bits`.
        w_bits: bits of the weights of the layer whose input the site is; None at the end is `QuantConfig.w_bits`.

    Raises:
        InputError: if the pattern is no regular expression.
    """

    pattern: str
    kind: str | None = None
    a_bits: int | None = None
    w_bits: int | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise InputError(
                f"The rule {self.pattern!r} is no regular expression ({error}); give one that matches site paths."
            ) from None

    def matches(self, path: str) -> bool:
        """Whether the pattern matches the whole path."""
        return re.fullmatch(self.pattern, path) is not None
