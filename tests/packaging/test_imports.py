"""No import circle, and arrows between the folders of ntpseg that point one way.

What counts as an import: the statements that run with the module, and for ntpseg those inside functions as well, which
only postpone a circle. Those inside ``if TYPE_CHECKING:`` never run and do not count. An arrow leads to the module that
is named (in ``from package import module`` to the inner one). That Python also runs the ``__init__`` of the packages
around it does not count, since every module would be in a circle with a package that exports its names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Folder, and the package as which its modules are imported.
PACKAGES = {"ntpseg": "ntpseg", "kernels": "ntpseg.kernels", "benchmarks": "benchmarks"}
# The layers of ntpseg from the lowest to the highest; modules directly in ntpseg are in none.
LAYERS = (
    ("utils",),
    ("kernels",),
    ("ops",),
    ("losses", "memory"),
    ("volumes",),
    ("data",),
    ("importers",),
    ("tokenizers",),
    ("models",),
    ("generation",),
    ("serving",),
    ("evaluation",),
    ("training",),
    ("cluster",),
    ("commands",),
)


def modules() -> dict[str, Path]:
    """Path of every module by its name."""
    paths = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "ntpseg" and parts[0] == "kernels":
                continue
            name = ".".join((package, *parts))
            paths[name.removesuffix(".__init__")] = path
    return paths


def statements(body: list[ast.stmt], functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run with the module and, with `functions`, with any function of it."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not functions:
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, functions)
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, field, []), functions)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, functions)


def imports(name: str, path: Path, known: dict[str, Path], *, functions: bool) -> set[str]:
    """The modules among `known` that module `name` imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body, functions):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *([base] if base else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            targets.add(inner if inner in known else base)
    return (targets & known.keys()) - {name}


def graph(*, functions: bool) -> dict[str, set[str]]:
    """For every module those that it imports."""
    known = modules()
    return {name: imports(name, path, known, functions=functions) for name, path in known.items()}


def circles(arrows: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules that import each other, directly or not (strongly connected components; Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components = set()

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(arrows[name]):
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            component = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(component) > 1:
                components.add(frozenset(component))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return components


def test_circles_are_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set()}
    assert circles(arrows) == {frozenset("abc")}
    assert circles({**arrows, "e": {"d"}}) == {frozenset("abc"), frozenset("de")}
    assert circles({"a": {"b"}, "b": set()}) == set()


@pytest.mark.parametrize("functions", [False, True])
def test_what_counts_as_an_import(tmp_path: Path, functions: bool) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import pkg.typing_only\nelse:\n    import pkg.otherwise\n"
        "try:\n    import pkg.tried\nexcept ImportError:\n    import pkg.handler\n"
        "from pkg import submodule, name\n"
        "from . import sibling\n"
        "class A:\n    import pkg.in_class\n"
        "def f():\n    import pkg.in_function\n",
        encoding="utf-8",
    )
    names = ("typing_only", "otherwise", "tried", "handler", "submodule", "sibling", "in_class", "in_function")
    known = {"pkg": path, **{f"pkg.{name}": path for name in names}}
    left_out = {"typing_only"} if functions else {"typing_only", "in_function"}
    expected = {"pkg", *(f"pkg.{name}" for name in names if name not in left_out)}
    assert imports("pkg.module", path, known, functions=functions) == expected


def test_no_import_circle() -> None:
    assert circles(graph(functions=False)) == set()


def test_no_import_circle_of_ntpseg_even_in_functions() -> None:
    ours = {name: targets for name, targets in graph(functions=True).items() if name.startswith("ntpseg")}
    assert circles({name: targets & ours.keys() for name, targets in ours.items()}) == set()


def test_arrows_point_one_way() -> None:
    levels = {f"ntpseg.{folder}": level for level, folders in enumerate(LAYERS) for folder in folders}

    def level(name: str) -> int | None:
        return levels.get(".".join(name.split(".")[:2]))

    upward = []
    for name, targets in graph(functions=True).items():
        here = level(name)
        for target in targets:
            there = level(target)
            if here is not None and there is not None and there > here:
                upward.append((name, target))
    assert upward == []


def test_every_folder_has_its_layer() -> None:
    folders = {path.parent.name for path in (ROOT / "ntpseg").glob("*/__init__.py")} - {"configs"}
    assert folders <= {folder for layer in LAYERS for folder in layer}
