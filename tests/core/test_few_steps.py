"""The embedded model of few steps, and what is measured on it."""

import pytest
import tiny
import torch

from dgpo_core.benchmark.few_steps import STEPS, WAYS, Seen, settings, sharpness, table
from dgpo_core.demo.distil import DistilConfig, levels_of
from dgpo_core.method.step import Step, StepSettings
from dgpo_core.policy import load_policy
from dgpo_core.runs import assemble
from dgpo_core.settings.config import EMBEDDED, Config, ModelConfig
from dgpo_core.settings.validation import validate

pytestmark = pytest.mark.slow


def test_the_embedded_few_step_lora_says_what_it_was_made_for() -> None:
    policy, _ = assemble.load_model(Config(model=ModelConfig(few_step_lora=EMBEDDED)), "cpu")
    assert policy.few_steps
    assert policy.few_steps.steps == STEPS == DistilConfig().student_steps


def test_every_way_can_be_trained() -> None:
    policy, size = assemble.load_model(settings("plain", 0), "cpu")
    for way in WAYS:
        config = settings(way, 0)
        validate(config)
        Step(policy, StepSettings.of(config), size=size)  # raises where its timesteps do not fit


def test_sharpness_is_of_the_edge_and_not_of_what_is_beside_it() -> None:
    """One step in brightness of height 0.8 has a slope of 0.4 on the two pixels beside it; a ramp over four has 0.2."""
    step, ramp, both = (torch.zeros(1, 3, 8, 16) for _ in range(3))
    step[..., 8:] = 0.8
    ramp[..., 6:] = torch.tensor([0.2, 0.4, 0.6, *[0.8] * 7])
    both[..., 4:] = 0.4  # of half the height, so half the slope
    assert sharpness(step).allclose(torch.tensor([0.4]))
    assert sharpness(both).allclose(torch.tensor([0.2]))
    assert 0.1 < sharpness(ramp).item() < 0.2 + 1e-6
    assert sharpness(torch.full((1, 3, 8, 8), 0.5)).item() == 0.0


def test_the_table_compares_each_run_with_its_own_start() -> None:
    seen = [Seen("plain", 1, 0, 0.5, 0.1, 0.2, 0.4), Seen("plain", 1, 40, 0.9, 0.12, 0.19, 0.3)]
    rows = table(seen).splitlines()
    assert len(rows) == 3
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| plain | 1 | 40 | 0.500 to 0.900 | 0.1000 to 0.1200 (+20.0%) |")
    assert "(-5.0%)" in rows[2]
    assert "(-25.0%)" in rows[2]


def test_the_students_levels_are_those_that_its_steps_are_drawn_at() -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2)
    levels = levels_of(policy, 3)
    assert len(levels) == 4
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    assert (levels.diff() < 0).all()
