"""Flags made from settings, and flag files as editors of all kinds write them."""

import codecs
import dataclasses
import os
from pathlib import Path

import pytest
from absl import flags

from ahcptq_jax.flags import as_lines, define_flags, values, with_flag_files
from ahcptq_jax.settings import at_least, setting
from sam_flax.errors import InputError

CASES = Path(__file__).parents[3] / "shared" / "cases"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    count: int = setting(3, "A whole number.", check=at_least(1))
    rate: float | None = setting(None, "A number.", type=float)
    on: bool = setting(True, "A switch.")
    kind: str = setting("a", "A choice.", choices=("a", "b"))
    name: str = setting("", "A text.")
    many: tuple[str, ...] = setting((), "Texts.")
    elsewhere: int = 7  # no setting, and so no flag


def parsed(*arguments: str, only: list[str] | None = None) -> Record:
    found = flags.FlagValues()
    define_flags(Record, only=only, flag_values=found)
    found(["command", *arguments])
    return Record(**values(Record, found))


def test_a_flag_for_every_setting_with_its_default_type_and_choices() -> None:
    assert parsed() == Record()
    given = parsed("--count=5", "--rate=1e-3", "--noon", "--kind=b", "--name=x y", "--many=1", "--many=2")
    assert given == Record(count=5, rate=1e-3, on=False, kind="b", name="x y", many=("1", "2"))
    for wrong in ("--count=x", "--rate=x", "--kind=c", "--elsewhere=1", "--other=1"):
        with pytest.raises(flags.Error):
            parsed(wrong)
    with pytest.raises(flags.Error):
        parsed("--rate=1", only=["count"])


def test_lines_give_the_same_record_again() -> None:
    record = Record(count=5, rate=0.25, on=False, kind="b", name="a=b c", many=("x", "y"))
    assert parsed(*as_lines(record).splitlines()) == record
    assert "rate" not in as_lines(Record()), "what has no value has no line"


TEXT = "# comment\n// comment\n\n--count=5\r\n  --name=\"x y\"\n--kind='b'\n--on=false\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", [False, True])
def test_flag_files_of_any_editor(tmp_path: Path, encoding: str, mark: bool) -> None:
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    path = tmp_path / "a.flags"
    path.write_bytes((marks.get(encoding, b"") if mark else b"") + TEXT.encode(encoding))
    expected = ["--count=5", "--name=x y", "--kind=b", "--on=false"]
    assert with_flag_files(["c", f"--flagfile={path}", "--rate=2"]) == ["c", *expected, "--rate=2"]
    assert with_flag_files(["c", "--flagfile", str(path)]) == ["c", *expected]


def test_flag_files_name_others_but_not_themselves(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.write_text("--count=2\n")
    first.write_text(f"--name=a\n--flagfile={second}\n--kind=b\n")
    assert with_flag_files(["c", f"--flagfile={first}"]) == ["c", "--name=a", "--count=2", "--kind=b"]
    second.write_text(f"--flagfile={first}\n")
    with pytest.raises(InputError, match="names itself"):
        with_flag_files(["c", f"--flagfile={first}"])


def test_what_is_no_flag_file_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(codecs.BOM_UTF16_LE + b"-\0-")
    for name, part in (("none", "No such file"), (".", "directory"), ("odd", "not text")):
        with pytest.raises(InputError, match=part):
            with_flag_files(["c", f"--flagfile={tmp_path / name}"])
    assert with_flag_files(["c", "--", "--flagfile=none"]) == ["c", "--", "--flagfile=none"]


def test_file_names_that_are_not_utf8_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.flags"
    path.write_bytes(b"--name=caf\xe9\n")
    (argument,) = with_flag_files(["c", f"--flagfile={path}"])[1:]
    assert os.fsencode(argument) == b"--name=caf\xe9"


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the files of real reports are not at {CASES}")
@pytest.mark.parametrize("name", ["utf16.flags", "bom.flags"])
def test_files_of_real_reports(name: str) -> None:
    expected = ["--method=fp", "--num_scenes=1", "--noblank"]
    assert with_flag_files(["c", f"--flagfile={CASES / name}"]) == ["c", *expected]


def test_a_preset_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = with_flag_files(["c", "--flagfile=w4a4.flags"])
    assert "--w_bits=4" in shipped and "--method=ahcptq" in shipped
    (tmp_path / "w4a4.flags").write_text("--name=mine\n")
    assert with_flag_files(["c", "--flagfile=w4a4.flags"]) == ["c", "--name=mine"]
    with pytest.raises(InputError, match="or one of w4a4.flags, w5a5.flags, w6a6.flags"):
        with_flag_files(["c", "--flagfile=w9a9.flags"])
