"""Files of tensors: told apart by content, safetensors read exactly, everything else refused in one sentence."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as to_safetensors

from sam_flax import load_params, load_sam
from sam_flax.files.convert import convert
from sam_flax.files.tensor_files import read_state_dict


def test_content_decides_not_extension(tiny_state, tmp_path, tiny_config, tiny_pth):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(tiny_pth.read_bytes())
    np.testing.assert_array_equal(
        read_state_dict(path)["image_encoder.pos_embed"], tiny_state["image_encoder.pos_embed"]
    )
    path = tmp_path / "weights.pth"
    path.write_bytes(to_safetensors(tiny_state, {"format": "pt"}))
    config, _ = convert(read_state_dict(path), decoder_num_heads=4)
    assert config == tiny_config


PLAIN = {
    "empty file": (b"", "is empty"),
    "JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(80), "neither"),
    "text": (b"<html>404 not found</html>" * 9, "neither"),
    "one byte": (b"P", "neither"),
    "pickle": (pickle.dumps({"w": [1.0, 2.0]}), "bare pickle"),
    "legacy torch": (bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + bytes(50), "before PyTorch 1.6"),
    "zip magic only": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "safetensors header too long": (struct.pack("<Q", 1 << 40) + b"{}" + bytes(9), "header"),
    "safetensors header cut": (struct.pack("<Q", 500) + b'{"w": {"dtype"', "truncated"),
    "safetensors header damaged": (struct.pack("<Q", 12) + b'{"w": [1,2}]', "sound safetensors"),
    "safetensors nested": (struct.pack("<Q", 200006) + b'{"w": ' + b"[" * 200000, "sound safetensors"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_files_of_other_kinds(tmp_path, case, refused):
    content, part = PLAIN[case]
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    refused(lambda: read_state_dict(path), str(path), part)
    refused(lambda: load_params(path), str(path))
    refused(lambda: load_sam(path), str(path), part)


def test_missing_file_and_directory(tmp_path, refused):
    for read in (read_state_dict, load_params, load_sam):
        refused(lambda read=read: read(tmp_path / "no.pth"), "no.pth", "does not exist", error=FileNotFoundError)
        refused(lambda read=read: read(tmp_path), str(tmp_path), "directory")


def safetensors_file(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


def test_bad_safetensors(tmp_path, refused):
    path = tmp_path / "w.safetensors"
    entry = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    safetensors_file(path, f"{{{entry},{entry}}}", bytes(8))
    refused(lambda: read_state_dict(path), str(path), "'w' appears twice")
    safetensors_file(path, f"{{{entry}}}", bytes(7))
    refused(lambda: read_state_dict(path), str(path), "sound safetensors")
    safetensors_file(path, f"{{{entry.replace('[2]', '[99999999999]')}}}", bytes(8))
    refused(lambda: read_state_dict(path), str(path), "sound safetensors")
    safetensors_file(path, f"{{{entry.replace('F32', 'F8_E4M3').replace('[2]', '[8]')}}}", bytes(8))
    refused(lambda: read_state_dict(path), str(path), "F8_E4M3")
