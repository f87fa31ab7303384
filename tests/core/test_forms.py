"""The forms of the nodes: what a widget sets is a setting, and what a link needs is a node."""

import pytest

from dgpo_core.comfy.forms import AS_BELOW, FORMS, Form, Link, chosen_preset, preset_choices
from dgpo_core.settings.presets import load_preset
from dgpo_core.settings.schema import setting_types


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_widget_sets_a_setting_that_there_is_and_no_two_the_same(form: Form) -> None:
    settings = [entry.setting for entry in form.inputs.values() if not isinstance(entry, Link) and entry.setting]
    assert set(settings) <= set(setting_types())
    assert len(set(settings)) == len(settings)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_link_comes_from_a_node_that_is_read(form: Form) -> None:
    assert {entry.source for entry in form.inputs.values() if isinstance(entry, Link)} <= {*FORMS, ""}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_a_graph_may_lack_stands_behind_what_it_has(form: Form) -> None:
    optional = [entry.optional for name, entry in form.inputs.items() if name != "reward"]
    assert optional == sorted(optional)  # the front end stores the values of widgets by their places


def test_a_preset_says_how_rewards_are_combined_and_a_mode_does_not() -> None:
    assert chosen_preset(AS_BELOW) is None
    for choice in preset_choices()[1:]:
        training, combine = chosen_preset(choice)
        if choice.startswith("mode "):
            assert combine is None
        else:
            assert (training, combine) == (load_preset(choice).training, load_preset(choice).combine)
