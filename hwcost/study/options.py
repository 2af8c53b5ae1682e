"""One run of the command as a frozen record, from which its flags are made; how the main job's flag files are taken."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from ahcptq_jax.config import METHODS, QuantConfig
from ahcptq_jax.flags import values, with_flag_files
from ahcptq_jax.settings import at_least, check_settings, setting, settings_of
from hwcost.board.accelerator import PRESETS, Accelerator
from hwcost.board.constants import Constants, with_values
from hwcost.board.cycles import Dataflow
from sam_flax.config import CONFIGS
from sam_flax.errors import InputError

# The switches of a method that change what is counted.
SWITCHES = ("hluq", "cag", "agq", "groups", "grid_bits")


def _like(record: type, name: str) -> Any:
    """A field that is a setting of another record, declared there."""
    known = settings_of(record)[name]
    return setting(known.default, known.help, choices=known.choices, check=known.check)


def _switch(name: str, default: str = "the method's") -> Any:
    """A field like a setting of `QuantConfig`, but without a value: `default` says what it is then."""
    known = settings_of(QuantConfig)[name]
    return setting(None, f"{known.help} Default: {default}.", type=known.type, choices=known.choices, check=known.check)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One run of `python -m hwcost`; the fields are its flags, and `--help` says what each is.

    Raises:
        InputError: if a value is none of its setting, or two contradict each other.
    """

    model: str = setting("vit_l", "Which SAM.", choices=tuple(CONFIGS))
    device: str = setting("zcu102", "FPGA board.", choices=tuple(PRESETS))
    w_bits: int = _like(QuantConfig, "w_bits")
    a_bits: int = _like(QuantConfig, "a_bits")
    method: str = setting("ahcptq", "Quantization method: which codes there are.", choices=tuple(METHODS))
    hluq: bool | None = _switch("hluq")
    cag: bool | None = _switch("cag")
    agq: bool | None = _switch("agq")
    groups: int | None = _switch("groups")
    grid_bits: int | None = _switch(
        "grid_bits", "the method's or the artefact's. Either form is shown beside the other"
    )
    prompts: int = setting(1, "Boxes decoded for each image.", check=at_least(1))
    dataflow: Dataflow = _like(Accelerator, "dataflow")
    side: int = _like(Accelerator, "side")
    overlap: bool = _like(Accelerator, "overlap")
    constant: tuple[str, ...] = setting((), "NAME=NUMBER: fix one constant; may be repeated.")
    results: str = setting("", "results.json of a quantized run: its measured code_histograms.")
    artefact: str = setting("", "quantized.safetensors: its model, bits, and codes on --images.")
    images: str = setting("", "Folder of photographs for --artefact; the first eight are used.")
    report: str = setting("", "Folder of report.html, layers.csv and hwcost.json; default runs/hwcost/….")
    json: str = setting("", "Where the JSON goes, instead of into that folder.")

    def __post_init__(self) -> None:
        try:
            check_settings(self)
        except InputError as error:
            # Its first word is the setting's name, which is the flag's.
            raise InputError(f"--{error}") from None
        if self.results and self.artefact:
            raise InputError("--results and --artefact both give code histograms; leave one of them out.")
        if self.artefact and not self.images:
            raise InputError("--artefact needs --images=FOLDER, photographs on which its codes are counted.")
        self.constants()  # raises on an unknown name or an impossible number

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


def options_from_flags() -> Options:
    """The parsed flags as `Options`.

    Raises:
        InputError: if they contradict each other.
    """
    return Options(**values(Options))


def with_foreign_flags(arguments: Sequence[str]) -> list[str]:
    """The arguments, with what a flag file of the main job sets and this command does not know declared harmless.

    Unknown flags on the command line itself stay errors.

    Raises:
        InputError: if a flag file cannot be read.
    """
    own = {_name(a) for a in arguments[1:] if _name(a) != "flagfile"}
    expanded = with_flag_files(arguments)
    foreign = sorted({_name(a) for a in expanded[1:]} - own - set(flags.FLAGS) - {""})
    return [*expanded, f"--undefok={','.join(foreign)}"] if foreign else expanded


def _name(argument: str) -> str:
    """The flag that an argument sets, "" for a value."""
    return argument.lstrip("-").split("=")[0] if argument.startswith("-") else ""
