"""One run of the main job as a frozen record, from which the command line's flags are made."""

import dataclasses
import math
from pathlib import PurePosixPath
from typing import Any, get_args

from ahcptq_jax.config import METHODS, QuantConfig
from ahcptq_jax.methods import RECONSTRUCTION_METHODS
from ahcptq_jax.mixed import parse_budget
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.runtime.products import CARRIERS, Carrier
from ahcptq_jax.settings import Check, Setting, at_least, between, check_settings, setting, settings_of
from ahcptq_jax.transforms.harder import WAYS
from experiments.job.protocol import EvaluationProtocol
from sam_flax.errors import InputError
from sam_flax.files.writing import printable_path
from sam_flax.sam import Precision

# Generated scenes to evaluate on.
SPLITS = ("val", "train")
PRECISIONS: tuple[str, ...] = get_args(Precision)
FLOAT = "fp"  # the method that quantizes nothing
# Room for the generated scenes that are held back for `--scenes=train`.
MOST_SCENES = 1_000_000
# Settings of the two configurations that a run has under its own name, or that have no value on a command line.
_OWN = ("w_bits", "a_bits", "iterations", "seed")


def _overridable(record: type) -> dict[str, Setting]:
    """The settings of a configuration that a run may override: those that a table of methods may switch or set."""
    return {
        name: known
        for name, known in settings_of(record).items()
        if known.sweep and name not in _OWN and known.type is not tuple
    }


_QUANTIZATION, _RECONSTRUCTION = _overridable(QuantConfig), _overridable(ReconstructionConfig)
assert not _QUANTIZATION.keys() & _RECONSTRUCTION.keys()


def _override(known: Setting) -> tuple[str, Any, Any]:
    """A field like a configuration's, but without a value: it is then the method's."""
    value = f"{known.default:g}" if isinstance(known.default, float) else known.default
    default = "" if known.default is None else f" Default: the method's ({value} in ahcptq)."
    made = setting(None, f"{known.help}{default}", type=known.type, choices=known.choices, check=known.check)
    return known.name, known.type | None, made


# The settings of both configurations, each as it is declared there. Typed as Any, since no checker knows their names.
_Overrides: Any = dataclasses.make_dataclass(
    "_Overrides",
    [_override(known) for known in (_QUANTIZATION | _RECONSTRUCTION).values()],
    kw_only=True,
    frozen=True,
)


def _bits(name: str) -> Any:
    known = settings_of(QuantConfig)[name]
    return setting(known.default, known.help, check=known.check, sweep=False)


def _own(default: Any, help: str, **known: Any) -> Any:
    """A setting of the run itself, which holds for all methods of a sweep."""
    return setting(default, help, sweep=False, **known)


def _is_three_numbers(text: str) -> bool:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return False
    return len(numbers) == 3 and all(map(math.isfinite, numbers))


_BLOCKS = Check(
    lambda text: all(part.strip().isdecimal() for part in text.split(",")), "numbers of blocks, like 2,5,8,11"
)
_COLOUR = Check(_is_three_numbers, "three numbers for red, green and blue, like 123.675,116.28,103.53")
_COUNT = at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EvaluationProtocol, _Overrides):
    """One run of `experiments.main`; the fields are its flags, and `--help` says what each is.

    To them come all settings of `QuantConfig` and `ReconstructionConfig` that a run may override, by the same names;
    None leaves the value to the method. The evaluation's protocol is among them, too.

    Raises:
        InputError: if a value is none of its setting, or two contradict each other.
    """

    checkpoint: str = _own(
        "mini", "SAM weights: 'mini' or 'mini-scenes', which ship, an official .pth, or .safetensors."
    )
    decoder_num_heads: int | None = _own(
        None,
        "Heads of the checkpoint's mask decoder, which its tensors do not say; a published SAM has 8.",
        type=int,
        check=_COUNT,
    )
    img_size: int | None = _own(
        None,
        "Side of the canvas in pixels, for a model that is to run at another size than its positions are for, which "
        "are then interpolated.",
        type=int,
        check=_COUNT,
    )
    global_attn_indexes: str | None = _own(
        None,
        "Encoder blocks that attend globally, like 2,5,8,11, where the checkpoint does not show which they are.",
        type=str,
        check=_BLOCKS,
    )
    pixel_mean: str | None = _own(
        None,
        "Mean colour that the checkpoint was trained with, if not SAM's own: three numbers, R,G,B in 0..255.",
        type=str,
        check=_COLOUR,
    )
    pixel_std: str | None = _own(
        None, "Deviation of colours that the checkpoint was trained with, if not SAM's own.", type=str, check=_COLOUR
    )
    images: str = _own("", "COCO image folder to evaluate on; default: generated scenes.")
    annotations: str = _own("", "Its COCO instances JSON.")
    calib_images: str = _own("", "COCO image folder to calibrate on; default: scenes.")
    calib_annotations: str = _own("", "Its COCO instances JSON.")
    boxes: str = _own("gt", "'gt', or a COCO results JSON of a detector, as box prompts.")
    artefact: str = _own("", "A quantized.safetensors to evaluate in place of quantizing.")
    method: str = _own(
        "ahcptq", "Quantization method; 'fp' evaluates the floating-point model alone.", choices=(FLOAT, *METHODS)
    )
    w_bits: int = _bits("w_bits")
    a_bits: int = _bits("a_bits")
    iterations: int = setting(
        0,
        "Reconstruction: iterations for each attention, MLP and neck; 0 calibrates only. The paper's number is 20000. "
        f"Learn: {', '.join(RECONSTRUCTION_METHODS)}; the other methods take statistics alone and ignore it.",
        check=at_least(0),
    )
    harder: float = setting(
        0.0,
        "Strength 0 to 4 of a change to the model that computes the same and quantizes worse; 0 leaves it as it is.",
        check=between(0, 4),
    )
    harder_way: str = setting("all", "What is made harder, if anything.", choices=WAYS)
    precision: Precision = _own(
        "float32",
        "Of the floating-point model's matrix products in its evaluation, on devices that have a choice. The quantized "
        "model's products are exact, and what is learned is learned in float32.",
        choices=PRECISIONS,
    )
    carrier: Carrier = _own(
        "int8",
        "What carries the products of the quantized model in its evaluation; the results are the same bits. int8 with "
        "int32 sums is what CPUs, GPUs and TPUs have units for; float32 is for devices without.",
        choices=CARRIERS,
    )
    num_calib: int = _own(32, "Calibration images.", check=_COUNT)
    num_scenes: int = _own(100, "Generated scenes to evaluate on, without --images.", check=between(1, MOST_SCENES))
    scenes: str = _own(
        "val",
        "Which of them: 'val', for results; 'train', held back from those for calibration, to choose settings by.",
        choices=SPLITS,
    )
    limit: int = _own(0, "Evaluate the first images only; 0 takes all.", check=at_least(0))
    blank: bool = _own(True, "Also score blank images: what the boxes alone give away.")
    seed: int = _own(0, "Seed of the choice of calibration images and of subsampling.", check=between(0, 2**31 - 2))
    out: str = _own("runs/main", "Folder for results.json, flags.txt and report.html.")

    def __post_init__(self) -> None:
        try:
            check_settings(self)
        except InputError as error:
            # Its first word is the setting's name, which is the flag's.
            raise InputError(f"--{error}") from None
        for images, annotations in (("images", "annotations"), ("calib_images", "calib_annotations")):
            if bool(getattr(self, images)) != bool(getattr(self, annotations)):
                raise InputError(f"--{images} and --{annotations} belong together; give both or neither.")
        for name in ("checkpoint", "boxes", "out"):
            if not getattr(self, name):
                raise InputError(f"--{name} is empty; leave it out for {getattr(type(self), name)!r}.")
        if self.artefact and self.method == FLOAT:
            raise InputError("--artefact is a quantized model and --method=fp evaluates none; leave one of them out.")
        if self.boxes != "gt" and not self.images:
            raise InputError(
                f"--boxes={self.boxes} names a detector's results, which need the --images and --annotations that "
                "they were made for; give those, or --boxes=gt."
            )
        if self.method != FLOAT:
            # Raise where settings contradict each other.
            if (config := self.quant_config()).budget:
                parse_budget(config.budget)
            self.reconstruction_config()

    def quant_config(self) -> QuantConfig:
        """The method's switches, with those given on the command line on top."""
        switches = dict(METHODS[self.method]) | self._given(_QUANTIZATION)
        return QuantConfig(w_bits=self.w_bits, a_bits=self.a_bits, seed=self.seed, **switches)

    def reconstruction_config(self) -> ReconstructionConfig | None:
        """How the method learns; None if it takes statistics alone, by its nature or with `iterations` 0."""
        if self.method not in RECONSTRUCTION_METHODS or not self.iterations:
            return None
        given = self._given(_RECONSTRUCTION)
        return RECONSTRUCTION_METHODS[self.method].reconstruction_config(
            iterations=self.iterations, seed=self.seed, **given
        )

    def _given(self, names: dict[str, Setting]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def given(self) -> dict[str, Any]:
        """All settings that have a value, by name: what `results.json` and `flags.txt` keep of them."""
        return {name: value for name in settings_of(self) if (value := getattr(self, name)) is not None}

    def without_needless(self) -> "Options":
        """The same run without the overrides that change nothing, so that equal runs are equal records."""
        if self.method == FLOAT:
            return self
        options = self
        for name in self._given(_QUANTIZATION | _RECONSTRUCTION):
            nothing: Any = {name: None}
            less = dataclasses.replace(options, **nothing)
            wanted, found = ((run.quant_config(), run.reconstruction_config()) for run in (options, less))
            options = less if found == wanted else options
        return options

    def known_of_checkpoint(self) -> dict[str, Any]:
        """What the flags say of the checkpoint, as arguments of `load_sam`; only what is given."""
        known: dict[str, Any] = {"decoder_num_heads": self.decoder_num_heads, "img_size": self.img_size}
        for name, number in (("global_attn_indexes", int), ("pixel_mean", float), ("pixel_std", float)):
            text = getattr(self, name)
            known[name] = None if text is None else tuple(number(part) for part in text.split(","))
        return {name: value for name, value in known.items() if value is not None}

    def protocol(self) -> EvaluationProtocol:
        """How masks are asked for and ranked."""
        return EvaluationProtocol(**self.as_dict())

    def model_name(self) -> str:
        """What is quantized, for titles and tables."""
        file = PurePosixPath(self.checkpoint.replace("\\", "/")).name
        name = "MINI" if self.checkpoint == "mini" else printable_path(file)
        if not self.harder:
            return name
        way = "" if self.harder_way == "all" else f" ({self.harder_way})"
        return f"{name}, harder by {self.harder:g}{way}"


def switches() -> dict[str, Setting]:
    """The settings that a sweep's methods may switch or set."""
    return {name: known for name, known in settings_of(Options).items() if known.sweep}
