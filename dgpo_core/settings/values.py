"""Settings to and from plain data: dicts, lists, texts and numbers, as files, forms and widgets have them."""

import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, Literal

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.common.suggest import suggest
from dgpo_core.settings.config import AUTO, TASTE, Config, RewardTerm
from dgpo_core.settings.schema import fixed_type, may_be_open, setting_types, types_of
from dgpo_core.settings.validation import check_range


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain data for YAML and JSON, without `resume`, which says how the run was started."""
    plain = to_plain(config)
    del plain["resume"]
    return plain


def to_plain(settings: Any) -> dict[str, Any]:
    """Any dataclass of settings as plain data for YAML and JSON."""
    return _plain(asdict(settings))


def from_dict(values: Mapping[str, Any], base: Config | None = None, source: str = "settings") -> Config:
    """`base` (default: `Config()`) with `values` laid over it; nested groups may be partial.

    Raises UserError, starting with `source`, for an unknown key (naming the nearest) or a value of the wrong type.
    """
    return _read_group(base or Config(), values, "", source)


def read_settings(group: type, values: Mapping[str, Any]) -> Any:
    """One group of settings, such as `TrainingConfig`, from values that forms and widgets give: lists may be texts
    with commas. Raises UserError for a value of the wrong type or out of its range."""
    hints = types_of(group)
    given = {name: _split(value) if _is_list(hints.get(name)) else value for name, value in values.items()}
    settings = _read_group(group(), given, "", group.__name__.removesuffix("Config").lower())
    for name, hint in hints.items():
        check_range(name, hint, getattr(settings, name))
    return settings


def _is_list(hint: Any) -> bool:
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    return typing.get_origin(hint) is tuple


def _split(value: Any) -> Any:
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _read_group(base: Any, values: Any, prefix: str, source: str) -> Any:
    if not isinstance(values, Mapping):
        where = prefix.rstrip(".") or "the file"
        raise UserError(f"{source}: {where} must hold 'name: value' lines, not {_show(values)}.")
    hints = types_of(base.__class__)
    changes = {}
    for key, value in values.items():
        if key not in hints:
            known = [prefix + name for name in hints] if prefix else list(setting_types())
            name = f"{prefix}{shown(key, 60)}"
            raise UserError(f"{source}: there is no setting {name}{suggest(name, known)}")
        current = getattr(base, key)
        if is_dataclass(current):
            changes[key] = _read_group(current, value, f"{prefix}{key}.", source)
        else:
            changes[key] = _read_value(hints[key], value, f"{source}: {prefix}{key}")
    return replace(base, **changes)


def _read_value(hint: Any, value: Any, where: str) -> Any:
    if may_be_open(hint):
        if value == AUTO:
            return AUTO
        try:
            return _read_value(fixed_type(hint), value, where)
        except UserError as error:
            raise UserError(str(error).replace(", not ", f" or {AUTO}, not ", 1)) from None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _read_value(arguments[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where} must be one of {', '.join(arguments)}, not {_show(value)}.")
        return value
    if arguments and arguments[0] is RewardTerm:
        return read_rewards(value, where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as text
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kind = {float: "a number", int: "a whole number", bool: "true or false", str: "text (put it in quotes)"}[hint]
    raise UserError(f"{where} must be {kind}, not {_show(value)}.")


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where} must be a list, not {_show(value)}.")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise UserError(f"{where} must hold {len(arguments)} values, not {len(value)}.")
    return tuple(_read_value(arguments[0], item, where) for item in value)


def read_rewards(value: Any, where: str = "reward") -> tuple[RewardTerm, ...]:
    """Rewards from `"a=1,b=2?a>0.3"`, from `{a: 1.0, b: 0.5}` or from a list of `{name, weight, options, only_if}`.

    In a text, `taste=FILE` and `taste=FILE=0.5` name the file of a taste.
    """
    if isinstance(value, str):
        return tuple(_read_reward(item.strip(), where) for item in value.split(",") if item.strip())
    if isinstance(value, Mapping):
        return tuple(_read_reward({"name": name, "weight": weight}, where) for name, weight in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_read_reward(item, where) for item in value)
    raise UserError(f"{where} must be NAME=WEIGHT,... or a list of rewards, not {_show(value)}.")


def _read_reward(item: Any, where: str) -> RewardTerm:
    if isinstance(item, str):
        term, _, only_if = item.partition("?")
        name, equals, weight = term.partition("=")
        item = {"name": name.strip(), "only_if": only_if, **({"weight": weight.strip()} if equals else {})}
        if item["name"] == TASTE and equals and not _is_number(weight):
            path, _, last = weight.rpartition("=")
            weighted = bool(path) and _is_number(last)
            item |= {"weight": last if weighted else 1.0, "options": {"path": (path if weighted else weight).strip()}}
    if not isinstance(item, Mapping) or not item.get("name"):
        raise UserError(f"{where} must give each reward a name, as in pickscore=1.0, not {_show(item)}.")
    known = [field.name for field in fields(RewardTerm)]
    for key in item:
        if key not in known:
            raise UserError(f"{where}: a reward has no {key}{suggest(str(key), known)}")
    options = item.get("options") or {}
    if not isinstance(options, Mapping):
        raise UserError(f"{where}: the options of {item['name']} must be 'name: value' lines, not {_show(options)}.")
    weight = _read_value(float, item.get("weight", 1.0), f"{where}: the weight of {item['name']}")
    only_if = _read_value(str, item.get("only_if", ""), f"{where}: the condition of {item['name']}").strip()
    return RewardTerm(_read_value(str, item["name"], where), weight, dict(options), only_if)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def show_rewards(rewards: tuple[RewardTerm, ...]) -> str:
    """`"a=1.0,b=0.5?a>0.3"`: what `read_rewards` reads, without options."""
    return ",".join(f"{t.name}={t.weight:g}" + (f"?{t.only_if}" if t.only_if else "") for t in rewards)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
