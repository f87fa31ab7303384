"""Training on rated images alone: what an iteration takes, what it learns, and that nothing is drawn."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import rated_folder
import tiny
import torch
from engine import SIZE, accumulate, make_tasks, quick, weights, write_quick
from PIL import Image
from processes import finish, start, train_in, wait_for
from torch import Tensor

from dgpo_core import evaluate, train
from dgpo_core.common.errors import UserError
from dgpo_core.method.offline import RatedGroups, read_images
from dgpo_core.method.trainer import Trainer
from dgpo_core.people.gallery import RatedGroup, read_gallery
from dgpo_core.policy.pipeline import DiffusersPolicy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five groups of two to four noisy pictures, larger than the training's, each brighter than the one before."""
    made, rng = tmp_path / "art", random.Random(1)
    made.mkdir()
    rows = []
    for g, (prompt, size) in enumerate([("red", 2), ("blue", 4), ("a fox", 3), ("an owl", 2), ("red blue", 3)]):
        for i in range(size):
            name = f"{g}-{i}.png"
            pixels = bytes(min(255, 60 * i + rng.randrange(60)) for _ in range(3 * 22 * 20))
            Image.frombytes("RGB", (22, 20), pixels).save(made / name)
            rows.append(f"{name},{i},{prompt}\n")
    (made / "ratings.csv").write_text("file,rating,prompt\n" + "".join(rows))
    return made


def rated(folder: Path, per_iteration: int = 2, seed: int = 0, **more: Any) -> RatedGroups:
    return RatedGroups(read_gallery(folder).groups, per_iteration, seed, **more)


# --- what an iteration takes -----------------------------------------------------------------------------------------


def test_every_group_comes_once_per_round_in_an_order_of_the_seed(folder: Path) -> None:
    source = rated(folder, per_iteration=5)
    rounds = [[group.prompt for group in source.at(i)] for i in range(3)]
    assert len({tuple(sorted(one)) for one in rounds}) == 1
    assert len({tuple(one) for one in rounds}) == 3
    assert [group.prompt for group in rated(folder, 5).at(2)] == rounds[2]  # without what came before
    assert [group.prompt for group in rated(folder, 5, seed=1).at(0)] != rounds[0]


def test_edits_are_trained_with_the_pictures_that_they_are_made_of(tmp_path: Path) -> None:
    for i, name in enumerate(("before", "a", "b")):
        Image.effect_noise((tiny.SIZE, tiny.SIZE), 20 + 40 * i).convert("RGB").save(tmp_path / f"{name}.png")
    rows = "".join(f"{name}.png,{i},red,before.png\n" for i, name in enumerate("ab"))
    (tmp_path / "all.csv").write_text("file,rating,prompt,source\n" + rows)
    size, policy = (tiny.SIZE, tiny.SIZE), tiny.shared("kontext")
    prompts = read_gallery(tmp_path).prompts
    policy.check_sources(prompts, size)
    trainer = Trainer(policy, prompts, {}, quick(reward="ratings", training={"lr": 1e-3}), size=size)
    group = rated(tmp_path).load(read_gallery(tmp_path).groups[0], policy, size)
    assert torch.equal(group.sources[0], prompts[0].sources[0].image())
    assert trainer.iterate_rated(rated(tmp_path)).metrics["grad_norm"] > 0
    with pytest.raises(UserError, match=r"all\.csv:2: .* brings 1 picture, but .* sd3 draws from text"):
        tiny.shared("sd3").check_sources(prompts, size)


def test_an_iteration_takes_no_group_twice(folder: Path) -> None:
    assert len(rated(folder, per_iteration=8).at(0)) == 5


def test_images_are_scaled_and_cropped_at_the_centre(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (40, 10), "black")
    wide.paste("white", (12, 0, 28, 10))  # the square in the middle, with some room for what the filter sees
    wide.save(tmp_path / "wide.png")
    (image,) = read_images([tmp_path / "wide.png"], (16, 16))
    assert image.shape == (3, 16, 16)
    assert image.min() == 1.0


def test_a_group_is_encoded_once_and_what_was_not_used_for_longest_is_forgotten(
    folder: Path, policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    real = policy.encode_images
    monkeypatch.setattr(policy, "encode_images", lambda images: encoded.append(len(images)) or real(images))
    one = policy.latent_shape(*SIZE)
    room = 4 * 7 * one[0] * one[1] * one[2]  # bytes of 7 images' latents
    source = rated(folder, most_cached=room)
    by_prompt = {group.prompt: group for group in read_gallery(folder).groups}

    def load(prompt: str) -> Tensor:
        return source.load(by_prompt[prompt], policy, SIZE).latents

    first = load("blue")
    assert torch.equal(load("blue"), first)
    load("a fox")
    assert encoded == [4, 3]
    load("blue")
    load("red")  # 4 + 3 + 2 images are too many: the fox goes
    load("blue")
    assert encoded == [4, 3, 2]
    load("a fox")
    assert encoded == [4, 3, 2, 3]
    torch.testing.assert_close(first, real(read_images(by_prompt["blue"].files, SIZE)))


def test_an_image_that_has_gone_is_named(folder: Path, policy: DiffusersPolicy) -> None:
    source = rated(folder)
    (folder / "0-0.png").unlink()
    with pytest.raises(UserError, match="The image .*0-0.png cannot be read"):
        source.load(RatedGroup("red", (folder / "0-0.png",), (1.0,)), policy, SIZE)


# --- groups of unequal sizes -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [64, 5, 2])
def test_groups_of_unequal_sizes_weigh_the_same_each(policy: DiffusersPolicy, micro_batch: int) -> None:
    settings = quick().training
    tasks = [*make_tasks(policy, G=3), *make_tasks(policy, G=5), *make_tasks(policy, G=3)]
    whole, tally = accumulate(policy, tasks, settings, micro_batch)
    alone = sum(accumulate(policy, [task], settings)[0] for task in tasks) / len(tasks)
    assert tally.samples == sum(len(task.group) for task in tasks)
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-6)  # sums of float32 in another order


@pytest.mark.slow
def test_an_iteration_draws_nothing_and_learns_to_prefer(
    folder: Path, policy: DiffusersPolicy, monkeypatch: Any
) -> None:
    config = quick(groups=str(folder), reward="ratings", training={"kl_weight": 0.0, "timesteps": 3})
    trainer = _trainer(policy, config)
    monkeypatch.setattr(trainer.step, "draw", lambda *_: pytest.fail("something was drawn"))
    monkeypatch.setattr(policy, "decode", lambda *_: pytest.fail("something was decoded"))
    source, before = rated(folder, per_iteration=5), weights(policy, "current")
    done = [trainer.iterate_rated(source) for _ in range(15)]
    assert not torch.equal(weights(policy, "current"), before)
    assert done[0].metrics["reward"] == pytest.approx((0 + 1) * 2 / 14 + (0 + 1 + 2 + 3) / 14 + (0 + 1 + 2) * 2 / 14)
    assert set(done[0].seconds) == {"images", "encode", "update"}
    assert done[0].metrics["informative"] == 1.0
    # the loss is sum_i A_i d_i: where it falls, the preferred images fit better and the others worse
    assert sum(d.metrics["loss"] for d in done[-3:]) < sum(d.metrics["loss"] for d in done[:3])


def _trainer(policy: DiffusersPolicy, config: Any) -> Any:
    from dgpo_core.common.prompts import Prompt
    from dgpo_core.method.trainer import Trainer

    return Trainer(policy, [Prompt("red")], {}, config, size=SIZE)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_trains_from_the_command_line(
    folder: Path, tmp_path: Path, sd3_folder: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(folder / "unrated.png")
    argv = [*write_quick(tmp_path, sd3_folder, reward="shapes"), "--groups", "art", "--data.prompts", ""]
    assert train.main(argv) == 0
    told = capsys.readouterr().out
    assert "Left out: 1 image has no rating." in told
    summary = json.loads((tmp_path / "runs/test/summary.json").read_text())
    assert summary.keys() == {"reward", "seconds", "iterations"}  # ratings measure nothing
    assert summary["reward"] == "ratings"
    assert len(list((tmp_path / "runs/test/samples").iterdir())) == 3
    measure = ["--lora", "runs/test/lora.safetensors", "--images", "4", "--model", str(sd3_folder)]
    measure += ["--prompts", "held_out.txt"]
    assert evaluate.main(measure) == 2
    assert "was on what people said: give a reward that can measure it with --reward" in capsys.readouterr().err
    assert evaluate.main([*measure, "--reward", "brightness"]) == 0
    before = contents(tmp_path / "runs/test")
    table = folder / "ratings.csv"
    table.write_text(table.read_text().replace("1-0.png,0", "1-0.png,9"))
    assert train.main(["--resume", "--name", "test", "--iterations", "5"]) == 2
    assert "The ratings in art are not those that the run began with" in capsys.readouterr().err
    assert contents(tmp_path / "runs/test") == before


def contents(run: Path) -> dict[Path, bytes]:
    """All files of a run but its settings, whose number of iterations a resume may raise."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--groups", "nowhere"], "There is no folder nowhere"),
        (["--groups", "art", "--reward", "pickscore"], "Ratings are the reward of --groups: leave --reward out"),
        (["--reward", "ratings"], "needs a folder of rated images: give it with --groups FOLDER."),
        (["--groups", "art", "--evaluation.reward", "ratings"], "name one that can score images by itself."),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    options: list[str], sentence: str, folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = write_quick(tmp_path, tmp_path / "no model")
    assert train.main([*argv, *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_killed_run_ends_as_if_nothing_had_happened(folder: Path, tmp_path: Path, sd3_folder: Path) -> None:
    argv = [*write_quick(tmp_path, sd3_folder, iterations=6, evaluation={"every": 0}), "--groups", "art"]
    assert train_in(tmp_path, [*argv, "--name", "whole"]) == 0
    metrics = tmp_path / "runs/test/metrics.jsonl"
    process = start(tmp_path, argv)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("reward_std") >= 3, process)
    process.kill()
    finish(process)
    assert train_in(tmp_path, [*argv, "--resume"]) == 0, (tmp_path / "output-0.txt").read_text()
    runs = [tmp_path / "runs" / name for name in ("whole", "test")]
    records = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for record in (*records[0], *records[1]):
        record.pop("seconds")
    assert records[0] == records[1]
    one, two = (train_lora(run) for run in runs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def train_lora(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "lora.safetensors")


# --- does it help? ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> list[Any]:
    """What the embedded model draws, with the verifier's opinion of it."""
    return rated_folder.draw(prompts=32, size=8)


@pytest.mark.slow
def test_every_form_is_the_same_groups(drawn: list[Any], tmp_path: Path) -> None:
    found = {}
    for form in ("sidecar", "csv", "comfy", "jsonl"):
        rated_folder.write(tmp_path / form, drawn, form)
        groups = read_gallery(tmp_path / form).groups
        found[form] = [(g.prompt, [path.name for path in g.files], g.scores) for g in groups]
    assert len(found["csv"]) > 20
    assert found["sidecar"] == found["csv"] == found["comfy"] == found["jsonl"]


@pytest.mark.slow
def test_an_artists_output_folder_raises_held_out_success(drawn: list[Any], tmp_path: Path, monkeypatch: Any) -> None:
    """PNGs as ComfyUI writes them and a table of ratings; prompts, seeds and verifier of the measurement are others."""
    monkeypatch.chdir(tmp_path)
    rated_folder.write(tmp_path / "art", drawn, "comfy")
    options = ["--iterations", "12", "--training.kl_weight", "0.1", "--evaluation.weights", "current"]
    options += ["--evaluation.every", "0", "--evaluation.final_images", "200", "--model.device", "cpu"]
    assert train.main(["--preset", "quickstart", "--groups", "art", *options]) == 0
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["reward"] == "shapes"
    # 0.37 to 0.42 with the pictures of three seeds; 200 images have a standard error of 0.035
    assert summary["adapter"]["mean"] > summary["base"]["mean"] + 0.2
