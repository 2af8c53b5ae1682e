"""The command line's flags, and the frozen record that the code behind it takes instead of global state."""

import dataclasses
from typing import Any, get_args

from absl import flags

from ahcptq_jax.config import ACT_RANGES, METHODS, QuantConfig
from ahcptq_jax.methods import RECONSTRUCTION_METHODS
from ahcptq_jax.quantizers.searches.grouping import METRICS
from ahcptq_jax.reconstruction.learning import ReconstructionConfig
from ahcptq_jax.reconstruction.units import GRANULARITIES
from sam_flax.sam import Precision

# Fields of `Options` that are switches of `QuantConfig`, where they are given.
_SWITCHES = (
    *("hluq", "cag", "big", "agq", "groups", "group_metric", "hluq_fine", "hluq_reach_maximum"),
    *("act_range", "weight_search", "hluq_rows", "softmax_rows"),
)
# Generated scenes to evaluate on.
SPLITS = ("val", "train")
PRECISIONS = get_args(Precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One run of `experiments.main`; see the flags of the same names."""

    checkpoint: str = "mini"
    images: str = ""
    annotations: str = ""
    calib_images: str = ""
    calib_annotations: str = ""
    boxes: str = "gt"
    artefact: str = ""
    method: str = "ahcptq"
    w_bits: int = 4
    a_bits: int = 4
    hluq: bool | None = None
    cag: bool | None = None
    big: bool | None = None
    agq: bool | None = None
    groups: int | None = None
    hluq_rows: int | None = None
    softmax_rows: int | None = None
    group_metric: str | None = None
    hluq_fine: bool | None = None
    hluq_reach_maximum: bool | None = None
    act_range: str | None = None
    weight_search: bool | None = None
    iterations: int = 0
    rounding_rate: float | None = None
    scale_rate: float | None = None
    granularity: str = "part"
    loss_power: float = 2.0
    harder: float = 0.0
    precision: Precision = "float32"
    num_calib: int = 32
    num_scenes: int = 100
    scenes: str = "val"
    limit: int = 0
    blank: bool = True
    seed: int = 0
    out: str = "runs/main"

    def __post_init__(self) -> None:
        for images, annotations in (("images", "annotations"), ("calib_images", "calib_annotations")):
            if bool(getattr(self, images)) != bool(getattr(self, annotations)):
                raise ValueError(f"--{images} and --{annotations} belong together; give both or neither.")
        if self.scenes not in SPLITS:
            raise ValueError(f"--scenes={self.scenes} is unknown; choose one of {', '.join(SPLITS)}.")
        if self.method not in ("fp", *METHODS):
            raise ValueError(f"--method={self.method} is unknown; choose one of fp, {', '.join(METHODS)}.")
        for name, least in (("num_calib", 1), ("num_scenes", 1), ("limit", 0), ("seed", 0), ("iterations", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {least}; give a larger number.")
        for name in ("checkpoint", "boxes", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; leave it out for {getattr(type(self), name)!r}.")
        if self.artefact and self.method == "fp":
            raise ValueError("--artefact is a quantized model and --method=fp evaluates none; leave one of them out.")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"--granularity={self.granularity} is unknown; choose one of {', '.join(GRANULARITIES)}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"--precision={self.precision} is unknown; choose one of {', '.join(PRECISIONS)}.")
        if not 0 <= self.harder <= 4:
            raise ValueError(f"--harder={self.harder} must lie in 0..4; 0 leaves the model as it is.")
        if self.boxes != "gt" and not self.images:
            raise ValueError(
                f"--boxes={self.boxes} names a detector's results, which need the --images and --annotations that "
                "they were made for; give those, or --boxes=gt."
            )
        if self.method != "fp":
            # Raise on bad numbers.
            self.quant_config()
            self.reconstruction_config()

    def quant_config(self) -> QuantConfig:
        """The method's switches, with those given on the command line on top."""
        switches: dict[str, Any] = dict(METHODS[self.method])
        switches |= {name: getattr(self, name) for name in _SWITCHES if getattr(self, name) is not None}
        return QuantConfig(w_bits=self.w_bits, a_bits=self.a_bits, seed=self.seed, **switches)

    def reconstruction_config(self) -> ReconstructionConfig | None:
        """How the method learns; None if it takes statistics alone, by its nature or with `iterations` 0."""
        if self.method not in RECONSTRUCTION_METHODS or not self.iterations:
            return None
        return RECONSTRUCTION_METHODS[self.method].reconstruction_config(
            iterations=self.iterations,
            rounding_rate=self.rounding_rate,
            scale_rate=self.scale_rate,
            granularity=self.granularity,
            loss_power=self.loss_power,
            seed=self.seed,
        )

    def model_name(self) -> str:
        """What is quantized, for titles and tables."""
        name = "MINI" if self.checkpoint == "mini" else self.checkpoint.replace("\\", "/").rsplit("/", 1)[-1]
        return f"{name}, harder by {self.harder:g}" if self.harder else name


def define_flags() -> None:
    """Defines every flag of `Options`, with its defaults."""
    d = Options()
    flags.DEFINE_string("checkpoint", d.checkpoint, "SAM weights: 'mini', an official .pth, or .safetensors.")
    flags.DEFINE_string("images", d.images, "COCO image folder to evaluate on; default: generated scenes.")
    flags.DEFINE_string("annotations", d.annotations, "Its COCO instances JSON.")
    flags.DEFINE_string("calib_images", d.calib_images, "COCO image folder to calibrate on; default: scenes.")
    flags.DEFINE_string("calib_annotations", d.calib_annotations, "Its COCO instances JSON.")
    flags.DEFINE_string("boxes", d.boxes, "'gt', or a COCO results JSON of a detector, as box prompts.")
    flags.DEFINE_string("artefact", d.artefact, "A quantized.safetensors to evaluate in place of quantizing.")
    flags.DEFINE_enum("method", d.method, ["fp", *METHODS], "Quantization method; 'fp' evaluates the float model.")
    flags.DEFINE_integer("w_bits", d.w_bits, "Bits of weights, 2 to 8.")
    flags.DEFINE_integer("a_bits", d.a_bits, "Bits of activations, 2 to 8.")
    flags.DEFINE_bool("hluq", d.hluq, "Override the method: hybrid log-uniform inputs of second linears.")
    flags.DEFINE_bool("cag", d.cag, "Override the method: channel groups at projections and first linears.")
    flags.DEFINE_bool("big", d.big, "Override the method: sign flips of bimodal keys.")
    flags.DEFINE_bool("agq", d.agq, "Override the method: log2 softmax.")
    flags.DEFINE_integer("groups", d.groups, "Override the method: CAG groups; 0 keeps every channel alone.")
    flags.DEFINE_integer("hluq_rows", d.hluq_rows, "Tokens per image in the breakpoint search (2048); 0 takes all.")
    flags.DEFINE_integer("softmax_rows", d.softmax_rows, "Queries per head in the softmax search (512); 0 takes all.")
    flags.DEFINE_enum("group_metric", d.group_metric, list(METRICS), "Override the method: what CAG's k-means sees.")
    flags.DEFINE_bool("hluq_fine", d.hluq_fine, "Override the method: a finer search of HLUQ's breakpoint.")
    flags.DEFINE_bool("hluq_reach_maximum", d.hluq_reach_maximum, "Override: HLUQ's last code is the maximum.")
    flags.DEFINE_enum(
        "act_range", d.act_range, list(ACT_RANGES), "Override the method: how uniform ranges of activations are found."
    )
    flags.DEFINE_bool("weight_search", d.weight_search, "Override the method: search the ranges of weights.")
    flags.DEFINE_integer(
        "iterations",
        d.iterations,
        "Reconstruction: iterations for each attention, MLP and neck; 0 calibrates only. The paper's number is 20000. "
        f"Learn: {', '.join(RECONSTRUCTION_METHODS)}; the other methods take statistics alone and ignore it.",
    )
    flags.DEFINE_float("rounding_rate", d.rounding_rate, "Learning rate of the rounding; default: by the iterations.")
    flags.DEFINE_float("scale_rate", d.scale_rate, "Learning rate of activation scales; default: by the iterations.")
    flags.DEFINE_enum(
        "granularity", d.granularity, list(GRANULARITIES), "Reconstruction: parts of encoder blocks, or blocks whole."
    )
    flags.DEFINE_float("loss_power", d.loss_power, "Reconstruction: power of the errors of outputs; the paper's is 2.")
    flags.DEFINE_float(
        "harder", d.harder, "Strength 0 to 4 of a change to the model that computes the same and quantizes worse."
    )
    flags.DEFINE_enum(
        "precision",
        d.precision,
        list(PRECISIONS),
        "Of the floating-point model's matrix products in its evaluation, on devices that have a choice. The quantized "
        "model's products are exact, and what is learned is learned in float32.",
    )
    flags.DEFINE_integer("num_calib", d.num_calib, "Calibration images.")
    flags.DEFINE_integer("num_scenes", d.num_scenes, "Generated scenes to evaluate on, without --images.")
    flags.DEFINE_enum(
        "scenes",
        d.scenes,
        list(SPLITS),
        "Which of them: 'val', for results; 'train', held back from those for calibration, to choose settings by.",
    )
    flags.DEFINE_integer("limit", d.limit, "Evaluate the first images only; 0 takes all.")
    flags.DEFINE_bool("blank", d.blank, "Also score blank images: what the boxes alone give away.")
    flags.DEFINE_integer("seed", d.seed, "Seed of the choice of calibration images and of subsampling.")
    flags.DEFINE_string("out", d.out, "Folder for results.json, flags.txt and report.html.")


def options_from_flags() -> Options:
    """The parsed flags as `Options`.

    Raises:
        ValueError: if they contradict each other.
    """
    values: dict[str, Any] = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Options)}
    return Options(**values)
