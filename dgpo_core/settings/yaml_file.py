"""Settings as YAML files."""

from pathlib import Path
from typing import Any

import yaml

from dgpo_core.common.reading import parse_yaml, read_text, shown
from dgpo_core.settings.config import Config
from dgpo_core.settings.values import from_dict, to_dict

MOST_BYTES = 2**20
"""Of a file of settings."""


def to_yaml(config: Config) -> str:
    """The resolved settings as a YAML file that `load_yaml` and `--config` read back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def load_yaml(path: str | Path, base: Config | None = None) -> Config:
    """Settings from the file at `path`, laid over `base`. Raises UserError for whatever is wrong with the file."""
    what = f"The settings file {shown(path)}"
    return laid_over(base, parse_yaml(read_text(path, "The settings file", MOST_BYTES), what), str(path))


def laid_over(base: Config | None, values: Any, source: str) -> Config:
    """What a YAML file, which may be empty, lays over `base`; errors begin with `source`."""
    return from_dict({} if values is None else values, base, source)
