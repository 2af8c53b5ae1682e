"""The objective of PAR, prompt-aware reconstruction (SAQ-SAM, arXiv 2503.06515).

An error of the encoder matters as far as prompts can see it. The output of a unit of blocks goes through the model's
own neck and, with the prompts of its image, through the model's own decoder, and what is compared are the tokens of the
image that the decoder's transformer returns. The neck and the decoder's units keep the local objective: the released
program's terms for its decoder blocks, whose units are larger than ours, are not here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ahcptq_jax.architectures.base import Operation
from ahcptq_jax.reconstruction.objectives import LocalError, Objective, Place, register
from sam_flax.errors import InputError
from sam_flax.sam import Params, call, parameters_at

MOST_PROMPTS = 16


@dataclasses.dataclass(frozen=True)
class PromptAware:
    """The squared difference of the image's tokens in the decoder, summed over channels, as a `Loss`.

    Attributes:
        sam: the module.
        neck: makes the embedding of a unit's output.
        transformer: path of the module whose second result are the tokens.
    """

    sam: Any
    neck: Operation
    transformer: str

    def __call__(
        self,
        output: Float[Array, "rows *shape"],
        target: Float[Array, "rows *shape"],
        context: tuple[Shaped[Array, "rows ..."], ...],
        shared: Any,
    ) -> Float[Array, ""]:
        (boxes,) = context
        losses = []
        for index in range(len(output)):
            found, wanted = (
                self.image_tokens(shared, value[index : index + 1], boxes[index]) for value in (output, target)
            )
            losses.append(jnp.mean(jnp.sum(jnp.square(found - jax.lax.stop_gradient(wanted)), axis=-1)))
        return jnp.mean(jnp.stack(losses))

    def image_tokens(
        self, shared: tuple[Params, Params], output: Float[Array, "1 g g c"], boxes: Float[Array, "p 4"]
    ) -> Float[Array, "p t c"]:
        """The tokens of one image for each of its prompts.

        Args:
            shared: parameters of the neck, and those that `decode` reads.
            output: of a unit of blocks.
            boxes: the prompts in canvas pixels.
        """
        tokens: list[jax.Array] = []

        def keep(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            result = next_fun(*args, **kwargs)
            if "/".join(context.module.path) == self.transformer and context.method_name == "__call__":
                tokens.append(result[1])
            return result

        neck, decoder = shared
        embedding = self.neck(neck, output)
        with nn.intercept_methods(keep):
            call(self.sam, decoder, embedding, None, boxes, method="decode")
        return tokens[0]


def _make(place: Place, power: float) -> Objective:
    architecture, unit = place.architecture, place.unit
    neck, transformer = architecture.neck(place.sam), architecture.transformer
    if neck is None or transformer is None:
        raise InputError(
            f"objective='prompt_aware' is for plain ViT encoders, not for {architecture.name}; use objective='local'."
        )
    if not unit.part.startswith("encoder"):
        return Objective(LocalError(unit.loss_axis, power))
    loss = PromptAware(place.sam, Operation(neck.module), transformer)
    prompts = np.stack([np.asarray(boxes, np.float32)[None, :MOST_PROMPTS] for boxes in place.boxes])
    shared = (parameters_at(place.params, neck.prefix), architecture.decoder(place.params))
    return Objective(loss, context=(prompts,), shared=jax.tree.map(jnp.asarray, shared))


register("prompt_aware", _make)
