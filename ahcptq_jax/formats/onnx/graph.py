"""Building ONNX graphs: nodes with unique names, constants that are stored once, and files written whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam_flax.errors import InputError
from sam_flax.files.writing import write_whole

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise InputError(
        "Exporting to ONNX needs the package onnx; install it with pip install 'ahcptq-jax[onnx]'."
    ) from None

OPSET = 21  # the first with 4-bit integers
IR_VERSION = 10
PRODUCER = "ahcptq_jax"
# Constants up to this size are compared, and equal ones stored once.
_SHARED_BYTES = 4096
# Protocol buffers end at 2 GiB. Beyond this, constants lie in a file beside the graph.
INLINE_BYTES = 1_500_000_000
_EXTERNAL_FROM = 1024

FLOAT, FLOAT16, INT8, UINT8, INT32, INT64, UINT4 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT4,
)


class Graph:
    """A graph that grows node by node; values are known by their names.

    Attributes:
        nodes: in the order in which they run.
        constants: of the whole model; a body shares those of the graph that it belongs to.
    """

    def __init__(self, outer: Graph | None = None) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = outer.constants if outer else {}
        self._shared: dict[tuple, str] = outer._shared if outer else {}
        self._names: set[str] = outer._names if outer else set()

    def name(self, wanted: str) -> str:
        """A name that nothing else has, which is `wanted` if it is free."""
        name, count = wanted, 0
        while name in self._names:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node with one output, whose name is returned."""
        output = self.name(name or op)
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        """Adds a `Split` into parts of the given sizes."""
        outputs = [self.name("Split") for _ in sizes]
        self.nodes.append(
            helper.make_node("Split", [x, self.shape(*sizes)], outputs, name=outputs[0], axis=axis),
        )
        return outputs

    def constant(self, value: Any, dtype: Any = np.float32, name: str = "constant") -> str:
        """A constant of the given type."""
        array = np.asarray(value, dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes()) if array.nbytes <= _SHARED_BYTES else None
        if key in self._shared:
            return self._shared[key]
        found = self.name(name)
        self.constants[found] = numpy_helper.from_array(array, found)
        if key is not None:
            self._shared[key] = found
        return found

    def four_bits(self, codes: np.ndarray, name: str) -> str:
        """A UINT4 constant of integer codes 0..15, two in a byte, the earlier one in its low half."""
        flat = codes.reshape(-1).astype(np.uint8)
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
        found = self.name(name)
        packed = (flat[0::2] | (flat[1::2] << 4)).tobytes()
        self.constants[found] = TensorProto(name=found, data_type=UINT4, dims=list(codes.shape), raw_data=packed)
        return found

    def parameter(self, value: Any, name: str) -> str:
        """A float32 value; kept in half precision where that loses nothing."""
        array = np.asarray(value, np.float32)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if array.nbytes <= _SHARED_BYTES or not np.array_equal(half.astype(np.float32), array):
            return self.constant(array, name=name)
        return self.node("Cast", self.constant(half, np.float16, f"{name}/half"), to=FLOAT, name=name)

    def shape(self, *sizes: int) -> str:
        """A constant vector of int64."""
        return self.constant(sizes, np.int64, "shape")

    def reshape(self, x: str, *sizes: int, name: str = "") -> str:
        """Adds a `Reshape`; 0 keeps a size, -1 is what remains."""
        return self.node("Reshape", x, self.shape(*sizes), name=name)

    def transpose(self, x: str, *order: int, name: str = "") -> str:
        return self.node("Transpose", x, perm=list(order), name=name)

    def scan(self, body: Graph, taken: Sequence[tuple[str, Any]], given: Any, axis: int) -> str:
        """Adds a `Scan` without a state: the body once for every entry of an axis.

        Args:
            body: its graph, which may use what is in this one.
            taken: pairs of a value here and what its entry is in the body, from `value`.
            given: the body's result, from `value`; its entries are stacked along the same axis.
            axis: of all of them.
        """
        inner = helper.make_graph(body.nodes, self.name("body"), [entry for _, entry in taken], [given])
        output = self.name("Scan")
        self.nodes.append(
            helper.make_node(
                "Scan",
                [x for x, _ in taken],
                [output],
                name=output,
                body=inner,
                num_scan_inputs=len(taken),
                scan_input_axes=[axis] * len(taken),
                scan_output_axes=[axis],
            )
        )
        return output


def value(name: str, dtype: int, shape: Sequence[int | str]) -> Any:
    """Name, type and shape of an input or output."""
    return helper.make_tensor_value_info(name, dtype, list(shape))


def write(graph: Graph, inputs: Sequence[Any], outputs: Sequence[Any], path: Path, external: bool | None) -> None:
    """Writes a graph as a model.

    Args:
        graph: the graph.
        inputs, outputs: from `value`.
        path: the file.
        external: whether the constants lie in a file of their own, `<name>.data` beside it; None: if they must.

    Raises:
        OSError: if a file cannot be written; each is there whole or not at all.
    """
    constants = list(graph.constants.values())
    size = sum(len(tensor.raw_data) for tensor in constants)
    if external or (external is None and size > INLINE_BYTES):
        data = path.with_name(path.name + ".data")
        large = [tensor for tensor in constants if len(tensor.raw_data) >= _EXTERNAL_FROM]
        chunks, offset = [], 0
        for tensor in large:
            raw = tensor.raw_data
            chunks += [raw, b"\0" * (-len(raw) % 64)]
            keys = {"location": data.name, "offset": str(offset), "length": str(len(raw))}
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, text in keys.items():
                tensor.external_data.add(key=key, value=text)
            offset += len(raw) + len(chunks[-1])
        write_whole(data, chunks)
    model = helper.make_model(
        helper.make_graph(graph.nodes, path.stem, list(inputs), list(outputs), constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
    )
    write_whole(path, [model.SerializeToString()])


def check(path: str | os.PathLike[str]) -> None:
    """Raises onnx's `ValidationError` unless the file is a sound model with shapes that fit."""
    onnx.checker.check_model(os.fspath(path), full_check=True)
