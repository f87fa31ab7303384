"""Named servers: a file of this machine's user says where they are, so that what is shared needs to name them only.

    judge:
      url: https://api.example.com/v1
      model: some-model
      key_env: JUDGE_KEY
    card2: {url: "http://127.0.0.1:8000"}

A workflow says {"endpoint": "judge"}. So nobody else decides where pictures, prompts and keys go.
"""

import difflib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_yaml, read_text, shown
from dgpo_core.common.suggest import suggest

VARIABLE = "DGPO_ENDPOINTS"
"""The environment variable that names another file."""
MOST_BYTES = 2**20
OTHERS_WRITE = 0o002

_log = logging.getLogger(__name__)
_chosen: list[Path] = []


@dataclass(frozen=True)
class Endpoint:
    """A server, as its user describes it.

    url: its address. model: the model to ask for there; empty leaves it to the reward's options. key_env: the name of
    the environment variable that holds the key or token, never the key. request: further fields of each request.
    """

    url: str
    model: str = ""
    key_env: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)


def keep_in(path: Path) -> None:
    """Look into this file, such as the one in ComfyUI's user folder, unless the variable DGPO_ENDPOINTS names one."""
    _chosen[:] = [path]


def path() -> Path:
    """The file: what the variable says, what `keep_in` was told, or dgpo/endpoints.yaml where settings are kept."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return _chosen[0] if _chosen else _settings_folder() / "dgpo" / "endpoints.yaml"


def _settings_folder() -> Path:
    """Of the platform's user."""
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def find(name: str) -> Endpoint:
    """The endpoint of this name. Raises UserError, saying what to write where, if there is none."""
    known = read(path()) if os.path.lexists(path()) else {}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {shown(near[0], 60)!r}?)" if near else ""
        raise UserError(f"there is no endpoint {shown(name, 60)!r}{hint}: {advice(name)}")
    return known[name]


def advice(name: str = "my_server") -> str:
    """What to write where, as the end of a sentence."""
    line = f"{shown(name, 60)}: {{url: ADDRESS, model: MODEL, key_env: VARIABLE_WITH_THE_KEY}}"
    return f"write a line such as `{line}` into {path()} (model and key_env only where the server needs them)."


def read(file: Path) -> dict[str, Endpoint]:
    """All endpoints of a file. Raises UserError for whatever is wrong with it; warns where anybody may change it."""
    entries = parse_yaml(read_text(file, "The file of endpoints", MOST_BYTES), f"The file of endpoints {file}") or {}
    if not isinstance(entries, dict):
        raise UserError(f"The file of endpoints {file} must hold lines such as `my_server: {{url: ADDRESS}}`.")
    if os.name == "posix" and file.stat().st_mode & OTHERS_WRITE:
        _log.warning("Every user of this machine may change %s, and so where keys are sent: chmod o-w it.", file)
    where = f"The file of endpoints {file}:"
    return {str(name): _endpoint(entry, f"{where} {shown(name, 60)}") for name, entry in entries.items()}


def _endpoint(entry: Any, where: str) -> Endpoint:
    if not isinstance(entry, dict) or not entry.get("url"):
        raise UserError(f"{where} must have a url, as in {{url: http://127.0.0.1:8000}}.")
    known = [item.name for item in fields(Endpoint)]
    for key, value in entry.items():
        if key not in known:
            raise UserError(f"{where} has no {shown(key, 60)}{suggest(str(key), known)}")
        if not isinstance(value, dict if key == "request" else str):
            raise UserError(f"{where}: {key} must be {'fields and their values' if key == 'request' else 'a text'}.")
    return Endpoint(**entry)
