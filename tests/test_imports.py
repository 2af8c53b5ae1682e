"""Arrows between modules run one way: no circle, no import inside a function that hides one.

Between packages: experiments -> hwcost -> ahcptq_jax -> sam_flax. Inside ahcptq_jax a room imports rooms of lower
layers alone (`LAYERS`). The order is that of the method's steps, api -> {calibration, reconstruction, formats} ->
runtime -> {architectures, transforms} -> quantizers, with what the code shows besides:

  * the recipe lies between architectures, whose rules it completes, and runtime;
  * transforms rewrite parameters that an architecture names, and so lie above architectures, which know no quantizer;
  * reconstruction starts from what calibration observed, and so lies above it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each imports those after it.
PACKAGES = ("experiments", "hwcost", "ahcptq_jax", "sam_flax")
# Rooms of ahcptq_jax, the lowest layer first; a room imports lower layers and itself.
LAYERS = (
    ("devices", "rules", "settings"),
    ("config", "flags"),
    ("command", "quantizers"),
    ("architectures",),
    ("recipe", "transforms"),
    ("runtime",),
    ("calibration", "formats"),
    ("mixed", "reconstruction"),
    ("methods",),
    ("api",),
    ("",),  # the package itself: what users import
)
# Likewise of hwcost.
COST_LAYERS = (("counts",), ("board",), ("study",), ("pages",), ("", "__main__"))


def _modules() -> dict[str, Path]:
    """Every module of the four packages, by its name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imported(node: ast.Import | ast.ImportFrom, name: str) -> Iterator[str]:
    """The modules of ours that a statement in the module `name` imports."""
    if isinstance(node, ast.Import):
        candidates = [alias.name for alias in node.names]
    else:
        base = node.module or ""
        if node.level:
            package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        candidates = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
    yield from (candidate for candidate in candidates if candidate in MODULES)


def _statements(name: str) -> Iterator[tuple[str, int, bool]]:
    """(module imported, line, whether inside a function) of every import of ours, in functions and classes too."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from ((target, child.lineno, inside) for target in _imported(child, name))
            yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(MODULES[name].read_text(encoding="utf-8")), False)


GRAPH = {name: list(_statements(name)) for name in MODULES}


def test_the_walk_sees_the_code() -> None:
    assert len(MODULES) > 100 and sum(map(len, GRAPH.values())) > 300
    assert "ahcptq_jax.config" in {target for target, _, _ in GRAPH["hwcost.counts.counts"]}


def test_no_module_imports_itself_by_way_of_others() -> None:
    state: dict[str, int] = {}  # 1: on the way, 2: done

    def visit(name: str, way: tuple[str, ...]) -> None:
        state[name] = 1
        for target, line, _ in GRAPH[name]:
            assert state.get(target) != 1, f"a circle: {' -> '.join((*way, name, target))} ({MODULES[name]}:{line})"
            if target not in state:
                visit(target, (*way, name))
        state[name] = 2

    for name in MODULES:
        if name not in state:
            visit(name, ())


def test_no_function_imports_a_module_of_ours() -> None:
    hidden = [
        f"{MODULES[name].relative_to(ROOT)}:{line} imports {target}"
        for name, statements in GRAPH.items()
        for target, line, inside in statements
        if inside
    ]
    assert not hidden, "import at the top, or move what both need to where neither imports the other"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_those_below(package: str) -> None:
    above = PACKAGES[: PACKAGES.index(package)]
    for name, statements in GRAPH.items():
        if name.split(".")[0] == package:
            wrong = {target for target, _, _ in statements if target.split(".")[0] in above}
            assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize(("package", "layers"), [("ahcptq_jax", LAYERS), ("hwcost", COST_LAYERS)])
def test_rooms_import_lower_layers(package: str, layers: tuple[tuple[str, ...], ...]) -> None:
    height = {room: index for index, rooms in enumerate(layers) for room in rooms}

    def room(name: str) -> str:
        return name.split(".")[1] if "." in name else ""

    own = [name for name in MODULES if name.split(".")[0] == package]
    assert {room(name) for name in own} == set(height), "a new room has a layer, and a room that is gone has none"
    for name in own:
        for target, line, _ in GRAPH[name]:
            if target.split(".")[0] == package and room(target) != room(name):
                assert height[room(target)] < height[room(name)], f"{name} imports {target} (line {line})"


def test_the_libraries_import_without_what_commands_need() -> None:
    """OpenCV, matplotlib and pycocotools stay where commands need them."""
    code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cv2", "matplotlib", "pycocotools"):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import sam_flax, ahcptq_jax
print(sam_flax.load_sam, ahcptq_jax.quantize)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
