"""torch.save's files: read exactly, and nothing in a harmful or damaged one runs."""

import argparse
import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sam_flax import load_sam
from sam_flax.files.convert import convert
from sam_flax.files.tensor_files import read_state_dict

# A writer of torch.save's format, so that the tests need no PyTorch and can write what PyTorch would not.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def integers(values) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(key: str, array: np.ndarray, kind="FloatStorage", shape=None, stride=None, offset=0) -> bytes:
    shape = array.shape if shape is None else shape
    if stride is None:
        stride = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + integer(array.size)
    call = b"(" + storage + b"tQ" + integer(offset) + integers(shape) + integers(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + call + b"\x89ccollections\nOrderedDict\n)RtR"


def mapping(items) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items) + b"u"


def write_zip(path: Path, pickled: bytes, storages: dict[str, bytes], top="archive", **extra: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{top}/data.pkl", pickled)
        for key, raw in storages.items():
            archive.writestr(f"{top}/data/{key}", raw)
        for name, raw in extra.items():
            archive.writestr(f"{top}/{name}", raw)
    return path


def write_pth(path: Path, arrays: dict[str, np.ndarray], wrap: str | None = None) -> Path:
    body = mapping((name, tensor(str(i), array)) for i, (name, array) in enumerate(arrays.items()))
    if wrap is not None:
        body = mapping([("epoch", integer(3)), (wrap, body)])
    raw = {str(i): array.astype("<f4").tobytes() for i, array in enumerate(arrays.values())}
    return write_zip(path, b"\x80\x02" + body + b".", raw)


def one(path: Path, value: bytes, **storages: bytes) -> Path:
    """A file with the single entry "w"."""
    return write_zip(path, b"\x80\x02" + mapping([("w", value)]) + b".", storages)


W = np.arange(12, dtype=np.float32)
# ---------------------------------------------------------------------------------------------------- reading


def test_golden_pth_equals_golden_npz(tiny_state, tiny_pth):
    read = read_state_dict(tiny_pth)
    assert read.keys() == tiny_state.keys()
    for name, value in tiny_state.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "model_state_dict"])
def test_wrapped_state_dicts(tmp_path, wrap):
    arrays = {"a": W.reshape(3, 4), "b": W[:5]}
    read = read_state_dict(write_pth(tmp_path / "w.pth", arrays, wrap))
    assert read.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", "f4"),
        ("DoubleStorage", "f8"),
        ("HalfStorage", "f2"),
        ("LongStorage", "i8"),
        ("IntStorage", "i4"),
        ("ShortStorage", "i2"),
        ("CharStorage", "i1"),
        ("ByteStorage", "u1"),
        ("BoolStorage", "?"),
    ],
)
@pytest.mark.parametrize("order", ["little", "big"])
def test_dtypes_and_byte_orders(tmp_path, kind, dtype, order):
    values = W.astype(dtype)
    raw = values.astype(values.dtype.newbyteorder(order)).tobytes()
    pickled = b"\x80\x02" + mapping([("w", tensor("0", values, kind))]) + b"."
    path = write_zip(tmp_path / "w.pth", pickled, {"0": raw}, byteorder=order.encode())
    read = read_state_dict(path)["w"]
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


def test_bfloat16_is_widened_exactly(tmp_path):
    bits = (W.view(np.uint32) >> 16).astype("<u2")  # small integers are bfloat16 numbers
    path = one(tmp_path / "w.pth", tensor("0", W, "BFloat16Storage"), **{"0": bits.tobytes()})
    np.testing.assert_array_equal(read_state_dict(path)["w"], W)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [12], "data_offsets": [0, 24]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
    read = read_state_dict(path)["w"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, W)


def test_strides_and_offsets(tmp_path):
    value = tensor("0", W, shape=(2, 3), stride=(1, 3), offset=2)
    read = read_state_dict(one(tmp_path / "w.pth", value, **{"0": W.tobytes()}))["w"]
    np.testing.assert_array_equal(read, [[2, 5, 8], [3, 6, 9]])


def test_protocol_4_parameters_and_metadata(tmp_path):
    """STACK_GLOBAL, memo, frames, nn.Parameter and an OrderedDict with attributes."""
    name = b"\x8c\x0ctorch._utils\x8c\x12_rebuild_parameter\x93"
    parameter = name + b"(" + tensor("0", W) + b"\x88ccollections\nOrderedDict\n)RtR"
    body = b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R\x94\x8c\x01w" + parameter + b"s"
    state = b"}" + text("_metadata") + b"}s"
    pickled = b"\x80\x04\x95" + struct.pack("<Q", 9) + body + state + b"b0h\x00."
    read = read_state_dict(write_zip(tmp_path / "w.pth", pickled, {"0": W.tobytes()}))
    np.testing.assert_array_equal(read["w"], W)


@pytest.mark.parametrize("file", ["training_checkpoint_s0", "whole_module_s0"])
def test_what_training_saves(data_dir, file):
    """PyTorch 2.13 wrote these: weights under "net" beside an `argparse.Namespace`, an optimizer's state, NumPy scalars
    and arrays, random states, devices, dtypes, paths, sets, enums and objects of unknown classes; and a whole module.
    """
    read = read_state_dict(data_dir / f"{file}.pth")
    assert {name: value.tolist() for name, value in read.items()} == {
        "count": [7],
        "lin.weight": [[0, 1, 2], [3, 4, 5]],
        "lin.bias": [1, 1],
        "child.0.weight": [[1, 0], [0, 1]],
    }


class Custom:
    """A class that the reader has never heard of."""

    def __init__(self) -> None:
        self.value = {"lr": 0.1}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_objects_beside_tensors_are_left_out(tmp_path, protocol, survives):
    beside = {
        "args": argparse.Namespace(lr=0.1, path=PurePosixPath("/data"), inner=argparse.Namespace()),
        "random": random.Random(0).getstate(),
        "numpy": (np.float32(1), np.int64(2), np.arange(3), np.dtype("f4"), np.random.default_rng(0)),
        "many": [{1, 2}, frozenset(), 1 << 90, -1, 1.5, None, True, b"x", bytearray(b"y"), "z", (), [[]], {"a": {}}],
        "custom": Custom(),
        "function": len,
        "range": slice(1, 2),
        1: 2,
        (1, 2): 3,
    }
    entries = pickle.dumps(beside, protocol)[2 if protocol > 1 else 0 : -1]
    path = tmp_path / "w.pth"
    for wrap in ("net", "student", "ema", "model_state"):
        pickled = b"\x80\x02" + entries + text(wrap) + mapping([("w", tensor("0", W)), ("note", b"N")]) + b"s."
        write_zip(path, pickled, {"0": W.tobytes()})
        survives(path, read_state_dict)
        np.testing.assert_array_equal(read_state_dict(path)["w"], W)
        assert read_state_dict(path).keys() == {"w"}


def test_which_of_several_dictionaries(tmp_path, refused):
    state, other = mapping([("w", tensor("0", W))]), mapping([("w", tensor("0", W, shape=(2,)))])
    path = tmp_path / "w.pth"
    for items, length in (
        ([("student", state), ("teacher", other)], None),
        ([("ema", other), ("model", state)], 12),
        ([("model", mapping([("state_dict", mapping([("net", state)]))]))], 12),
        ([("w", tensor("0", W)), ("ema", other)], 12),
    ):
        write_zip(path, b"\x80\x02" + mapping(items) + b".", {"0": W.tobytes()})
        if length is None:
            refused(lambda: read_state_dict(path), "'student', 'teacher'", "several")
        else:
            assert len(read_state_dict(path)["w"]) == length


def test_one_storage_under_many_names(tmp_path, tiny_state):
    """Views share their storage, overlap or not; names of one view share an array in the loaded model too."""
    values = np.arange(200_000, dtype=np.float32)
    items = [(f"w{i}", tensor("0", values)) for i in range(100)]
    items += [("rows", tensor("0", values, shape=(199_998, 3), stride=(1, 1)))]
    items += [("expanded", tensor("0", values, shape=(4, 200_000), stride=(0, 1)))]
    path = write_zip(tmp_path / "w.pth", b"\x80\x02" + mapping(items) + b".", {"0": values.tobytes()})
    read = read_state_dict(path)
    assert all(np.shares_memory(array, read["w0"]) for array in read.values())
    np.testing.assert_array_equal(read["rows"][5], [5, 6, 7])
    np.testing.assert_array_equal(read["expanded"][3], values)

    block = "image_encoder.blocks.{}.mlp.lin1.weight"
    order = list(tiny_state)
    tied = {block.format(i): str(order.index(block.format(0))) for i in range(4)}
    pickled = mapping((n, tensor(tied.get(n, str(i)), tiny_state[n])) for i, n in enumerate(order))
    raw = {str(i): tiny_state[n].astype("<f4").tobytes() for i, n in enumerate(order)}
    _, params = load_sam(write_zip(path, b"\x80\x02" + pickled + b".", raw), decoder_num_heads=4)
    kernels = [params["image_encoder"][f"blocks_{i}"]["mlp"]["lin1"]["kernel"] for i in range(4)]
    assert all(kernel is kernels[0] for kernel in kernels)
    np.testing.assert_array_equal(kernels[3], tiny_state[block.format(0)].T)
    others = [params["image_encoder"][f"blocks_{i}"]["mlp"]["lin2"]["kernel"] for i in range(4)]
    assert len({id(kernel) for kernel in others}) == 4


def test_more_numbers_shown_than_models_share(tmp_path, refused):
    items = [(f"w{i}", tensor("0", W, shape=(1 << 20,), stride=(0,))) for i in range(65)]
    path = write_zip(tmp_path / "w.pth", b"\x80\x02" + mapping(items) + b".", {"0": W.tobytes()})
    refused(lambda: read_state_dict(path), "far more")


# ---------------------------------------------------------------------------------------------------- refused


class Harm:
    """What an attacker would put in a checkpoint."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickles_run_nothing(tmp_path, protocol, refused):
    import os

    target = tmp_path / "harmed"
    for harm in (
        Harm(os.system, f"touch {target}"),
        Harm(eval, f"open({str(target)!r}, 'w')"),
        Harm(exec, f"open({str(target)!r}, 'w')"),
        Harm(getattr, os, "system"),
        Harm(pickle.loads, pickle.dumps(Harm(os.system, f"touch {target}"))),
    ):
        if harm.call[0] is getattr:
            pickled = b"\x80\x02cbuiltins\ngetattr\n(cos\n__dict__\n" + text("system") + b"tR."
        else:
            pickled = pickle.dumps({"w": harm}, protocol)
        path = write_zip(tmp_path / "w.pth", pickled, {"0": W.tobytes()})
        refused(lambda path=path: read_state_dict(path), "w.pth", "re-save" if protocol > 1 else "w.pth")
        assert not target.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "posix\nsystem",
        "builtins\neval",
        "builtins\ngetattr",
        "__builtin__\neval",
        "torch.storage\n_load_from_bytes",
        "torch\nload",
        "torch\n_utils.os.system",
        "collections\nOrderedDict.__init__",
        "torch._utils\n_rebuild_tensor_v2.__globals__",
        "numpy.core.multiarray\n_reconstruct",
    ],
)
def test_only_tensor_names_are_known(tmp_path, name, refused):
    pickled = b"\x80\x02c" + name.encode() + b"\n(" + text("touch x") + b"tR."
    path = write_zip(tmp_path / "w.pth", pickled, {})
    refused(lambda: read_state_dict(path), name.replace("\n", "."), "nothing was run")
    module, attribute = name.split("\n")
    pickled = b"\x80\x04" + text(module) + text(attribute) + b"\x93(" + text("touch x") + b"tR."
    path = write_zip(tmp_path / "w.pth", pickled, {})
    refused(lambda: read_state_dict(path), name.replace("\n", "."), "nothing was run")


def large_memo() -> bytes:
    return b"\x80\x02}r\xff\xff\xff\xff."  # pickle.Unpickler allocates 32 GiB for this


PICKLES = {
    "empty": (b"", "ends early"),
    "no stop": (b"\x80\x02}", "ends early"),
    "empty stack": (b"\x80\x02.", "stack"),
    "protocol": (b"\x80\x09}.", "protocol"),
    "unset memo": (b"\x80\x02h\x07.", "memo 7"),
    "no mark": (b"\x80\x02}u.", "mark"),
    "mark as value": (b"\x80\x02(.", "stack"),
    "odd items": (b"\x80\x02}(Nu.", "no value"),
    "append to dict": (b"\x80\x02}Na.", "list is missing"),
    "tuple as key": (b"\x80\x02})Ns.", "key"),
    "endless name": (b"\x80\x02c" + b"a" * 1000, "name does not end"),
    "name not text": (b"\x80\x02c\xff\xfe\nx\n.", "UTF-8"),
    "stack global of numbers": (b"\x80\x04K\x01K\x02\x93.", "not text"),
    "new object of nothing": (b"\x80\x02)\x81.", "stack"),
    "extension opcode": (b"\x80\x02\x82\x01.", "opcode"),
    "bad call": (b"\x80\x02ccollections\nOrderedDict\nNR.", "call"),
    "bad storage": (b"\x80\x02NQ.", "storage"),
    "bad tensor": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.", "tensor"),
    "large memo": (large_memo(), "empty state dict"),
    "deep nesting": (b"\x80\x02" + b"]" + b"\x85" * 200_000 + b".", "tuple"),
    "list": (b"\x80\x02].", "list where a state dict belongs"),
    "empty dict": (b"\x80\x02}.", "empty state dict"),
    "value not a tensor": (b"\x80\x02" + mapping([("w", b"K\x03")]) + b".", "'w'"),
    "key not a name": (b"\x80\x02}K\x01K\x02s.", "int"),
    "same key twice": (b"\x80\x02" + mapping([("w", b"N"), ("w", b"N")]) + b".", "'w' twice"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_damaged_pickles(tmp_path, case, refused):
    pickled, part = PICKLES[case]
    path = write_zip(tmp_path / "w.pth", pickled, {})
    refused(lambda: read_state_dict(path), str(path), part)


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "out of bounds": (dict(shape=(13,)), "outside its storage"),
    "offset out of bounds": (dict(shape=(12,), offset=1), "outside its storage"),
    "stride out of bounds": (dict(shape=(2,), stride=(12,)), "outside its storage"),
    "negative stride": (dict(shape=(2,), stride=(-1,)), "malformed"),
    "negative size": (dict(shape=(-2, -2), stride=(1, 1)), "malformed"),
    "negative offset": (dict(offset=-4, shape=(2,)), "malformed"),
    "expanded bomb": (dict(shape=(1 << 20, 1 << 20), stride=(0, 0)), "outside its storage"),
    "absurd rank": (dict(shape=(1,) * 40), "malformed"),
    "ranks differ": (dict(shape=(2, 2), stride=(1,)), "malformed"),
    "storage too short": (dict(kind="DoubleStorage"), "48 bytes"),
    "unknown storage": (dict(kind="QInt8Storage"), "torch.QInt8Storage"),
    "not a storage": (dict(kind="float32"), "storage"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_out_of_bounds(tmp_path, case, refused):
    changes, part = TENSORS[case]
    path = one(tmp_path / "w.pth", tensor("0", W, **changes), **{"0": W.tobytes()})
    refused(lambda: read_state_dict(path), str(path), part)


def test_missing_storage(tmp_path, refused):
    path = one(tmp_path / "w.pth", tensor("../../etc/passwd", W), **{"0": W.tobytes()})
    refused(lambda: read_state_dict(path), "lacks the data")


def test_bad_archives(tmp_path, refused, tiny_pth):
    path = tmp_path / "w.pth"
    whole = tiny_pth.read_bytes()
    for cut in (30, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(lambda: read_state_dict(path), str(path), "download or copy it again")
    at = whole.index(b"data/1") + 1000  # inside a storage
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused(lambda: read_state_dict(path), "CRC")

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(lambda: read_state_dict(path), "not one that torch.save wrote")

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # 64 MB of zeros in 64 kB
        archive.writestr("archive/data.pkl", bytes(64 << 20))
    refused(lambda: read_state_dict(path), "compresses")

    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    refused(lambda: read_state_dict(path), "twice")

    write_zip(path, bytes(9 << 20), {})
    refused(lambda: read_state_dict(path), "over the limit")


def test_overlapping_records_are_refused(tmp_path, refused):
    """A bomb without compression: many directory entries that share one record's bytes."""
    path = one(tmp_path / "w.pth", tensor("0", W), **{"0": bytes(4096)})
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", content[end + 16 : end + 20])[0]
    entry = content[content.rindex(b"PK\x01\x02") : end]
    copies = b"".join(entry.replace(b"data/0", b"data/" + bytes([c])) for c in b"abcdefgh")
    directory = content[start:end] + copies
    count = struct.unpack("<H", content[end + 10 : end + 12])[0] + 8
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(content[:start] + directory + tail)
    refused(lambda: read_state_dict(path), "declares")


# ---------------------------------------------------------------------------------------------------- fuzzing
flips = st.lists(st.tuples(st.integers(0, 1 << 24), st.integers(1, 255)), min_size=1, max_size=4)
quick = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def convert_file(path: Path) -> None:
    convert(read_state_dict(path), decoder_num_heads=4, source=f"Checkpoint {path}")


@pytest.fixture(scope="module")
def small_pth(tmp_path_factory) -> bytes:
    path = write_pth(tmp_path_factory.mktemp("fuzz") / "w.pth", {"a": W.reshape(3, 4), "b": W[:5]}, "model")
    return path.read_bytes()


@quick
@given(changes=flips, keep=st.sampled_from([1.0, 1.0, 0.999, 0.7, 0.01]))
def test_fuzz_archive(small_pth, tmp_path, changes, keep, survives, damage):
    """A small archive, where flips reach the zip directory, the pickle and the data alike."""
    path = tmp_path / "w.pth"
    path.write_bytes(damage(small_pth, changes, keep))
    survives(path, read_state_dict)


@quick
@given(changes=flips, keep=st.sampled_from([1.0, 1.0, 0.9]))
def test_fuzz_pickle(tmp_path, changes, keep, survives, damage, tiny_pth):
    """The tiny_state pickle under a valid checksum, so that every flip reaches the interpreter."""
    with zipfile.ZipFile(tiny_pth) as source:
        records = {name: source.read(name) for name in source.namelist()}
    name = next(n for n in records if n.endswith("data.pkl"))
    records[name] = damage(records[name], changes, keep)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for key, raw in records.items():
            target.writestr(key, raw)
    path = tmp_path / "w.pth"
    path.write_bytes(buffer.getvalue())
    survives(path, convert_file)


@quick
@given(pickled=st.binary(max_size=60))
def test_fuzz_random_pickles(tmp_path, pickled, survives):
    survives(write_zip(tmp_path / "w.pth", b"\x80\x02" + pickled, {"0": W.tobytes()}), read_state_dict)


@quick
@given(changes=flips, keep=st.sampled_from([1.0, 0.5]))
def test_fuzz_golden_file(tmp_path, changes, keep, survives, damage, tiny_pth):
    path = tmp_path / "w.pth"
    path.write_bytes(damage(tiny_pth.read_bytes(), changes, keep))
    survives(path, convert_file)
