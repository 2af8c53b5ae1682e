"""`Options`: every contradiction gets a sentence before anything is read, and the flags are its fields."""

import dataclasses

import pytest
from absl import flags

from ahcptq_jax import METHODS
from experiments.job import options as module
from experiments.job.options import Options
from experiments.main import _flag_lines


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"images": "a"}, "--images and --annotations belong together"),
        ({"annotations": "a"}, "--images and --annotations belong together"),
        ({"calib_images": "a"}, "--calib_images and --calib_annotations belong together"),
        ({"scenes": "test"}, "--scenes=test is unknown; choose one of val, train"),
        ({"granularity": "layer"}, "--granularity=layer is unknown; choose one of"),
        ({"precision": "int3"}, "--precision=int3 is unknown; choose one of float32, tensorfloat32, bfloat16"),
        ({"method": "magic"}, "--method=magic is unknown; choose one of fp, minmax"),
        ({"num_calib": 0}, "--num_calib=0 must be at least 1"),
        ({"num_scenes": -3}, "--num_scenes=-3 must be at least 1"),
        ({"limit": -1}, "--limit=-1 must be at least 0"),
        ({"seed": -1}, "--seed=-1 must be at least 0"),
        ({"seed": 2**40}, "seed=1099511627776 must be a number from 0"),
        ({"w_bits": 9}, "w_bits=9 must be a width from 2 to 8"),
        ({"a_bits": 1}, "a_bits=1 must be a width from 2 to 8"),
        ({"groups": -1}, "groups=-1 must be 0"),
        ({"iterations": -1}, "--iterations=-1 must be at least 0"),
        ({"iterations": 5, "scale_rate": -1.0}, "scale_rate=-1.0 must be a finite number"),
        ({"harder": 5.0}, "--harder=5.0 must lie in 0..4"),
        ({"boxes": "detections.json"}, "--boxes=detections.json names a detector's results, which need the --images"),
        ({"boxes": ""}, "--boxes is empty; leave it out for 'gt'"),
        ({"checkpoint": ""}, "--checkpoint is empty; leave it out for 'mini'"),
        ({"artefact": "a", "method": "fp"}, "--artefact is a quantized model and --method=fp evaluates none"),
        ({"out": ""}, "--out is empty; leave it out for 'runs/main'"),
    ],
)
def test_contradictions_get_one_sentence(values, sentence):
    with pytest.raises(ValueError) as error:
        Options(**values)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_switches_override_the_method():
    assert Options(method="minmax").quant_config().agq is False
    assert Options(method="minmax", agq=True).quant_config().agq is True
    config = Options(method="ahcptq", hluq=False, groups=0, w_bits=5, a_bits=6, seed=3).quant_config()
    assert (config.hluq, config.groups, config.w_bits, config.a_bits, config.seed) == (False, 0, 5, 6, 3)
    # 0 and False are given values, not absent ones.
    assert Options(groups=0).quant_config().groups == 0


def test_methods_that_learn():
    assert Options(method="ahcptq").reconstruction_config() is None
    assert Options(method="minmax", iterations=9).reconstruction_config() is None
    config = Options(method="brecq", iterations=9, seed=2, rounding_rate=0.5).reconstruction_config()
    assert (config.iterations, config.seed, config.rounding_rate, config.scale_rate) == (9, 2, 0.5, None)
    assert config.activation_drop == 0


def test_every_method_has_a_configuration():
    for method in METHODS:
        Options(method=method).quant_config()


@pytest.fixture
def parsed(monkeypatch):
    """Parses arguments with a flag registry of its own."""

    def parse(*arguments):
        values = flags.FlagValues()
        for name in ("DEFINE_string", "DEFINE_integer", "DEFINE_float", "DEFINE_bool", "DEFINE_enum"):
            original = getattr(flags, name)
            monkeypatch.setattr(flags, name, lambda *args, _original=original: _original(*args, flag_values=values))
        monkeypatch.setattr(flags, "FLAGS", values)
        module.define_flags()
        monkeypatch.undo()
        values(["main", *arguments])
        monkeypatch.setattr(flags, "FLAGS", values)
        return module.options_from_flags()

    return parse


def test_flags_are_the_fields_with_their_defaults(parsed):
    assert parsed() == Options()


def test_resolved_flags_give_the_same_options_again(parsed, tmp_path):
    options = Options(method="ptq4sam_s", w_bits=5, hluq=True, blank=False, groups=0, out=str(tmp_path), seed=7)
    path = tmp_path / "flags.txt"
    path.write_text(_flag_lines(options))
    lines = [line for line in path.read_text().splitlines() if line]
    assert parsed(*lines) == options
    assert {line.removeprefix("--").partition("=")[0] for line in lines} <= {
        field.name for field in dataclasses.fields(Options)
    }


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_the_flagfiles_at_the_root_say_what_their_names_say(parsed, pytestconfig, bits):
    path = pytestconfig.rootpath / f"w{bits}a{bits}.flags"
    lines = path.read_text().splitlines()
    given = [line for line in lines if line.startswith("--")]
    options = parsed(*given)
    assert (options.w_bits, options.a_bits, options.method) == (bits, bits, "ahcptq")
    assert (options.num_calib, options.checkpoint) == (32, "mini")
    # A comment above every flag.
    for number, line in enumerate(lines):
        assert not line.startswith("--") or lines[number - 1].startswith("#"), line
