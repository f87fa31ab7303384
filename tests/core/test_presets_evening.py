"""The presets for an evening: at most a minute an iteration and two hours in all on a card of 24 GB, counted."""

import pytest

from dgpo_core.benchmark.cards import CARDS
from dgpo_core.benchmark.report import ITERATION, Report
from dgpo_core.settings.config import EMBEDDED, Config
from dgpo_core.settings.presets import load_preset
from dgpo_core.settings.resuming import left_open
from dgpo_core.settings.values import from_dict

EVENING = ("sd15", "sd21", "sdxl", "sd35m", "zimage", "wan", "flux")
LIKE_ANOTHER = ("sdxl-vpred",)  # costs what sdxl costs
CARD = CARDS["RTX 4090"]  # 165 TFLOP/s, of which 40 % are reached


@pytest.mark.slow
@pytest.mark.parametrize("name", EVENING)
def test_an_evening_is_at_most_a_minute_an_iteration_and_two_hours(name: str) -> None:
    config = from_dict({"data": {"prompts": EMBEDDED}}, load_preset(name))  # a preset names none
    report = Report.of(config, "", CARD, 0)
    took = report.seconds(report.fitted)
    assert report.fits
    assert report.changes == []  # what auto chose fits as it is
    assert sum(took[phase] for phase in ITERATION) <= 60
    assert report.hours(report.fitted) <= 2


@pytest.mark.parametrize("name", EVENING + LIKE_ANOTHER)
def test_an_evening_leaves_to_the_card_what_the_card_decides(name: str) -> None:
    assert left_open(load_preset(name)) == left_open(Config())
