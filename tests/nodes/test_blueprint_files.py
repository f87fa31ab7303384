"""The blueprints are made of the templates, and hold together."""

from __future__ import annotations

import json
from typing import Any

import blueprint
import pytest

NAMES = sorted(blueprint.BLUEPRINTS)


def subgraph(name: str) -> dict[str, Any]:
    """What stands in the file of a blueprint."""
    whole = json.loads((blueprint.SUBGRAPHS / f"{name}.json").read_text("utf-8"))
    (definition,) = whole["definitions"]["subgraphs"]
    (instance,) = whole["nodes"]
    assert instance["type"] == definition["id"]
    return definition


def test_there_are_files_of_these_blueprints_alone() -> None:
    assert sorted(path.stem for path in blueprint.SUBGRAPHS.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_what_the_templates_give(name: str) -> None:
    """Else: python tests/helpers/blueprint.py"""
    assert (blueprint.SUBGRAPHS / f"{name}.json").read_text("utf-8") == blueprint.text_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_is_known_at_both_of_its_ends(name: str) -> None:
    found = subgraph(name)
    nodes = {node["id"]: node for node in found["nodes"]}
    for link in found["links"]:
        origin, target = link["origin_id"], link["target_id"]
        source = found["inputs"] if origin == blueprint.INPUTS else nodes[origin]["outputs"]
        taken = found["outputs"] if target == blueprint.OUTPUTS else nodes[target]["inputs"]
        assert link["id"] in source[link["origin_slot"]].get("linkIds", source[link["origin_slot"]].get("links"))
        end = taken[link["target_slot"]]
        assert link["id"] in end["linkIds"] if "linkIds" in end else link["id"] == end["link"]
        assert link["type"] == source[link["origin_slot"]]["type"]
    assert all(slot["linkIds"] for slot in [*found["inputs"], *found["outputs"]])
    assert all(slot["label"] for slot in found["inputs"])
