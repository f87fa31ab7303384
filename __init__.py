"""DGPO as a ComfyUI node pack: `nodes/` holds the nodes, `dgpo_core/` the engine that they call.

ComfyUI imports this file by its path. The engine is put into `sys.modules` under its own name, and nothing onto
`sys.path`: a folder called `nodes` there would shadow ComfyUI's own `nodes.py`.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent
LEAST_COMFYUI = (0, 3, 64)
WEB_DIRECTORY = "./nodes/web"


def _import_engine() -> None:
    """`import dgpo_core` gives the engine beside this file, whatever else is installed."""
    folder = ROOT / "dgpo_core"
    spec = importlib.util.spec_from_file_location(
        "dgpo_core", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["dgpo_core"] = module
    spec.loader.exec_module(module)


def _require_comfyui() -> None:
    """Raises ImportError in one sentence where ComfyUI is too old for these nodes."""
    import comfyui_version

    found = tuple(int(part) for part in comfyui_version.__version__.split(".")[:3] if part.isdigit())
    if found < LEAST_COMFYUI:
        least = ".".join(map(str, LEAST_COMFYUI))
        raise ImportError(
            f"The DGPO nodes need ComfyUI {least} or newer, not {comfyui_version.__version__}: update it."
        )


if "folder_paths" in sys.modules:  # ComfyUI; not where a test runner imports the root, by whatever name its folder has
    _require_comfyui()
    _import_engine()

    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
