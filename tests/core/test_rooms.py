"""The rooms of the code: what may import what, no circle among files, and no file too long to read."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 400  # lines
ENGINE = {  # what each folder of dgpo_core may import, besides itself; the arrows point one way
    "common": set(),
    "demo": {"common"},
    "diffusion": {"common"},
    "settings": {"common"},
    "policy": {"common", "diffusion"},
    "rewards": {"common", "demo", "settings"},
    "comfy": {"common", "rewards", "settings"},
    "people": {"common", "comfy", "rewards", "settings"},
    "method": {"common", "diffusion", "people", "policy", "rewards", "settings"},
    "evaluation": {"common", "diffusion", "method", "policy", "rewards", "settings"},
    "runs": {"comfy", "common", "evaluation", "method", "people", "policy", "rewards", "settings"},
    "benchmark": {"common", "demo", "diffusion", "evaluation", "method", "policy", "rewards", "runs", "settings"},
}
NODES = {  # the same in the pack, where the files of the nodes lie at the top; all of them may import the engine
    "common": set(),
    "on_model": {"common"},
    "runs": {"common", "on_model"},
    "": {"common", "on_model", "runs"},
}
FOREIGN = {"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "nodes", "server"}  # ComfyUI's, and ours


@cache
def modules() -> dict[str, Path]:
    """The files of the engine and the pack by their dotted names; a package is its `__init__`."""
    paths = [path for top in ("dgpo_core", "nodes") for path in (ROOT / top).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths, strict=True))


@cache
def imports(module: str) -> frozenset[str]:
    """What a file imports, also inside functions, but not for its type hints alone; absolute names."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return frozenset(name for node in _running(ast.parse(path.read_text("utf-8"))) for name in _named(node, package))


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from _running(node)


def _named(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base


def room(module: str) -> str:
    """The folder that a file lies in, below dgpo_core or nodes: "" at the top."""
    parts = modules()[module].relative_to(ROOT).parts
    return parts[1] if len(parts) > 2 else ""


@cache
def is_command(module: str) -> bool:
    """Whether it is run by itself, as `python -m dgpo_core.train` is."""
    return "\nif __name__ ==" in modules()[module].read_text("utf-8")


def edges(top: str) -> list[tuple[str, str]]:
    """What imports what among our own files, for the files of dgpo_core or of nodes."""
    ours = [module for module in modules() if module.split(".")[0] == top]
    return [(module, found) for module in ours for found in imports(module) if found in modules() and found != module]


def _listed(rooms: Iterable[str]) -> str:
    return ", ".join(sorted(rooms)) or "itself"


# --- the rules -------------------------------------------------------------------------------------------------------


def test_the_engines_folders_import_only_what_lies_below_them() -> None:
    """Commands may import anything; `dgpo_core` itself, which only knows its version, is for all."""
    wrong = [
        f"{module} imports {found}, but {room(module)} may import only {_listed(ENGINE[room(module)])}"
        for module, found in edges("dgpo_core")
        if room(module) and not is_command(module) and found != "dgpo_core"
        if room(found) not in {room(module), *ENGINE[room(module)]}
    ]
    assert wrong == []


def test_the_packs_folders_import_only_what_lies_below_them() -> None:
    wrong = [
        f"{module} imports {found}, but {room(module)} may import only {_listed(NODES[room(module)])}"
        for module, found in edges("nodes")
        if found.startswith("nodes") and room(found) not in {room(module), *NODES[room(module)]}
    ]
    assert wrong == []


def test_nothing_but_a_command_imports_a_command() -> None:
    wrong = [
        f"{module} imports {found}, which is a command"
        for module, found in edges("dgpo_core") + edges("nodes")
        if is_command(found) and not is_command(module)
    ]
    assert wrong == []


def test_the_engine_knows_neither_comfyui_nor_the_nodes() -> None:
    wrong = [
        f"{module} imports {found}"
        for module in modules()
        if module.startswith("dgpo_core")
        for found in imports(module)
        if found.split(".")[0] in FOREIGN
    ]
    assert wrong == []


def test_the_table_names_every_folder_and_points_one_way() -> None:
    for top, table in (("dgpo_core", ENGINE), ("nodes", NODES)):
        folders = {room(module) for module in modules() if module.split(".")[0] == top}
        assert folders | {""} == {*table, ""}
        assert set(TopologicalSorter(table).static_order()) == set(table)


def test_no_files_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for module, found in edges("dgpo_core") + edges("nodes"):
        graph[module].add(found)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_no_test_imports_another() -> None:
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files.values()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for name in _named(node, "")
        if name.split(".")[-1] in files
    ]
    assert wrong == []


@pytest.mark.parametrize("top", ["dgpo_core", "nodes", "tests"])
def test_no_file_is_too_long_to_read(top: str) -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in (ROOT / top).rglob("*.py")}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > LONGEST} == {}
