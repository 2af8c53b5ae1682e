"""Reads the pickle of a `torch.save` file, running nothing that it asks for.

A pickle is a program for a small stack machine. `pickle.Unpickler` would import and call whatever that program names,
and allocate whatever memo size it declares. Here `pickletools.genops` takes the program apart, which runs nothing, and
the machine knows containers, numbers, text and tensors. Whatever else the program makes (an `argparse.Namespace`, a
NumPy scalar, a device, a random state) becomes an `Opaque`: a name, and what was put into it.
"""

import dataclasses
import pickletools
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
# No honest checkpoint asks for these: a file that does is refused, so that its user learns of it.
_HARMFUL_MODULES = frozenset(
    ("os", "nt", "posix", "subprocess", "pty", "shutil", "socket", "runpy", "importlib", "ctypes", "code", "codeop")
    + ("pickle", "_pickle", "marshal", "commands", "webbrowser", "urllib", "http", "tempfile", "multiprocessing")
)
_HARMFUL_BUILTINS = frozenset(("eval", "exec", "execfile", "compile", "open", "input", "breakpoint", "__import__"))


class Refused(Exception):
    """A finding inside the file, to stand after its name: "holds ...; remedy", without a full stop."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that the pickle asks for; it is never looked up, only compared."""

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


class Opaque:
    """An object that is not a tensor, never made: what it would be called, and the entries that were put into it."""

    __slots__ = ("entries", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: dict[Any, Any] = {}


class _Mark:
    """Stack mark."""


_ORDERED_DICT = "collections.OrderedDict"
# Tensors as different versions of PyTorch write them, by the number of arguments that say what this reads.
_TENSORS = frozenset(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"))
_TYPED_TENSOR = "torch._tensor._rebuild_from_type_v2"  # a subclass of a tensor, or one with attributes
_PARAMETERS = frozenset(("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"))


def interpret(data: bytes) -> Any:
    """The value that a pickle describes, made of containers, numbers, text and the inert classes above.

    Raises:
        Refused: if it is damaged, or names what no checkpoint needs.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            handler = _OPCODES.get(opcode.name)
            if handler is None:
                raise Refused(f"uses the pickle opcode {opcode.name}, which checkpoints do not need; {RESAVE}")
            handler(machine, argument)
    except UnicodeDecodeError:
        _damaged("a name is not UTF-8")
    except (ValueError, OverflowError, struct.error) as error:  # what genops raises
        reason = (str(error).splitlines() or ["it cannot be taken apart"])[0][:80]
        if "newline" in reason:
            reason = "a name does not end"
        elif any(word in reason for word in ("exhausted", "expected", "not enough")):
            reason = "it ends early"
        _damaged(reason)
    _damaged("it ends early")


def _damaged(what: str) -> NoReturn:
    raise Refused(f"has a damaged data.pkl ({what}); download or copy it again")


def kind_of(value: Any) -> str:
    """What to call a value in a message."""
    if isinstance(value, Opaque | _Global):
        return f"{short(value.name)} object (nothing was run)"
    names: dict[type, str] = {Tensor: "single tensor", Storage: "storage"}
    return names.get(type(value), type(value).__name__.lstrip("_"))


def short(value: object) -> str:
    """A value as printable text of bounded length, for a message."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else text[:57] + "..."


class _Machine:
    """The pickle stack machine (protocols 0 to 5)."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        self.top()
        return self._stack.pop()

    def top(self) -> Any:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            _damaged("its stack runs empty")
        return self._stack[-1]

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[index], _Mark):
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        _damaged("a mark is missing")

    def pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    # Each method below is one opcode, or several that differ in how they are written.

    def protocol(self, version: int) -> None:
        if version > 5:
            _damaged(f"pickle protocol {version}")

    def pop_top(self, _: Any) -> None:
        if self._stack and isinstance(self._stack[-1], _Mark):  # as pickle.loads takes it
            self._stack.pop()
        else:
            self.pop()

    def put(self, index: int) -> None:
        self._memo[index] = self.top()

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            _damaged(f"memo {index} is unset")
        self.push(self._memo[index])

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Opaque):
            _damaged("a list is missing from its stack")

    def append(self, _: Any) -> None:
        self.extend([self.pop()])

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        entries = target.entries if isinstance(target, Opaque) else target
        if not isinstance(entries, dict):
            _damaged("a dict is missing from its stack")
        if len(items) % 2:
            _damaged("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | bytes | None):
                key = Opaque(kind_of(key))  # each is another key, and none is a parameter's name
            elif isinstance(key, str) and key in entries:
                raise Refused(f"holds the key {short(key)!r} twice; {RESAVE}")
            entries[key] = value

    def dictionary(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.push({})
        self.set_items(items)

    def find(self, module: str, name: str) -> None:
        full, top = f"{module}.{name}", module.partition(".")[0]
        harmful = top in _HARMFUL_MODULES or (top in ("builtins", "__builtin__") and name in _HARMFUL_BUILTINS)
        if harmful:
            raise Refused(
                f"asks to load {short(full)!r}, which is no part of a checkpoint and may be harmful (nothing was "
                f"run); get it from a source you trust and {RESAVE}"
            )
        self.push(_Global(full))

    def global_name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")  # how pickletools joins the two
        self.find(module, name)

    def stack_global(self, _: Any) -> None:
        module, name = self.pop_many(2)
        if not isinstance(module, str) or not isinstance(name, str):
            _damaged("a name is not text")
        self.find(module, name)

    def persistent_id(self, _: Any) -> None:
        match self.pop():
            case ("storage", _Global(name=name), str() as key, str(), int() as numel) if numel >= 0:
                dtype = _STORAGE_DTYPES.get(name.removeprefix("torch.")) if name.startswith("torch.") else None
                self.push(Opaque(name) if dtype is None else Storage(key, dtype, numel))
            case _:
                _damaged("a storage is malformed")

    def reduce(self, _: Any) -> None:
        self.call(*self.pop_many(2))

    def call(self, function: Any, args: Any) -> None:
        """What a call would return: a container or a tensor where it is one of those known, else an opaque object."""
        if not isinstance(function, _Global | Opaque) or not isinstance(args, tuple):
            _damaged("a call is malformed")
        name = function.name
        if name == _ORDERED_DICT and args == ():
            self.push({})
        elif name in _PARAMETERS and args and type(args[0]) is Tensor:
            self.push(args[0])
        elif name == _TYPED_TENSOR and len(args) >= 3 and args[0] != function:
            self.call(args[0], args[2])
        elif name in _TENSORS:
            self.push(_tensor(args))
        else:
            self.push(Opaque(name))

    def call_to_mark(self, argument: Any) -> None:
        """INST and OBJ of protocol 0 and 1: a class and its arguments above a mark."""
        items = self.pop_to_mark()
        if isinstance(argument, str):
            self.global_name(argument)
            items.insert(0, self.pop())
        if not items:
            _damaged("a call is malformed")
        self.call(items[0], tuple(items[1:]))

    def new_object(self, keywords: bool) -> None:
        if keywords:
            self.pop()
        self.reduce(None)

    def build(self, _: Any) -> None:
        """Attributes of an object; those of a state dict (`_metadata`) and of tensors say nothing of the numbers."""
        state, target = self.pop(), self.top()
        if isinstance(target, Opaque) and isinstance(state, dict):
            target.entries.update(state)


def _tensor(args: tuple[Any, ...]) -> Tensor | Opaque:
    if len(args) < 4:
        _damaged("a tensor is malformed")
    storage, offset, shape, stride = args[:4]
    if type(storage) is Opaque:
        return Opaque(f"tensor of storage {storage.name}")
    if (
        type(storage) is not Storage
        or type(offset) is not int
        or offset < 0
        or not _is_sizes(shape)
        or not _is_sizes(stride)
        or len(shape) != len(stride)
    ):
        _damaged("a tensor is malformed")
    return Tensor(storage, offset, shape, stride)


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_DIMS
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )


# Opcodes whose argument, as pickletools reads it, is the value itself.
_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    **{name: _Machine.push for name in _VALUES},
    "PROTO": _Machine.protocol,
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.push(_Mark()),
    "POP": _Machine.pop_top,
    "POP_MARK": lambda m, _: None if m.pop_to_mark() else None,
    "DUP": lambda m, _: m.push(m.top()),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.push(m.pop_many(1)),
    "TUPLE2": lambda m, _: m.push(m.pop_many(2)),
    "TUPLE3": lambda m, _: m.push(m.pop_many(3)),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "LIST": lambda m, _: m.push(m.pop_to_mark()),
    "APPEND": _Machine.append,
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "DICT": _Machine.dictionary,
    "SETITEM": lambda m, _: m.set_items(list(m.pop_many(2))),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "EMPTY_SET": lambda m, _: m.push(Opaque("set")),
    "ADDITEMS": lambda m, _: m.extend(m.pop_to_mark()),
    "FROZENSET": lambda m, _: m.call(_Global("frozenset"), tuple(m.pop_to_mark())),
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "INST": _Machine.call_to_mark,
    "OBJ": _Machine.call_to_mark,
    "NEWOBJ": lambda m, _: m.new_object(keywords=False),
    "NEWOBJ_EX": lambda m, _: m.new_object(keywords=True),
    "BINPERSID": _Machine.persistent_id,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
}
