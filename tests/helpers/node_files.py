"""The files of the nodes that do not know ComfyUI, without the package around them, whose __init__ imports it."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

STUB = "dgpo_nodes"


def node_file(name: str) -> ModuleType:
    """The file `name`, such as "common.values", as a module; what it imports from its own folder comes along."""
    if STUB not in sys.modules:
        package = ModuleType(STUB)
        package.__path__ = [str(Path(__file__).parents[2] / "nodes")]
        sys.modules[STUB] = package
    return importlib.import_module(f"{STUB}.{name}")
