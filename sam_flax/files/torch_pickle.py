"""Reads the pickle of a `torch.save` file, running nothing that it asks for.

A pickle is a program for a small stack machine. `pickle.Unpickler` would import and call whatever that program names,
and allocate whatever memo size it declares, so the machine is written out here: it knows only the opcodes that state
dicts use, and every name it may meet stands for an inert marker.
"""

import dataclasses
import struct
from collections.abc import Callable
from typing import Any, NoReturn

MAX_DIMS = 8
RESAVE = "re-save the model's state_dict with torch.save"
# bfloat16 has no NumPy type: it is read as its bits and widened to float32, which is exact.
_STORAGE_DTYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_DTYPE_NAMES = (
    *("float32", "float", "float64", "double", "float16", "half", "bfloat16"),
    *("int64", "long", "int32", "int", "int16", "short", "int8", "uint8", "bool"),
)


class Refused(Exception):
    """A finding inside the file, to stand after its name: "holds ...; remedy", without a full stop."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """An allowed name; it is never looked up, only compared."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """The bytes behind tensors, as the pickle declares them: a record's name, a NumPy type or "bfloat16", a length."""

    key: str
    dtype: str
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage, in its elements; nothing of it has been held against the storage yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """A harmless value that is not a tensor (a dtype, a size): kept so that its neighbours can be read."""


class _Mark:
    """Stack mark."""


_ORDERED_DICT = _Global("collections.OrderedDict")
_REBUILD_TENSOR = _Global("torch._utils._rebuild_tensor_v2")
_REBUILD_PARAMETER = _Global("torch._utils._rebuild_parameter")
_SIZE = _Global("torch.Size")
_ALLOWED: dict[str, _Global | Inert] = {
    **{g.name: g for g in (_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, _SIZE)},
    **{f"torch.{name}": _Global(f"torch.{name}") for name in _STORAGE_DTYPES},
    **{f"torch.{name}": Inert() for name in _DTYPE_NAMES},
}


def interpret(data: bytes) -> Any:
    """The value that a pickle describes, made of containers, numbers, text and the inert classes above.

    Raises:
        Refused: if it is damaged, or names anything but tensors.
    """
    return _Machine(data).run()


def _damaged(what: str) -> NoReturn:
    raise Refused(f"has a damaged data.pkl ({what}); download or copy it again")


def kind_of(value: Any) -> str:
    """What to call a value in a message."""
    names: dict[type, str] = {Tensor: "single tensor", Storage: "storage", Inert: "dtype or size"}
    return names.get(type(value), type(value).__name__.lstrip("_"))


def short(value: object) -> str:
    """A value as text of bounded length, for a message."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Machine:
    """The pickle stack machine, cut down to what `torch.save` writes for a state dict (protocols 2 to 5)."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Runs to the STOP opcode and returns the object left on the stack."""
        while True:
            opcode = self._take(1)
            if opcode == b".":
                return self._pop()
            handler = _OPCODES.get(opcode)
            if handler is None:
                raise Refused(
                    f"uses the pickle opcode {opcode!r} at byte {self._position - 1} of data.pkl, which "
                    f"state dicts do not need; {RESAVE}"
                )
            handler(self)

    def _take(self, count: int) -> bytes:
        chunk = self._data[self._position : self._position + count]
        if len(chunk) != count:
            _damaged("it ends early")
        self._position += count
        return chunk

    def _uint(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _int(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little", signed=True)

    def _text(self, size: int) -> str:
        try:
            return self._take(size).decode("utf-8")
        except UnicodeDecodeError:
            _damaged("a name is not UTF-8")

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position, self._position + 512)
        if end < 0:
            _damaged("a name does not end")
        line = self._text(end - self._position)
        self._position += 1
        return line

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            _damaged("its stack runs empty")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            _damaged(f"a {kind.__name__} is missing from its stack")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[index], _Mark):
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        _damaged("a mark is missing")

    def _pop_tuple(self, size: int) -> tuple[Any, ...]:
        return tuple([self._pop() for _ in range(size)][::-1])

    # Each method below is one opcode.

    def proto(self) -> None:
        version = self._uint(1)
        if not 2 <= version <= 5:
            _damaged(f"pickle protocol {version}")

    def float64(self) -> None:
        self.push(struct.unpack(">d", self._take(8))[0])

    def put(self, size: int) -> None:
        index = self._uint(size)
        self._memo[index] = self._peek()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._peek()

    def _peek(self) -> Any:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            _damaged("its stack runs empty")
        return self._stack[-1]

    def get(self, size: int) -> None:
        index = self._uint(size)
        if index not in self._memo:
            _damaged(f"memo {index} is unset")
        self.push(self._memo[index])

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def set_item(self) -> None:
        self._set_items(list(self._pop_tuple(2)))

    def set_items(self) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            _damaged("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                _damaged(f"a dictionary key is a {kind_of(key)}")
            if key in target:
                raise Refused(f"holds the key {str(key)[:80]!r} twice; {RESAVE}")
            target[key] = value

    def global_name(self) -> None:
        module = self._line()
        self._find(module, self._line())

    def stack_global(self) -> None:
        module, name = self._pop_tuple(2)
        if not isinstance(module, str) or not isinstance(name, str):
            _damaged("a name is not text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        allowed = _ALLOWED.get(f"{module}.{name}")
        # The join is ambiguous ("torch" + "_utils.x"), but only into names that are inert anyway.
        if allowed is None:
            raise Refused(
                f"asks to load {f'{module}.{name}'[:80]!r}, which is not part of a tensor and may be "
                f"harmful (nothing was run); get it from a source you trust and {RESAVE}"
            )
        self.push(allowed)

    def persistent_id(self) -> None:
        match self._pop():
            case ("storage", _Global(name=name), str() as key, str(), int() as numel) if (
                name.removeprefix("torch.") in _STORAGE_DTYPES and numel >= 0
            ):
                self.push(Storage(key, _STORAGE_DTYPES[name.removeprefix("torch.")], numel))
            case _:
                _damaged("a storage is malformed")

    def reduce(self) -> None:
        function, args = self._pop_tuple(2)
        if function is _ORDERED_DICT and args == ():
            self.push({})
        elif function is _SIZE:
            self.push(Inert())
        elif function is _REBUILD_PARAMETER and isinstance(args, tuple) and args and type(args[0]) is Tensor:
            self.push(args[0])
        elif function is _REBUILD_TENSOR and isinstance(args, tuple) and len(args) >= 4:
            storage, offset, shape, stride = args[:4]
            if (
                type(storage) is not Storage
                or type(offset) is not int
                or offset < 0
                or not _is_sizes(shape)
                or not _is_sizes(stride)
                or len(shape) != len(stride)
            ):
                _damaged("a tensor is malformed")
            self.push(Tensor(storage, offset, shape, stride))
        else:
            _damaged("a call is malformed")

    def build(self) -> None:
        # The attributes of a state dict (its `_metadata` of module versions) say nothing about the numbers.
        self._pop()
        self._top(dict)


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_DIMS
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )


_OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _Machine.proto,
    b"\x95": lambda m: m._take(8),  # FRAME
    b"(": lambda m: m.push(_Mark()),
    b"0": _Machine._pop,  # POP
    b"1": _Machine._pop_to_mark,  # POP_MARK
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m._int(4)),  # BININT
    b"K": lambda m: m.push(m._uint(1)),  # BININT1
    b"M": lambda m: m.push(m._uint(2)),  # BININT2
    b"\x8a": lambda m: m.push(m._int(m._uint(1))),  # LONG1
    b"G": _Machine.float64,  # BINFLOAT
    b"\x8c": lambda m: m.push(m._text(m._uint(1))),  # SHORT_BINUNICODE
    b"X": lambda m: m.push(m._text(m._uint(4))),  # BINUNICODE
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.push(m._pop_tuple(1)),
    b"\x86": lambda m: m.push(m._pop_tuple(2)),
    b"\x87": lambda m: m.push(m._pop_tuple(3)),
    b"t": lambda m: m.push(tuple(m._pop_to_mark())),
    b"]": lambda m: m.push([]),
    b"a": _Machine.append,
    b"e": _Machine.appends,
    b"}": lambda m: m.push({}),
    b"s": _Machine.set_item,
    b"u": _Machine.set_items,
    b"c": _Machine.global_name,
    b"\x93": _Machine.stack_global,
    b"Q": _Machine.persistent_id,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"q": lambda m: m.put(1),  # BINPUT
    b"r": lambda m: m.put(4),  # LONG_BINPUT
    b"\x94": _Machine.memoize,
    b"h": lambda m: m.get(1),  # BINGET
    b"j": lambda m: m.get(4),  # LONG_BINGET
}
