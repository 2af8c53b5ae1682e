"""Sites of a model by their paths, and nested parameters as flat ones."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import flax.linen as nn
from flax import traverse_util

from sam_flax.layers import Site
from sam_flax.sam import Params

V = TypeVar("V")


def intercept_sites(handle: Callable[[str, Any], Any]) -> AbstractContextManager[None]:
    """A context in which every `Site` returns `handle(path, value)` instead of its value."""

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Site):
            return handle("/".join(context.module.path), args[0])
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def below(prefix: str, entries: Mapping[str, V]) -> dict[str, V]:
    """The entries whose path starts with `prefix`, with it removed; "" keeps all."""
    return {path.removeprefix(prefix): v for path, v in entries.items() if path.startswith(prefix)}


def flatten(params: Params) -> dict[str, Any]:
    """Nested parameters as one dict from paths with slashes to arrays."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The nested parameters of which `flatten` made this dict."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
