"""The command's flags, and how it takes the flag files of the main job."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from ahcptq_jax.config import METHODS, QuantConfig
from hwcost.board.accelerator import PRESETS, Accelerator
from hwcost.board.constants import Constants, with_values
from hwcost.board.cycles import Dataflow
from sam_flax.config import CONFIGS
from sam_flax.errors import InputError

SWITCHES = ("hluq", "cag", "agq", "groups")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One run of `python -m hwcost`; see the flags of the same names."""

    model: str = "vit_l"
    device: str = "zcu102"
    w_bits: int = 4
    a_bits: int = 4
    method: str = "ahcptq"
    hluq: bool | None = None
    cag: bool | None = None
    agq: bool | None = None
    groups: int | None = None
    prompts: int = 1
    dataflow: Dataflow = "os"
    side: int = 32
    overlap: bool = True
    constant: tuple[str, ...] = ()
    results: str = ""
    artefact: str = ""
    images: str = ""
    report: str = ""
    json: str = ""

    def __post_init__(self) -> None:
        for name, known in (("model", CONFIGS), ("device", PRESETS), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise InputError(f"--{name}={getattr(self, name)} is unknown; choose one of {', '.join(known)}.")
        if self.prompts < 1:
            raise InputError(f"--prompts={self.prompts} must be at least 1.")
        if self.results and self.artefact:
            raise InputError("--results and --artefact both give code histograms; leave one of them out.")
        if self.artefact and not self.images:
            raise InputError("--artefact needs --images=FOLDER, photographs on which its codes are counted.")
        self.quant_config(), self.accelerator(), self.constants()  # raise on bad values

    def quant_config(self) -> QuantConfig:
        """The method's switches with those of the flags on top."""
        switches: dict[str, Any] = dict(METHODS[self.method])
        switches |= {name: getattr(self, name) for name in SWITCHES if getattr(self, name) is not None}
        return QuantConfig(w_bits=self.w_bits, a_bits=self.a_bits, **switches)

    def accelerator(self) -> Accelerator:
        """The board as it is to be used."""
        preset = PRESETS[self.device]
        return dataclasses.replace(preset, dataflow=self.dataflow, side=self.side, overlap=self.overlap)

    def constants(self) -> Constants:
        """The constants with those of the flags fixed."""
        pairs: dict[str, float] = {}
        for item in self.constant:
            name, _, value = item.partition("=")
            try:
                pairs[name] = float(value)
            except ValueError:
                raise InputError(f"--constant={item} must be NAME=NUMBER, such as clock_mhz=250.") from None
        return with_values(pairs)

    def folder(self, title: str) -> Path:
        """Where the page, the table of layers and the JSON go."""
        return Path(self.report or f"runs/hwcost/{title.replace(' ', '_').replace('(', '').replace(')', '')}")


def define_flags() -> None:
    """Defines every flag of `Options`, with its defaults."""
    d = Options()
    flags.DEFINE_enum("model", d.model, list(CONFIGS), "Which SAM.")
    flags.DEFINE_enum("device", d.device, list(PRESETS), "FPGA board.")
    flags.DEFINE_integer("w_bits", d.w_bits, "Bits of weights, 2 to 8.")
    flags.DEFINE_integer("a_bits", d.a_bits, "Bits of activations, 2 to 8.")
    flags.DEFINE_enum("method", d.method, list(METHODS), "Quantization method: which codes there are.")
    flags.DEFINE_bool("hluq", d.hluq, "Override the method: hybrid log-uniform inputs of second linears.")
    flags.DEFINE_bool("cag", d.cag, "Override the method: channel groups at projections and first linears.")
    flags.DEFINE_bool("agq", d.agq, "Override the method: log2 softmax.")
    flags.DEFINE_integer("groups", d.groups, "Override the method: CAG groups; 0 keeps every channel alone.")
    flags.DEFINE_integer("prompts", d.prompts, "Boxes decoded for each image.")
    flags.DEFINE_enum("dataflow", d.dataflow, ["os", "ws", "is"], "What stays in the array: outputs, weights, inputs.")
    flags.DEFINE_integer("side", d.side, "Rows and columns of a core of the array.")
    flags.DEFINE_bool("overlap", d.overlap, "Fill a fold while the one before drains; off is SCALE-Sim's formula.")
    flags.DEFINE_multi_string("constant", [], "NAME=NUMBER: fix one constant; may be repeated.")
    flags.DEFINE_string("results", d.results, "results.json of a quantized run: its measured code_histograms.")
    flags.DEFINE_string("artefact", d.artefact, "quantized.safetensors: its model, bits, and codes on --images.")
    flags.DEFINE_string("images", d.images, "Folder of photographs for --artefact; the first eight are used.")
    flags.DEFINE_string("report", d.report, "Folder of report.html, layers.csv and hwcost.json; default runs/hwcost/….")
    flags.DEFINE_string("json", d.json, "Where the JSON goes, instead of into that folder.")


def options_from_flags() -> Options:
    """The parsed flags as `Options`.

    Raises:
        InputError: if they contradict each other.
    """
    values: dict[str, Any] = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Options)}
    values["constant"] = tuple(values["constant"])
    return Options(**values)


def with_foreign_flags(arguments: Sequence[str]) -> list[str]:
    """The arguments, with what a flag file of the main job sets and this command does not know declared harmless.

    Unknown flags on the command line itself stay errors.
    """
    files = [a for a in arguments[1:] if a.split("=")[0] in ("--flagfile", "-flagfile")]
    own = {_name(a) for a in arguments[1:] if a not in files}
    inside = flags.FLAGS.read_flags_from_files([arguments[0], *files])[1:]
    foreign = sorted({_name(a) for a in inside} - own - set(flags.FLAGS) - {""})
    return [*arguments, f"--undefok={','.join(foreign)}"] if foreign else list(arguments)


def _name(argument: str) -> str:
    """The flag that an argument sets, "" for a value."""
    return argument.lstrip("-").split("=")[0] if argument.startswith("-") else ""
