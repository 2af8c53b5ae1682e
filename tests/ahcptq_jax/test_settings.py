"""Settings: what is declared once is checked, normalised and found again."""

import dataclasses
import json

import numpy as np
import pytest

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.settings import at_least, check_settings, setting, settings_of
from sam_flax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Record:
    """One setting of each type, and a field that is none."""

    count: int = setting(3, "A count.", check=at_least(1))
    rate: float = setting(0.5, "A rate.")
    maybe: float | None = setting(None, "A rate, if any.", type=float)
    name: str = setting("a", "A name.", choices=("a", "b"))
    on: bool = setting(True, "A switch.", sweep=False)
    plain: int = 0

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize("record", [QuantConfig(), ReconstructionConfig(), Record()], ids=lambda r: type(r).__name__)
def test_numpy_values_become_python_values_that_serialize_and_hash_alike(record):
    """Of every setting of every record: a NumPy value of its type is the Python value."""
    as_numpy = {int: np.int64, float: np.float64, bool: np.bool_, str: np.str_}
    values = {
        name: as_numpy[known.type](getattr(record, name))
        for name, known in settings_of(record).items()
        if known.type in as_numpy and getattr(record, name) is not None
    }
    other = type(record)(**values)
    assert other == record and hash(other) == hash(record)
    assert json.dumps(dataclasses.asdict(other)) == json.dumps(dataclasses.asdict(record))
    assert all(type(getattr(other, name)) is settings_of(record)[name].type for name in values)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"count": 0}, "count=0 must be at least 1."),
        ({"count": 1.0}, "count=1.0 must be a whole number."),
        ({"count": True}, "count=True must be a whole number."),
        ({"count": np.bool_(True)}, "must be a whole number."),
        ({"count": None}, "count=None must be a whole number."),
        ({"rate": "x"}, "rate='x' must be a number."),
        ({"maybe": "x"}, "maybe='x' must be a number, or None."),
        ({"name": "c"}, "name='c' is unknown; choose one of a, b."),
        ({"on": 1}, "on=1 must be True or False."),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(changes, sentence):
    with pytest.raises(InputError) as error:
        Record(**changes)
    assert str(error.value).endswith(sentence)


def test_settings_are_found_with_their_names_and_what_they_say():
    known = settings_of(Record)
    assert list(known) == ["count", "rate", "maybe", "name", "on"]
    assert known["name"].choices == ("a", "b") and known["maybe"].type is float and not known["on"].sweep
    assert settings_of(Record()) == known


@pytest.mark.parametrize("record", [QuantConfig, ReconstructionConfig])
def test_every_field_of_the_configurations_is_a_setting_with_a_sentence(record):
    known = settings_of(record)
    # Rules and transforms are data, which no flag and no sweep switch sets.
    data = {"rules", "transforms"}
    assert list(known) == [field.name for field in dataclasses.fields(record) if field.name not in data]
    assert all(s.help.endswith(".") and s.default == getattr(record(), name) for name, s in known.items())


def test_a_setting_of_no_known_type_is_a_programmers_mistake():
    with pytest.raises(ValueError, match="needs type="):
        setting(None, "No type.")
