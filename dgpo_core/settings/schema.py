"""Which settings there are: their dotted names, types and lines of documentation."""

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, cast

from dgpo_core.settings.config import Config


@cache
def field_docs(group: type) -> Mapping[str, str]:
    """The line of documentation under each field of a dataclass of settings, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    docs = {}
    for field, text in pairwise(cast(ast.ClassDef, definition).body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[ast.unparse(field.target)] = inspect.cleandoc(str(text.value.value)).replace("\n", " ")
    return types.MappingProxyType(docs)


@cache
def types_of(group: type) -> dict[str, Any]:
    """The annotations of a dataclass of settings, ranges included, by field."""
    return typing.get_type_hints(group, include_extras=True)


def fixed_type(hint: Any) -> Any:
    """The annotation of a setting without the word "auto" that it may be left open by: `bool` for `Switch`."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next(part for part in parts if typing.get_origin(part) is not typing.Literal or len(parts) == 1)


def may_be_open(hint: Any) -> bool:
    """Whether a number or a switch may be left open by "auto"."""
    return fixed_type(hint) is not hint


@cache
def setting_types(group: type = Config, prefix: str = "") -> Mapping[str, Any]:
    """Every setting's dotted name, such as `training.lr`, and its annotation."""
    found: dict[str, Any] = {}
    for name, hint in types_of(group).items():
        group_or_type = getattr(hint, "__origin__", hint)  # what Annotated wraps
        nested = is_dataclass(group_or_type)
        found |= setting_types(group_or_type, f"{prefix}{name}.") if nested else {prefix + name: hint}
    return types.MappingProxyType(found)
