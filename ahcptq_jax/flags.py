"""Command-line flags made from records of settings (`ahcptq_jax.settings`), and the files that flags are read from.

A command's options are one frozen dataclass of settings. `define_flags` declares a flag for each of them, with the
setting's name, type, default, choices and help, and `values` reads them back: a new switch is one field and no line of
a command.
"""

import codecs
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from ahcptq_jax.settings import Setting, settings_of
from sam_flax.errors import InputError

# Flags belong to the module that calls `define_flags`, so that --help of its command lists them.
flags.disclaim_key_flags()

PRESETS = Path(__file__).parent / "presets"
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def define_flags(
    record: type, *, only: Iterable[str] | None = None, flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Declares a flag for every setting of a dataclass.

    Args:
        record: the dataclass.
        only: the names to declare; all by default.
        flag_values: where to declare them.
    """
    known = settings_of(record)
    for name in known if only is None else only:
        _define(known[name], flag_values)


def _define(known: Setting, flag_values: flags.FlagValues) -> None:
    arguments = (known.name, known.default)
    if known.choices:
        flags.DEFINE_enum(*arguments, list(known.choices), known.help, flag_values=flag_values)
    elif known.type is tuple:
        flags.DEFINE_multi_string(known.name, list(known.default), known.help, flag_values=flag_values)
    else:
        define: dict[type, Callable[..., Any]] = {
            bool: flags.DEFINE_bool,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            str: flags.DEFINE_string,
        }
        define[known.type](*arguments, known.help, flag_values=flag_values)


def values(record: type, flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """The parsed flags of a dataclass by name; those that were not declared keep the dataclass's default."""
    found = {}
    for field in dataclasses.fields(record):
        if field.name in flag_values:
            value = flag_values[field.name].value
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def as_lines(record: Any) -> str:
    """The settings of an instance as the lines of a flag file; those without a value are left out."""
    lines = []
    for name in settings_of(record):
        value = getattr(record, name)
        if isinstance(value, bool):
            lines.append(f"--{name}={str(value).lower()}")
        elif value is not None:
            lines += [f"--{name}={item}" for item in (value if isinstance(value, tuple) else [value])]
    return "\n".join(lines) + "\n"


def with_flag_files(arguments: Sequence[str]) -> list[str]:
    """The arguments with every `--flagfile=FILE` replaced by what is in the file.

    A flag file has one flag a line; lines that begin with # or // are comments, and a flag file may name others. It may
    be written by any editor: in UTF-8 or UTF-16, with a byte order mark or without, with either kind of line end; a
    value may stand in quotes, as on a shell's command line. (absl's own reader takes bare UTF-8 alone.) A bare name
    that is no file here is looked for among those that come with this package, in `ahcptq_jax/presets`.

    Args:
        arguments: the command line, the program's name first.

    Raises:
        InputError: if a file cannot be read or names itself.
    """
    return [*arguments[:1], *_expanded(arguments[1:], ())]


def _expanded(arguments: Sequence[str], inside: tuple[Path, ...]) -> Iterator[str]:
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if argument == "--":
            yield argument
            yield from rest
        elif name not in ("--flagfile", "-flagfile"):
            yield argument
        else:
            path = _found(Path(value if equals else next(rest, "")))
            if path in inside:
                raise InputError(f"The flag file {path} names itself with --flagfile; remove that line.")
            yield from _expanded(list(_lines(path)), (*inside, path))


def _found(path: Path) -> Path:
    """The file, or that of the same name that comes with this package."""
    preset = PRESETS / path
    return preset if len(path.parts) == 1 and not path.exists() and preset.is_file() else path


def _lines(path: Path) -> Iterator[str]:
    """The flags in a file, without comments and without the quotes around values."""
    for line in _text(path).splitlines():
        line = line.strip().lstrip("\ufeff")
        if line and not line.startswith(("#", "//")):
            name, equals, value = line.partition("=")
            if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
                value = value[1:-1]
            yield name + equals + value


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"The flag file {path} cannot be read ({error.strerror}); give an existing file with --flagfile, or one of "
            f"{', '.join(sorted(preset.name for preset in PRESETS.glob('*.flags')))}."
        ) from error
    encoding, skip = next(((name, len(mark)) for mark, name in _MARKS.items() if data.startswith(mark)), ("", 0))
    if not encoding:
        # UTF-16 without a mark: every second byte of ASCII text is zero, and no flag has a zero byte.
        encoding = "utf-8" if b"\0" not in data else "utf-16-le" if data[1:2] == b"\0" else "utf-16-be"
    try:
        # File names that are not UTF-8 pass through, as on the command line.
        return data[skip:].decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The flag file {path} is not text ({error.reason}); save it as UTF-8, one --flag a line."
        ) from error
