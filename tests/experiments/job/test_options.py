"""`Options`: every contradiction gets a sentence before anything is read, and the flags are its fields."""

import dataclasses

import pytest
from absl import flags

from ahcptq_jax.config import METHODS, QuantConfig
from ahcptq_jax.flags import PRESETS, as_lines, define_flags, values, with_flag_files
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.settings import settings_of
from experiments.job.options import Options, switches


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"images": "a"}, "--images and --annotations belong together"),
        ({"annotations": "a"}, "--images and --annotations belong together"),
        ({"calib_images": "a"}, "--calib_images and --calib_annotations belong together"),
        ({"scenes": "test"}, "--scenes='test' is unknown; choose one of val, train"),
        ({"granularity": "layer"}, "--granularity='layer' is unknown; choose one of"),
        ({"precision": "int3"}, "--precision='int3' is unknown; choose one of float32, tensorfloat32, bfloat16"),
        ({"method": "magic"}, "--method='magic' is unknown; choose one of fp, minmax"),
        ({"num_calib": 0}, "--num_calib=0 must be at least 1"),
        ({"num_scenes": -3}, "--num_scenes=-3 must be a number from 1"),
        ({"limit": -1}, "--limit=-1 must be at least 0"),
        ({"seed": -1}, "--seed=-1 must be a number from 0"),
        ({"seed": 2**40}, "seed=1099511627776 must be a number from 0"),
        ({"w_bits": 9}, "w_bits=9 must be a width from 2 to 8"),
        ({"a_bits": 1}, "a_bits=1 must be a width from 2 to 8"),
        ({"groups": -1}, "groups=-1 must be 0"),
        ({"iterations": -1}, "--iterations=-1 must be at least 0"),
        ({"iterations": 5, "scale_rate": -1.0}, "scale_rate=-1.0 must be a finite number"),
        ({"harder": 5.0}, "--harder=5.0 must be a number from 0 to 4"),
        ({"boxes": "detections.json"}, "--boxes=detections.json names a detector's results, which need the --images"),
        ({"boxes": ""}, "--boxes is empty; leave it out for 'gt'"),
        ({"checkpoint": ""}, "--checkpoint is empty; leave it out for 'mini'"),
        ({"artefact": "a", "method": "fp"}, "--artefact is a quantized model and --method=fp evaluates none"),
        ({"budget": "joules:4"}, "budget='joules:4' must be one of bytes, bitops, alone or with a colon"),
        ({"budget": "3.5"}, "--budget='3.5' must be empty, or what is counted"),
        ({"harder_way": "odd"}, "--harder_way='odd' is unknown; choose one of all, channels"),
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


def test_every_setting_of_both_configurations_is_a_flag_and_a_switch_as_it_is_declared():
    """A new switch is one field: nothing here or in the commands repeats it."""
    own = settings_of(Options)
    for record in (QuantConfig, ReconstructionConfig):
        for name, known in settings_of(record).items():
            if not known.sweep or known.type is tuple or name in ("w_bits", "a_bits", "iterations"):
                continue
            assert (own[name].type, own[name].choices, own[name].check) == (known.type, known.choices, known.check)
            assert own[name].default is None and own[name].help.startswith(known.help)
            assert name in switches()
    assert not {"w_bits", "a_bits", "seed", "out", "method"} & switches().keys(), "those have flags of the sweep"


def test_needless_overrides_are_left_out_of_a_record():
    plain = Options(method="brecq", iterations=3)
    assert dataclasses.replace(plain, hluq=False, groups=4, granularity="part").without_needless() == plain
    assert dataclasses.replace(plain, hluq=True).without_needless() != plain
    # Without iterations nothing is learned, however it would be.
    still = Options(method="brecq")
    assert dataclasses.replace(still, granularity="block", loss_power=3.0).without_needless() == still


def test_every_method_has_a_configuration():
    for method in METHODS:
        Options(method=method).quant_config()


def parsed(*arguments: str) -> Options:
    """Arguments as the commands make them, with a registry of flags of its own."""
    found = flags.FlagValues()
    define_flags(Options, flag_values=found)
    found(with_flag_files(["main", *arguments]))
    return Options(**values(Options, found))


def test_flags_are_the_fields_with_their_defaults():
    assert parsed() == Options()


def test_resolved_flags_give_the_same_options_again(tmp_path):
    options = Options(method="ptq4sam_s", w_bits=5, hluq=True, blank=False, groups=0, out=str(tmp_path), seed=7)
    path = tmp_path / "flags.txt"
    path.write_text(as_lines(options))
    assert parsed(f"--flagfile={path}") == options
    lines = path.read_text().splitlines()
    assert {line.removeprefix("--").partition("=")[0] for line in lines} <= {
        field.name for field in dataclasses.fields(Options)
    }


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_the_presets_say_what_their_names_say(bits):
    path = PRESETS / f"w{bits}a{bits}.flags"
    lines = path.read_text().splitlines()
    options = parsed(f"--flagfile={path}")
    assert (options.w_bits, options.a_bits, options.method) == (bits, bits, "ahcptq")
    assert (options.num_calib, options.checkpoint) == (32, "mini")
    # A comment above every flag.
    for number, line in enumerate(lines):
        assert not line.startswith("--") or lines[number - 1].startswith("#"), line
