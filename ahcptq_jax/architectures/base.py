"""The interface of an architecture: what quantization must know of a promptable segmenter, and the registry of them.

A new model is its Flax modules, a file here that ends in `register(...)`, and its cost graph in hwcost. Calibration,
reconstruction, the runtime and the file ask the architecture, and know no parameter's name.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ahcptq_jax.architectures.sites import below, flatten, intercept_sites, unflatten
from ahcptq_jax.rules import Rule
from sam_flax.encoders import attention
from sam_flax.errors import InputError
from sam_flax.sam import Params, call
from sam_flax.stages import Stage, StageGraph

V = TypeVar("V")
Module = Any  # a Linen module with a `config`, `init_params` and `decode`, as `sam_flax.Sam`
Shape = tuple[int, ...]

# What a unit of reconstruction can be, in forward order.
PARTS = (
    "encoder_attention",
    "encoder_mlp",
    "encoder_block",
    "encoder_stage",
    "neck",
    "decoder_attention",
    "decoder_mlp",
    "decoder",
)
# What is learned together in the encoder: a part of a block, as in AHCPTQ; the block whole; or, as in SAQ-SAM, all
# blocks up to the next one with global attention.
GRANULARITIES = ("part", "block", "stage")
# What is learned together in the decoder: each attention and MLP, as in AHCPTQ; or all of it, by its masks.
DECODER_GRANULARITIES = ("part", "whole")
# The sites of an attention whose two products run on codes.
ATTENTION_SITES = ("q", "k", "v", "softmax")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A module's method as a function of parameters and inputs. Hashable: a static argument of `jax.jit`.

    Modules without a parent compare by their fields, so that equal units and stages share a compilation.
    """

    module: nn.Module
    method: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()  # further arguments by name, hashable

    def __call__(self, params: Params, *args: Any) -> Any:
        return call(self.module, params, *args, method=self.method, **dict(self.settings))


@dataclasses.dataclass(frozen=True)
class Unit:
    """One step of the reconstruction: a function of its own parameters.

    Attributes:
        name: unique, "image_encoder/blocks_0/mlp" for instance; other units name its output by it.
        prefix: what its parameters' and sites' paths start with, "image_encoder/blocks_0/".
        members: the children of the prefix that belong to it; none means all.
        operation: what it computes.
        part: one of `PARTS`.
        loss_axis: axis over which the local objective sums squared errors before it averages them: rows of the grid,
            tokens, and channels in the neck, as in the official code (`lp_loss`), where they come second. Its windowed
            attention, though, is a unit inside the windows: it sums over a window's rows, so that its error weighs
            less against the regularizer, by window / grid, than ours.
        inputs: of an encoder's unit, the names of earlier units whose outputs it takes, or `EMBEDDED`. A decoder's unit
            has none: what it takes is captured while prompts run through the decoder.
    """

    name: str
    prefix: str
    members: tuple[str, ...]
    operation: Operation
    part: str
    loss_axis: int = 1
    inputs: tuple[str, ...] = ()

    def own(self, entries: Mapping[str, V]) -> dict[str, V]:
        """The entries that belong to this unit, by paths relative to it."""
        inside = below(self.prefix, entries)
        return {path: v for path, v in inside.items() if not self.members or path.split("/")[0] in self.members}


@dataclasses.dataclass(frozen=True)
class Rewritable:
    """Places where parameters can be rewritten without a change of the function; `transforms` use them.

    Attributes:
        norms: (norm, the layer behind it, whether offsets can pass between them: not where zeros are padded).
        hidden: (first, second) linear with a homogeneous function, such as ReLU, between them.
        keys: key projections of attentions whose keys may all be shifted alike.
        scores: attentions with `q_proj` and `k_proj`, whose channels may be scaled in one and divided in the other.
    """

    norms: tuple[tuple[str, str, bool], ...] = ()
    hidden: tuple[tuple[str, str], ...] = ()
    keys: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()


@runtime_checkable
class AttentionCodes(Protocol):
    """The quantizers and products that the runtime gives to an attention which runs on codes."""

    @property
    def recording(self) -> bool:
        """Whether anybody asks for the codes."""

    def encode(self, site: str, values: jax.Array) -> jax.Array:
        """int8 levels of the values at one of `ATTENTION_SITES`; their codes are recorded if anybody asks."""

    def decode(self, site: str, level: jax.Array) -> jax.Array:
        """The values that the levels stand for."""

    def across(self, k: jax.Array) -> jax.Array:
        """Levels of keys (..., N, d) as `attend` takes them, (..., d, N); do it outside of loops over queries."""

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, *biases: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Levels (..., M, d), (..., d, N), (..., N, d) -> output (..., M, d), codes of the map (..., M, N)."""

    def record(self, site: str, codes: jax.Array) -> None:
        """Notes codes that `attend` returned."""


# A module's `__call__` on levels: (module, codes, the module's arguments) -> what the module returns.
RunOnCodes = Callable[..., jax.Array]


class Architecture(abc.ABC):
    """All that quantization knows of a family of models. Instances have no state and are registered once.

    Attributes:
        name: the family's name, which stands in files, and by which hwcost finds its graph.
        rules: the official recipe, site by site; `recipe.Recipe` completes it by the configuration.
        parts: the top-level keys of the parameters.
        decoder_parts: those that `decode` reads.
        transforms: names of the rewritings that every quantization of the family begins with.
        bimodal: pattern of the attentions whose keys BIG inspects; they have `q_proj`, `k_proj` and a site `k`.
        focused: pattern of the attentions whose queries and keys PCC clips; they have `q_proj`, `k_proj` and biases.
        transformer: path of the decoder's transformer, which returns (queries, tokens of the image), for objectives.
        attentions: class of an attention module -> how it runs on codes.
    """

    name: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]]
    parts: ClassVar[tuple[str, ...]]
    decoder_parts: ClassVar[tuple[str, ...]]
    transforms: ClassVar[tuple[str, ...]] = ()
    bimodal: ClassVar[str | None] = None
    focused: ClassVar[str | None] = None
    transformer: ClassVar[str | None] = None
    attentions: ClassVar[Mapping[type[nn.Module], RunOnCodes]] = {}

    @abc.abstractmethod
    def fits(self, sam: Module) -> bool:
        """Whether a module is of this family."""

    @abc.abstractmethod
    def module(self, config: Any) -> Module | None:
        """The module of a configuration; None if the configuration is another family's."""

    def parse_config(self, text: str, source: str) -> Any:
        """The configuration in a file's metadata, as its `to_dict` and JSON wrote it. The file may come from anywhere.

        Args:
            text: JSON.
            source: what the sentence of an error starts with.

        Raises:
            ValueError: if it is no configuration of this family.
        """
        raise InputError(f"{source} is of the architecture {self.name}, whose models cannot be read from files.")

    def most_repeated(self, config: Any) -> int:
        """The most layers of a kind that a configuration asks for: a file must have as many tensors."""
        del config
        return 0

    @abc.abstractmethod
    def stages(self, sam: Module) -> StageGraph:
        """The graph of the image encoder's stages, which begins behind the embedding."""

    @abc.abstractmethod
    def embed(self, sam: Module, params: Params, images: Float[Array, "b s s 3"]) -> Any:
        """The first input of stages and units (`EMBEDDED`), which is never quantized.

        Args:
            sam: the module.
            params: its parameters.
            images: normalised and padded.
        """

    @abc.abstractmethod
    def encoder_units(self, sam: Module, granularity: str = "part") -> list[Unit]:
        """The image encoder's units in forward order; `granularity` is one of `GRANULARITIES`."""

    def neck(self, sam: Module) -> Stage | None:
        """The stage that makes an embedding of what any block of the encoder returns; None where blocks differ."""
        del sam
        return None

    @abc.abstractmethod
    def decoder_units(self, sam: Module) -> list[Unit]:
        """The decoder's units in forward order; the name of each is the path of its module."""

    def whole_decoder(self, sam: Module) -> Unit:
        """The decoder as one unit, named by the path of its module; it returns what of its output is to be kept.

        Raises:
            InputError: if the family has no such unit.
        """
        raise InputError(f"decoder_granularity='whole' is not for {self.name}; use part.")

    def unit_outputs(self, sam: Module, granularity: str = "part") -> tuple[str, ...]:
        """The names of the units whose outputs are the image's embedding."""
        return (self.encoder_units(sam, granularity)[-1].name,)

    def shapes(self, sam: Module) -> dict[str, Shape]:
        """The parameters: path -> shape."""
        shapes = jax.eval_shape(sam.init_params, jax.random.key(0))
        return {path: tuple(leaf.shape) for path, leaf in flatten(shapes).items()}

    def sites(self, sam: Module) -> dict[str, int | None]:
        """All sites of the model: path -> size of the last axis there, None for attention maps.

        Found by abstract evaluation of the stages and of the decoder with boxes.
        """
        return traced_sites(self, sam)

    def attention_map(
        self, q: Float[Array, "*g m d"], k: Float[Array, "*g n d"], *biases: Float[Array, "..."]
    ) -> Float[Array, "*g m n"]:
        """The probabilities that an attention's `softmax` site sees, for any of its queries.

        Calibration builds the map anew from what the `operands` site sees, because the model may take it in parts.

        Args:
            q: queries, scaled.
            k: all keys.
            biases: what the `operands` site sees behind q, k and v; the row before the last axis is the query's. They
                are added to the scores here; an architecture whose biases are meant otherwise says so in its own.
        """
        if biases:
            return attention.attention_probabilities(q, k, functools.reduce(jnp.add, biases))
        return nn.softmax(q @ jnp.swapaxes(k, -1, -2))

    def rewritable(self, sam: Module) -> Rewritable:
        """The places where parameters can be rewritten without a change of the function."""
        del sam
        return Rewritable()

    def check(self, sam: Module, params: Params) -> None:
        """Raises InputError unless the parameters, a nested mapping, are those of the module."""
        wanted, found = self.shapes(sam), {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
        if wanted != found:
            odd = min(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
            raise InputError(
                f"params do not fit sam: the shape of {odd} is {found.get(odd)}, and {wanted.get(odd)} in sam; pass "
                "the module and the parameters of one model."
            )

    def is_encoder(self, path: str) -> bool:
        """Whether a path belongs to the encoder, so that `decode` does not read it."""
        return path.split("/")[0] not in self.decoder_parts

    def decoder(self, params: Params) -> Params:
        """The parameters that `decode` reads."""
        return {part: params[part] for part in self.decoder_parts}


class Traced(NamedTuple):
    """The shapes inside a model for one image.

    Attributes:
        seen: of what every site sees; an attention map that is made in parts has the shape of a part.
        strided: of what the encoder's modules with a stride above 1 return, by the module's path.
    """

    seen: dict[str, Shape]
    strided: dict[str, Shape]


def traced_sites(architecture: Architecture, sam: Module) -> dict[str, int | None]:
    """The sites of a model as `Architecture.sites` returns them, found by abstract evaluation."""
    seen = traced(architecture, sam).seen
    return {path: None if path.endswith("softmax") else shape[-1] for path, shape in seen.items()}


def traced(architecture: Architecture, sam: Module, boxes: int = 1) -> Traced:
    """The shapes inside a model for one image with so many boxes, found by abstract evaluation."""
    found: dict[str, Shape] = {}
    strided: dict[str, Shape] = {}
    config = sam.config

    def note(prefix: str) -> Callable[[str, Any], Any]:
        def handle(path: str, value: Any) -> Any:
            if not isinstance(value, tuple):  # an attention's operands are no tensor of their own
                found[prefix + path] = value.shape
            return value

        return handle

    def note_strided(prefix: str) -> AbstractContextManager[None]:
        def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            out = next_fun(*args, **kwargs)
            if getattr(context.module, "stride", 1) > 1 and isinstance(out, jax.Array):
                strided[prefix + "/".join(context.module.path)] = out.shape
            return out

        return nn.intercept_methods(interceptor)

    def encode(params: Params, images: jax.Array) -> Any:
        flat = flatten(params)

        def apply(stage: Stage, inputs: tuple[Any, ...]) -> Any:
            with intercept_sites(note(stage.prefix)), note_strided(stage.prefix):
                return call(stage.module, unflatten(below(stage.prefix, flat)), *inputs)

        return architecture.stages(sam).run(architecture.embed(sam, params, images), apply)

    def decode(params: Params, embedding: Any, boxes: jax.Array) -> Any:
        with intercept_sites(note("")):
            return call(sam, architecture.decoder(params), embedding, None, boxes, method="decode")

    params = jax.eval_shape(sam.init_params, jax.random.key(0))
    size = config.img_size
    embedding = jax.eval_shape(encode, params, jax.ShapeDtypeStruct((1, size, size, 3), "float32"))
    jax.eval_shape(decode, params, embedding, jax.ShapeDtypeStruct((boxes, 4), "float32"))
    return Traced(found, strided)


# ------------------------------------------------------------------------------------------------------- registry

_ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Makes a family known by its name.

    Raises:
        ValueError: if the name is another family's.
    """
    known = _ARCHITECTURES.setdefault(architecture.name, architecture)
    if type(known) is not type(architecture):
        raise ValueError(f"There are two architectures named {architecture.name!r}.")
    return known


def known_architectures() -> tuple[Architecture, ...]:
    """All families, in the order in which they were registered."""
    return tuple(_ARCHITECTURES.values())


def architecture_named(name: str) -> Architecture:
    """The family of a name, as files hold it.

    Raises:
        InputError: if there is none.
    """
    if name not in _ARCHITECTURES:
        raise InputError(f"The architecture {name!r} is unknown; known are {', '.join(sorted(_ARCHITECTURES))}.")
    return _ARCHITECTURES[name]


def architecture_of(sam: Module) -> Architecture:
    """The family that a module is of.

    Raises:
        InputError: if it is of none.
    """
    for architecture in _ARCHITECTURES.values():
        if architecture.fits(sam):
            return architecture
    raise InputError(
        f"sam is a {type(sam).__name__} and of no known architecture ({', '.join(sorted(_ARCHITECTURES))}); pass the "
        "first result of sam_flax.load_sam, or register an architecture for it."
    )


def module_of(config: Any) -> Module:
    """The module of a configuration of any known family.

    Raises:
        InputError: if it is of none.
    """
    for architecture in _ARCHITECTURES.values():
        if (module := architecture.module(config)) is not None:
            return module
    raise InputError(f"A {type(config).__name__} is the configuration of no known architecture.")


def run_on_codes(module: nn.Module) -> RunOnCodes | None:
    """The function that runs an attention module on codes; None for all other modules."""
    for architecture in _ARCHITECTURES.values():
        if type(module) in architecture.attentions:
            return architecture.attentions[type(module)]
    return None
