"""Presets and modes: settings that the package brings, one YAML file each."""

from dataclasses import replace
from importlib.resources import files

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_yaml
from dgpo_core.common.suggest import suggest
from dgpo_core.settings.config import Config
from dgpo_core.settings.yaml_file import laid_over

MODES = ("1", "2a", "2b")
"""The official README's three modes; `presets/modes/` holds what each one sets."""

_FOLDER = files(__name__)


def preset_names() -> list[str]:
    """What `--preset` takes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str, base: Config | None = None) -> Config:
    """The preset `name`, laid over `base`; its run is called after it. Raises UserError for an unknown name."""
    if name not in preset_names():
        raise UserError(f"There is no preset {name}{suggest(name, preset_names())}")
    return replace(_shipped(f"{name}.yaml", base, f"preset {name}"), name=name)


def apply_mode(config: Config, mode: str) -> Config:
    """`config` with the settings of mode 1, 2a or 2b (roll-outs with or without CFG, frozen or moving reference)."""
    if mode not in MODES:
        raise UserError(f"There is no mode {mode}; known: {', '.join(MODES)}.")
    return _shipped(f"modes/mode-{mode}.yaml", config, f"mode {mode}")


def _shipped(name: str, base: Config | None, source: str) -> Config:
    """What one of the package's own files lays over `base`."""
    return laid_over(base, parse_yaml(_FOLDER.joinpath(name).read_text(encoding="utf-8"), source), source)
