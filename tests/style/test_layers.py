"""The shape of the house: imports point down, ctypes and protobuf stay in their rooms, pieces stay small."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator

import pytest

from kit.files import slurp
from kit.verbs import SOURCES

# Each may import what stands to the left of it. A set: siblings that do not know each other.
LAYERS: list[set[str]] = [
    {"errors", "undo", "log", "limits", "options", "collector"},
    {"linux"}, {"proc"}, {"images"}, {"remote"}, {"model"},
    {"mounts", "cgroups", "idmap"},
    {"resources"}, {"engine"}, {"plugins"}, {"guest"}, {"rpc"}, {"cli"},
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Each costs milliseconds at every start of the command; what they give can be had for less.
SLOW = {"argparse", "asyncio", "dataclasses", "importlib.metadata", "inspect", "logging", "pathlib",
        "re", "subprocess", "typing"}  # fmt: skip
SLOW_ALLOWED = {
    "proc": {"re"},  # one compiled expression over a whole file beats any loop
}

MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 80


class Module:
    """One source file: ``name`` is dotted and starts with torpor, ``room`` is the layer that it lies in."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.relative = os.path.relpath(path, SOURCES)
        parts = self.relative.removesuffix(".py").split(os.sep)
        self.package = parts[:-1]
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(self.package if self.is_package else parts)
        self.room = parts[1] if len(parts) > 1 and parts[1] not in ("__init__", "__main__") else ""
        self.text = slurp(path)
        self.tree = ast.parse(self.text)

    def imports(self) -> Iterator[tuple[ast.stmt, str]]:
        """(statement, dotted name) of everything imported anywhere in the module, ``from`` names included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node, alias.name
            elif isinstance(node, ast.ImportFrom):
                base = self.package[: len(self.package) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield node, f"{origin}.{alias.name}"

    def imported_at_start(self) -> Iterator[str]:
        """Names imported when the module is, that is outside of functions and of ``if TYPE_CHECKING``."""
        early: set[ast.stmt] = set()
        todo: list[ast.AST] = list(self.tree.body)
        while todo:
            node = todo.pop()
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                todo += node.orelse
            elif isinstance(node, ast.Import | ast.ImportFrom):
                early.add(node)
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                todo += ast.iter_child_nodes(node)
        return (name for node, name in self.imports() if node in early)


def all_modules() -> list[Module]:
    return [
        Module(os.path.join(place, name))
        for place, _, names in os.walk(os.path.join(SOURCES, "torpor"))
        for name in sorted(names) if name.endswith(".py")
    ]  # fmt: skip


MODULES = all_modules()


def each(wanted: list[Module]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", wanted, ids=[module.name for module in wanted])


def room_of(dotted: str) -> str | None:
    """The layer that an imported name lies in; None when it is not ours or is the top itself."""
    parts = dotted.split(".")
    if parts[0] != "torpor" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in RANK else None


def test_there_are_modules() -> None:
    assert len(MODULES) > 10


@each([module for module in MODULES if module.room])
def test_it_lies_in_a_known_layer(module: Module) -> None:
    assert module.room in RANK, f"{module.relative}: a layer that docs/design.md does not know"


@each([module for module in MODULES if module.room])
def test_imports_point_down(module: Module) -> None:
    for node, name in module.imports():
        target = room_of(name)
        if target is None or target == module.room:
            continue
        place = f"{module.relative}:{node.lineno} imports {name}"
        assert RANK[target] <= RANK[module.room], f"{place}: that is above it"
        if RANK[target] == RANK[module.room]:
            assert RANK[target] == 0, f"{place}: a sibling"


@each([module for module in MODULES if module.room])
def test_only_linux_knows_ctypes(module: Module) -> None:
    if module.room == "linux":
        return
    for node, name in module.imports():
        assert name.split(".")[0] not in ("ctypes", "_ctypes"), f"{module.relative}:{node.lineno}"


@each([module for module in MODULES if module.room])
def test_only_images_knows_protobuf(module: Module) -> None:
    if module.room == "images":
        return
    for node, name in module.imports():
        assert not name.startswith("google."), f"{module.relative}:{node.lineno}"


@each([module for module in MODULES if module.room == "resources" and not module.is_package])
def test_resources_do_not_know_each_other(module: Module) -> None:
    """A resource may use what lies beside the folders (base, helpers for several of them) and what others are made of.

    A mapped file is a regular file, shared memory is a memfd, a FIFO is a pipe with a name; everything else
    refers to a file by its id.
    """
    folder = module.name.split(".")[:3]
    if len(folder) < 3 or folder[2] not in ("files", "task", "memory"):
        return
    for node, name in module.imports():
        parts = name.split(".")
        if parts[:2] != ["torpor", "resources"] or parts[2:3] not in (["files"], ["task"], ["memory"]):
            continue
        made_of = (
            parts[2:4] in (["files", "regular"], ["files", "memfd"], ["files", "pipe"], ["task", "creds"])
            or len(parts) == 3
        )
        if not made_of and not parts[-1].startswith("_") and not (len(parts) > 3 and parts[3].startswith("_")):
            raise AssertionError(f"{module.relative}:{node.lineno} imports {name}: refer to it by its id")


@each([module for module in MODULES if module.name == "torpor" or module.name.startswith("torpor.__")])
def test_the_top_imports_the_engine_late(module: Module) -> None:
    for name in module.imported_at_start():
        target = room_of(name)
        assert target is None or RANK[target] == 0 or module.name == "torpor.__main__", name


@each([module for module in MODULES if module.room not in ("guest", "plugins")])
def test_nothing_slow_is_imported_at_start(module: Module) -> None:
    allowed = SLOW_ALLOWED.get(module.room, set())
    for name in module.imported_at_start():
        for slow in SLOW - allowed:
            assert name != slow and not name.startswith(f"{slow}."), f"{module.relative} imports {slow}"


@each(MODULES)
def test_a_module_is_short(module: Module) -> None:
    lines = module.text.count(b"\n")
    assert lines < MODULE_LINES_MAX, f"{module.relative} has {lines} lines"


@each(MODULES)
def test_a_function_is_short(module: Module) -> None:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines < FUNCTION_LINES_MAX, f"{module.relative}:{node.lineno} {node.name} has {lines} lines"
