"""Training Settings in a real ComfyUI's front end: a chosen preset fills the widgets, editing one leaves it."""

from typing import Any

import pytest
from comfy_browser import Browser
from comfy_server import ComfyServer

NODE = "DGPO_TrainingSettings"
AS_BELOW = "as set below"
WIDGETS = "() => Object.fromEntries(app.graph.nodes[0].widgets.map(({ name, value }) => [name, value]))"
ADD = """type => {
    const node = LiteGraph.createNode(type)
    node.pos = [300, 80]
    app.graph.add(node)
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [0, 0]
    app.canvas.setDirty(true, true)
}"""
POINT = """name => {
    const node = app.graph.nodes[0]
    const widget = node.widgets.find(widget => widget.name === name)
    const { left, top } = app.canvas.canvas.getBoundingClientRect()
    const { scale, offset } = app.canvas.ds
    const at = [node.pos[0] + node.size[0] / 2, node.pos[1] + (widget.y ?? widget.last_y) + 10]
    return [left + (at[0] + offset[0]) * scale, top + (at[1] + offset[1]) * scale]
}"""


@pytest.fixture
def presets(comfy: ComfyServer) -> dict[str, dict[str, Any]]:
    return comfy.get("/dgpo/presets")


@pytest.fixture
def page(browser: Browser) -> Browser:
    """The front end with nothing but the node."""
    browser.evaluate(ADD, NODE)
    browser.page.wait_for_timeout(500)
    return browser


def widgets(page: Browser) -> dict[str, Any]:
    """The values that the node shows."""
    return page.evaluate(WIDGETS)


def click(page: Browser, name: str) -> None:
    page.page.mouse.click(*page.evaluate(POINT, name))
    page.page.wait_for_timeout(300)


def choose(page: Browser, name: str, option: str) -> None:
    """Picks an option of a combo with the mouse."""
    click(page, name)
    page.page.locator(".litecontextmenu .litemenu-entry").get_by_text(option, exact=True).click()
    page.page.wait_for_timeout(300)


def write(page: Browser, name: str, text: str) -> None:
    """Types into a number or text widget."""
    click(page, name)
    page.page.locator(".graphdialog .value").fill(text)
    page.page.keyboard.press("Enter")
    page.page.wait_for_timeout(300)


def test_the_route_and_the_node_know_the_same(comfy: ComfyServer, presets: dict[str, dict[str, Any]]) -> None:
    both = comfy.object_info()[NODE]["input"]
    inputs = {**both["required"], **both["optional"]}
    preset, settings = inputs["preset"], set(inputs) - {"preset"}
    options = preset[0] if isinstance(preset[0], list) else preset[1]["options"]
    assert options == [AS_BELOW, *presets]
    for name, values in presets.items():
        assert set(values) == settings - ({"combine"} if name.startswith("mode ") else set())


def test_a_chosen_preset_fills_the_widgets(page: Browser, presets: dict[str, dict[str, Any]]) -> None:
    choose(page, "preset", "sd35m-pickscore-curve")
    assert widgets(page) == {"preset": "sd35m-pickscore-curve", **presets["sd35m-pickscore-curve"]}
    choose(page, "combine", "normalised")
    choose(page, "preset", "mode 2b")
    assert widgets(page) == {"preset": "mode 2b", "combine": "normalised", **presets["mode 2b"]}
    assert page.to_api()["1"]["inputs"] == widgets(page)
    choose(page, "preset", AS_BELOW)
    assert widgets(page) == {"preset": AS_BELOW, "combine": "normalised", **presets["mode 2b"]}
    assert page.errors() == []


@pytest.mark.parametrize(
    ("name", "text", "value"), [("beta", "12", 12), ("timesteps", "2", 2), ("betas", "0.8, 0.9", "0.8, 0.9")]
)
def test_editing_a_widget_leaves_the_preset(
    page: Browser, presets: dict[str, dict[str, Any]], name: str, text: str, value: Any
) -> None:
    choose(page, "preset", "quickstart")
    write(page, name, text)
    assert widgets(page) == {"preset": AS_BELOW, **presets["quickstart"], name: value}
    assert page.errors() == []


def test_choosing_in_another_combo_leaves_the_preset(page: Browser) -> None:
    choose(page, "preset", "quickstart")
    choose(page, "advantage_std", "group")  # as it is
    assert widgets(page)["preset"] == "quickstart"
    choose(page, "advantage_std", "global")
    assert widgets(page)["preset"] == AS_BELOW


def test_what_a_mode_leaves_open_can_be_set_with_it(page: Browser) -> None:
    choose(page, "preset", "mode 1")
    choose(page, "combine", "normalised")
    assert widgets(page)["preset"] == "mode 1"


def test_undo_takes_the_preset_and_its_values_back(page: Browser) -> None:
    write(page, "beta", "7")
    before = widgets(page)
    choose(page, "preset", "quickstart")
    page.page.keyboard.press("Control+z")
    page.page.wait_for_timeout(1000)
    assert widgets(page) == before


def test_loading_a_file_changes_nothing_in_it(page: Browser, presets: dict[str, dict[str, Any]]) -> None:
    values = {"preset": "quickstart", **presets["quickstart"], "beta": 3.0}
    page.evaluate("values => { for (const w of app.graph.nodes[0].widgets) w.value = values[w.name] }", values)
    page.load_workflow(page.serialize())
    assert widgets(page) == values


def test_loading_a_file_in_api_format_keeps_its_preset(page: Browser, presets: dict[str, dict[str, Any]]) -> None:
    values = {"preset": "quickstart", **presets["quickstart"], "beta": 3.0}
    page.load_api({"1": {"class_type": NODE, "inputs": values}})
    assert widgets(page) == values
    last = {name: values[name] for name in reversed(values)}
    page.load_api({"1": {"class_type": NODE, "inputs": last}})
    assert widgets(page)["preset"] == "quickstart"
    write(page, "beta", "5")
    assert widgets(page)["preset"] == AS_BELOW


def test_editing_beside_a_preset_that_comes_over_a_link_says_which_of_them_counts(page: Browser) -> None:
    page.evaluate("() => { app.graph.nodes[0].inputs.find(input => input.widget?.name === 'preset').link = 99 }")
    write(page, "beta", "7")
    assert widgets(page)["beta"] == 7
    assert any("The preset comes from outside this node" in text for text in page.dialogs())


def test_in_nodes_that_are_not_drawn_on_the_canvas(browser: Browser, presets: dict[str, dict[str, Any]]) -> None:
    browser.set_setting("Comfy.VueNodes.Enabled", True)
    try:
        browser.evaluate(ADD, NODE)
        browser.page.wait_for_timeout(1000)
        if not browser.page.get_by_role("combobox", name="preset").count():
            pytest.skip("This front end draws nodes on the canvas only.")  # 1.27 has the setting, but shows nothing
        browser.page.get_by_role("combobox", name="preset").click()
        browser.page.get_by_role("option", name="quickstart", exact=True).click()
        browser.page.wait_for_timeout(300)
        assert widgets(browser) == {"preset": "quickstart", **presets["quickstart"]}
        assert not browser.page.get_by_label("betas").count()
        browser.page.get_by_text("Show advanced inputs").click()
        browser.page.get_by_label("betas").fill("0.8, 0.9")
        browser.page.get_by_label("betas").press("Enter")
        browser.page.wait_for_timeout(300)
        assert widgets(browser) == {"preset": AS_BELOW, **presets["quickstart"], "betas": "0.8, 0.9"}
        assert browser.page.get_by_role("combobox", name="preset").inner_text() == AS_BELOW
    finally:
        browser.set_setting("Comfy.VueNodes.Enabled", False)
