"""The pack in a real ComfyUI: it loads, every node explains itself, and the front end shows it without an error."""

import re
from typing import Any

import pytest
from comfy_browser import Browser
from comfy_server import REPO, ComfyServer, RequestFailed

import locales
from dgpo_core.comfy.forms import FORMS

KINDS = ("required", "optional")
SEARCHED = ("reinforcement", "rlhf", "dpo", "human feedback", "preference", "compare")
UNKNOWN = {"id": 1, "type": "NoSuchNode", "pos": [100, 100], "size": [200, 100], "flags": {}, "order": 0, "mode": 0}


@pytest.fixture(scope="session")
def nodes(comfy: ComfyServer) -> dict[str, dict[str, Any]]:
    """The pack's nodes by id, as the server describes them."""
    found = {id_: node for id_, node in comfy.object_info().items() if node["python_module"] == "custom_nodes.dgpo"}
    assert found, comfy.log()
    return found


def test_the_pack_loads(comfy: ComfyServer) -> None:
    log = comfy.log()
    assert "custom_nodes/dgpo" in log
    failed = [line for line in log.splitlines() if "IMPORT FAILED" in line]
    assert [line for line in failed if "dgpo" in line] == []  # ComfyUI's own audio nodes need a torchaudio
    assert "Error while calling comfy_entrypoint" not in log


def test_ids_and_categories(nodes: dict[str, dict[str, Any]]) -> None:
    assert [id_ for id_ in nodes if not id_.startswith("DGPO_")] == []
    assert {node["category"].split("/")[0] for node in nodes.values()} == {"DGPO"}
    assert [id_ for id_, node in nodes.items() if not node["description"] or node["display_name"] == id_] == []


def test_every_input_has_a_tooltip(nodes: dict[str, dict[str, Any]]) -> None:
    inputs = [
        (id_, name, (spec[1] if len(spec) > 1 else {}).get("tooltip"))
        for id_, node in nodes.items()
        for kind in KINDS
        for name, spec in node["input"].get(kind, {}).items()
    ]
    assert [(id_, name) for id_, name, tooltip in inputs if not tooltip] == []


def test_no_two_inputs_of_a_node_are_called_the_same(nodes: dict[str, dict[str, Any]]) -> None:
    for id_, node in nodes.items():
        called = [
            spec[1].get("display_name", name) for kind in KINDS for name, spec in node["input"].get(kind, {}).items()
        ]
        assert len(called) == len(set(called)), id_


def test_an_artist_meets_few_inputs_at_first(nodes: dict[str, dict[str, Any]]) -> None:
    def first(id_: str) -> list[str]:
        return [name for name, spec in nodes[id_]["input"]["required"].items() if not spec[1].get("advanced")]

    specs = [spec for node in nodes.values() for kind in KINDS for spec in node["input"].get(kind, {}).values()]
    if not any(spec[1].get("advanced") for spec in specs):
        pytest.skip("This ComfyUI knows no advanced inputs.")
    assert first("DGPO_TrainingSettings") == ["preset", "combine", "kl_weight", "t_min", "micro_batch", "lr"]
    assert first("DGPO_LoadPolicy") == ["model", "run", "run_seed", "rank", "alpha", "start_from"]


def test_nodes_are_found_by_the_words_that_artists_use(nodes: dict[str, dict[str, Any]]) -> None:
    found = {
        word: [id_ for id_, node in nodes.items() if word in (node.get("search_aliases") or [])] for word in SEARCHED
    }
    if not any(found.values()):
        pytest.skip("This ComfyUI knows no search aliases.")
    assert [word for word, ids in found.items() if not ids] == []


def test_the_nodes_have_the_inputs_of_their_forms(nodes: dict[str, dict[str, Any]]) -> None:
    for id_, form in FORMS.items():
        order = nodes[id_]["input_order"]
        for kind in KINDS:
            names = [name for name, entry in form.inputs.items() if entry.optional == (kind == "optional")]
            assert order.get(kind, []) == names, id_


def test_every_output_has_a_tooltip_and_a_name(nodes: dict[str, dict[str, Any]]) -> None:
    outputs = [
        (id_, *output)
        for id_, node in nodes.items()
        for output in zip(node["output_name"], node["output"], node["output_tooltips"], strict=True)
    ]
    assert [(id_, name) for id_, name, _, tooltip in outputs if not tooltip] == []
    assert [(id_, name) for id_, name, type_, _ in outputs if name == type_ and name.startswith("DGPO")] == []


def test_every_node_has_a_help_page(comfy: ComfyServer, nodes: dict[str, dict[str, Any]]) -> None:
    def is_served(id_: str) -> bool:
        try:
            return bool(comfy.get(f"/extensions/dgpo/docs/{id_}.md").strip())
        except RequestFailed:
            return False

    assert [id_ for id_ in nodes if not is_served(id_)] == []


def test_help_pages_call_inputs_as_the_screen_does(nodes: dict[str, dict[str, Any]]) -> None:
    for id_, node in nodes.items():
        page = (REPO / "nodes/web/docs" / f"{id_}.md").read_text("utf-8")
        specs = [pair for kind in KINDS for pair in node["input"].get(kind, {}).items()]
        renamed = [name for name, spec in specs if spec[1].get("display_name", name) != name]
        assert [name for name in renamed if f"**{name}**" in page and name not in node["output_name"]] == [], id_


def test_the_translations_are_of_these_nodes_and_comfyui_serves_them(
    comfy: ComfyServer, nodes: dict[str, dict[str, Any]]
) -> None:
    served = comfy.get("/i18n")
    for language, defs in locales.made(nodes):
        ours = {id_: said for id_, said in served[language]["nodeDefs"].items() if id_ in nodes}
        assert ours == defs, language


def test_the_screen_has_the_names(browser: Browser) -> None:
    """Also of sockets, and in the front end of 0.3.64, which knows no display names."""
    browser.evaluate("() => { app.graph.add(LiteGraph.createNode('DGPO_Teach')) }")
    inputs = browser.evaluate("() => app.graph.nodes[0].inputs.map(i => [i.name, i.label ?? i.localized_name])")
    assert dict(inputs)["policy"] == "other model"
    assert dict(inputs)["judge"] == "who judges"


def test_the_front_end_opens_without_an_error(browser: Browser) -> None:
    assert browser.errors() == []
    assert browser.dialogs() == []


def test_every_node_can_be_put_into_the_graph(browser: Browser, nodes: dict[str, dict[str, Any]]) -> None:
    browser.evaluate("ids => { for (const id of ids) app.graph.add(LiteGraph.createNode(id)) }", list(nodes))
    browser.load_workflow(browser.serialize())
    assert sorted(node["type"] for node in browser.serialize()["nodes"]) == sorted(nodes)
    assert browser.red_nodes() == []
    assert browser.dialogs() == []
    assert browser.errors() == []


SOCKETS = """types => types.map(type => [
    LGraphCanvas.link_type_colors[type], app.canvas.default_connection_color_byType[type],
    getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${type}`).trim()])"""


def test_the_packs_own_types_have_colours_of_their_own_in_every_theme(
    browser: Browser, nodes: dict[str, dict[str, Any]]
) -> None:
    types = sorted({type_ for node in nodes.values() for type_ in node["output"] if type_.startswith("DGPO_")})
    assert len(types) >= 6
    found = browser.evaluate(SOCKETS, types)
    assert all(len(set(places)) == 1 for places in found)  # on links, sockets, and nodes that are not on the canvas
    colours = [colour for colour, *_ in found]
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    assert len(set(colours)) == len(types)
    # WCAG 2.1 asks for 3 : 1 of what is no text; the nodes of both themes
    assert min(contrast(colour, on) for colour in colours for on in ("#ffffff", "#353535")) >= 3
    try:
        browser.set_dark(False)
        browser.page.wait_for_timeout(1000)
        assert browser.evaluate(SOCKETS, types) == found
    finally:
        browser.set_dark(True)


def contrast(colour: str, other: str) -> float:
    """Of two colours, 1 to 21, as WCAG 2.1 has it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(colour), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


TITLES = """([policy, prompts, other]) => {
    const made = [policy, prompts, other].map((name) => LiteGraph.createNode(name));
    const shown = made.map((node) => [node.renderingColor, node.renderingBgColor]);
    const saved = made.map((node) => node.serialize().color ?? null);
    for (const node of [made[0], made[2]]) node.color = "#112233";
    return { shown, saved, chosen: [made[0], made[2]].map((node) => node.renderingColor) };
}"""


def test_the_packs_nodes_have_the_colour_of_what_they_give_and_save_none(browser: Browser) -> None:
    found = browser.evaluate(TITLES, ["DGPO_LoadPolicy", "DGPO_Prompts", "KSampler"])
    assert len({tuple(colours) for colours in found["shown"]}) == 3
    assert found["saved"] == [None] * 3
    assert len(set(found["chosen"])) == 1  # what somebody chose goes before


def test_an_unknown_node_is_noticed(browser: Browser) -> None:
    browser.load_workflow({"version": 0.4, "last_node_id": 1, "last_link_id": 0, "nodes": [UNKNOWN], "links": []})
    assert browser.missing_nodes() == ["NoSuchNode"]
    assert browser.red_nodes() == ["1 NoSuchNode"]
    assert any("NoSuchNode" in text for text in browser.dialogs())
