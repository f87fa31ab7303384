"""When the alarm goes off: the rule on hand-made evaluations, and on the embedded model, hacked and honest."""

import json
from pathlib import Path

import pytest
import torch
from bright import Bright

from dgpo_core import train
from dgpo_core.evaluation import alarm
from dgpo_core.evaluation.scores import Evaluation, Gain
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.rewards import REWARDS
from dgpo_core.runs.checkpoint import best_checkpoint, load_checkpoint

TRAINED = {"trained": 1.0}
N = 64


def history(**scores: list[float]) -> list[Evaluation]:
    """Evaluations every 10 iterations whose images score `scores` on average, in pairs of two prompts' images.

    What differs from image to image is the same in every evaluation but for a tenth, as with equal seeds.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(N, generator=generator)
    places = torch.tensor([(i // 2, i % 2) for i in range(N)])
    length = len(next(iter(scores.values())))

    def row(mean: float) -> torch.Tensor:
        off = 0.1 * images + 0.01 * torch.randn(N, generator=generator)
        return mean + off - off.mean()

    rows = [{name: row(means[i]) for name, means in scores.items()} for i in range(length)]
    return [Evaluation(10 * i, places, row) for i, row in enumerate(rows)]


def gone(name: str, trained: list[float], watched: list[float]) -> list[alarm.Alarm]:
    return alarm.alarms(history(trained=trained, **{name: watched}), TRAINED, [name])


RISING = [0.1, 0.2, 0.3, 0.4, 0.5]


def test_a_watched_reward_that_falls_while_the_trained_one_rises_is_told_in_plain_words() -> None:
    (found,) = gone("aesthetic", RISING, [5.0, 5.2, 5.1, 5.0, 4.9])
    # best at iteration 10, lower at 20 and at 30
    assert (found.name, found.since, found.iteration) == ("aesthetic", 10, 30)
    assert str(found) == (
        "the reward may be hacked: since iteration 10 the reward that is trained rose from 0.2 to 0.4 on held-out"
        " prompts, while aesthetic, which is only watched, fell from 5.2 to 5"
    )


@pytest.mark.parametrize(
    ("trained", "watched", "why"),
    [
        (RISING, [5.0, 5.1, 5.2, 5.3, 5.4], "both rise"),
        (RISING, [5.0, 4.8, 5.0, 4.8, 5.0], "never low twice in a row"),
        (RISING, [5.0, 4.999, 4.998, 4.999, 4.998], "less than the noise"),
        ([0.1, 0.1, 0.1, 0.1, 0.1], [5.0, 4.8, 4.6, 4.4, 4.2], "the trained one does not rise"),
        ([0.1, 0.5, 0.4, 0.3, 0.2], [5.0, 5.2, 5.0, 4.8, 4.6], "both fall: the training fails"),
    ],
)
def test_it_is_silent(trained: list[float], watched: list[float], why: str) -> None:
    assert gone("aesthetic", trained, watched) == [], why


class Blemishes(Bright):
    """A reward of which less is better."""

    higher_is_better = False


def test_a_watched_reward_of_which_less_is_better_falls_where_it_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "blemishes", f"{__name__}:Blemishes")
    (found,) = gone("blemishes", RISING, [5.0, 4.8, 4.9, 5.0, 5.1])
    assert "which is only watched, rose from 4.8 to 5" in str(found)
    assert gone("blemishes", RISING, [5.0, 4.9, 4.8, 4.7, 4.6]) == []


@pytest.mark.parametrize(
    ("name", "watched", "expected"),
    [
        ("edge_density", [0.06, 0.05, 0.04, 0.035, 0.035], 0),  # a lot, but more than half
        ("edge_density", [0.06, 0.05, 0.02, 0.02, 0.02], 30),
        ("edge_density", [0.06, 0.2, 0.2, 0.2, 0.2], 20),  # grids and noise
        ("saturation", [0.1, 0.15, 0.19, 0.25, 0.3], 40),
        ("entropy", [7.0, 6.5, 6.2, 6.1, 6.1], 0),
        ("entropy", [7.0, 6.5, 5.9, 5.8, 5.8], 30),
        ("group_diversity", [0.2, 0.1, 0.08, 0.06, 0.06], 0),  # honest training takes a part of it
        ("group_diversity", [0.2, 0.1, 0.04, 0.04, 0.04], 30),
    ],
)
def test_a_statistic_may_change_within_the_bases_range(name: str, watched: list[float], expected: int) -> None:
    assert [found.iteration for found in gone(name, RISING, watched)] == ([expected] if expected else [])


@pytest.mark.slow
def test_noise_alone_seldom_sets_it_off() -> None:
    """Ten evaluations of 64 images at which the watched reward only trembles, as a trained adapter's does."""
    generator = torch.Generator().manual_seed(1)
    places = torch.tensor([(i // 2, i % 2) for i in range(N)])

    def run() -> list[Evaluation]:
        trained, watched = (torch.randn(10, N, generator=generator) for _ in range(2))
        trained += torch.arange(10.0)[:, None]
        return [Evaluation(i, places, {"trained": trained[i], "w": watched[i]}) for i in range(10)]

    fired = sum(bool(alarm.alarms(run(), TRAINED, ["w"])) for _ in range(300))
    assert fired <= 6  # 2 %, though every run is looked at nine times and compared with its luckiest evaluation


def test_the_best_is_the_highest_before_the_decline() -> None:
    looked = history(trained=RISING, aesthetic=[5.0, 5.2, 5.3, 5.0, 4.9])
    assert alarm.best(looked, TRAINED, ["aesthetic"]).iteration == 20
    assert alarm.best(looked, TRAINED, []).iteration == 40
    assert (
        alarm.best(history(trained=RISING, aesthetic=[5.0, 4.8, 4.6, 4.4, 4.2]), TRAINED, ["aesthetic"]).iteration == 0
    )


def test_a_gain_is_paired_and_knows_the_noise_of_prompts() -> None:
    prompts = torch.arange(100) // 2
    generator = torch.Generator().manual_seed(0)
    by_prompt = torch.randn(50, generator=generator).repeat_interleave(2)
    alone = torch.randn(100, generator=generator)
    # n images that rise and fall in pairs are half as many
    assert Gain.of(by_prompt, prompts).sem == pytest.approx(float(by_prompt[::2].std()) / 50**0.5, rel=1e-6)
    assert Gain.of(alone, torch.arange(100)).sem == pytest.approx(float(alone.std()) / 10, rel=1e-6)


def test_only_images_of_the_same_prompt_and_seed_are_compared(tmp_path: Path) -> None:
    few = Evaluation(10, torch.tensor([(0, 0), (1, 0)]), {"a": torch.tensor([1.0, 3.0])})
    many = Evaluation(0, torch.tensor([(1, 0), (0, 1), (0, 0)]), {"a": torch.tensor([0.0, 100.0, 0.5])})
    gain = few.gain(many, {"a": 2.0})
    assert (gain.mean, gain.n) == (pytest.approx(2 * (0.5 + 3.0) / 2), 2)
    many.save(tmp_path / "e.safetensors")
    again = Evaluation.load(tmp_path / "e.safetensors")
    assert (again.iteration, again.places.tolist(), again.scores["a"].tolist()) == (
        0,
        many.places.tolist(),
        [0, 100, 0.5],
    )


# --- on the embedded model -------------------------------------------------------------------------------------------

SMALL = ["--data.groups_per_iteration", "4", "--rollout.group_size", "8", "--rollout.batch", "32",
         "--evaluation.images", "48", "--evaluation.final_images", "48", "--training.micro_batch", "32"]  # fmt: skip


def short(folder: Path, monkeypatch: pytest.MonkeyPatch, *argv: str) -> Path:
    """A short training of the quickstart; its folder."""
    monkeypatch.chdir(folder)
    assert train.main([*SMALL, *argv]) == 0
    return folder / "runs/quickstart"


def records(run: Path) -> list[dict]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "held_out" in r]


@pytest.mark.slow
def test_a_hackable_reward_sets_it_off_and_the_best_adapter_before_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """White paper is brighter than any shapes: what is asked for and the edges go."""
    argv = ["--reward", "brightness", "--iterations", "60", "--evaluation.every", "4", "--evaluation.on_alarm", "stop"]
    run = short(tmp_path, monkeypatch, *argv)
    summary = json.loads((run / "summary.json").read_text())
    looks = records(run)
    said = capsys.readouterr().out
    assert "the reward may be hacked: since iteration" in said
    assert "while shapes, which is only watched, fell from" in said
    assert summary["stopped_at"] == looks[-1]["iteration"] < 60
    assert looks[-1]["in_domain"]["gain"] > 0 > looks[-1]["watch/shapes"]["gain"]
    kept, info = load_checkpoint(best_checkpoint(run / "checkpoints"))
    assert info["step"] == summary["iterations"] < summary["stopped_at"]
    saved = lora_file.read(run / "lora.safetensors")
    assert saved.metadata["dgpo.step"] == str(info["step"])
    for module, (a, _) in saved.weights.items():
        torch.testing.assert_close(a, kept[f"ema/{module.removeprefix('transformer.')}.lora_A.weight"])
    before = (run / "lora.safetensors").read_bytes()
    assert train.main([*SMALL, *argv, "--resume"]) == 0  # comes to the same end
    assert (run / "lora.safetensors").read_bytes() == before


@pytest.mark.slow
def test_an_honest_reward_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--iterations", "24", "--evaluation.every", "6", "--data.groups_per_iteration", "8"]
    run = short(tmp_path, monkeypatch, *argv, "--evaluation.images", "96", "--evaluation.final_images", "96")
    assert "may be hacked" not in capsys.readouterr().out
    assert all("alarms" not in look for look in records(run))
    last = records(run)[-1]
    assert last["in_domain"]["gain"] > 3 * last["in_domain"]["gain_sem"]  # it did learn, so the rule was asked
    names = {"watch/shapes", "watch/edge_density", "watch/entropy", "watch/saturation", "watch/group_diversity"}
    assert names <= last.keys()
    assert "alarms" not in json.loads((run / "summary.json").read_text())
