"""Imports go one way, in the order of the rooms in CONTRIBUTING.md, and in no circle."""

import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FILES = [
    file
    for pattern in ("*.py", *(f"{top}/**/*.py" for top in ("cvjax", "experiments")))
    for file in ROOT.glob(pattern)
] + [file for top in ("benchmarks", "configs") for file in (ROOT / top).glob("*.py")]


def module_name(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): ast.parse(file.read_text()) for file in FILES}


def imports_of(tree: ast.Module) -> set[str]:
    """Our modules that a module imports, wherever in it that is done."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}": node.module for alias in node.names}
            found |= {full if full in MODULES else name for full, name in names.items()}
    return found & (MODULES.keys() - {"cvjax"})


IMPORTS = {name: imports_of(tree) for name, tree in MODULES.items()}


def read_levels() -> dict[str, int]:
    """{"cvjax.nn": 5, ...}: the block of CONTRIBUTING.md that begins with "experiments"."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = [part for part in text.split("```") if part.startswith("\nexperiments")]
    lines = block.strip().splitlines()
    return {room: level for level, line in enumerate(lines) for room in line.split()}


LEVELS = read_levels()


def room_of(module: str) -> str:
    (room,) = [room for room in LEVELS if f"{module}.".startswith(f"{room}.")]
    return room


def test_every_room_has_modules():
    assert {room_of(name) for name in MODULES if name != "cvjax"} == LEVELS.keys()


def test_imports_go_down():
    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if room_of(name) != room_of(other)
        and LEVELS[room_of(name)] >= LEVELS[room_of(other)]
    ]
    assert not upwards


def test_no_imports_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # CycleError names the circle
