"""A taste: what it learns from answers, what it says of itself, and the reward that it is."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_clip
import torch
from bright_features import MeanColour
from PIL import Image

from dgpo_core.common.errors import UserError
from dgpo_core.demo import world
from dgpo_core.demo.likeness import likeness
from dgpo_core.people import taste as command
from dgpo_core.people.gallery import read_gallery, read_preference_gallery
from dgpo_core.people.judged import judged, read_answers
from dgpo_core.people.preferences import told_apart
from dgpo_core.rewards import make_reward, require_reward, weight_files
from dgpo_core.rewards.taste.features import BuiltIn, features, statistics
from dgpo_core.rewards.taste.model import MOST_BYTES, Agreement, Judged, Taste, agreed, fit
from dgpo_core.rewards.trust import check_shared
from dgpo_core.runs.begun import Begun
from dgpo_core.settings.config import Config, RewardTerm
from dgpo_core.settings.values import read_rewards

SIZE = 6


def groups_of(count: int, seed: int, *, chance: bool = False) -> list[Judged]:
    """Groups whose redder pictures were preferred, with some error; or about which somebody threw dice."""
    made, generator = [], torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.rand(SIZE, 4, generator=generator)
        x[:, 3] = 12.0
        seen = x[:, 0] + 0.1 * torch.randn(SIZE, generator=generator)
        liked = torch.rand(SIZE, generator=generator) if chance else seen
        order = [[i] for i in liked.argsort(descending=True).tolist()]
        made.append(Judged(x, tuple(told_apart({"ranking": order}, SIZE))))
    return made


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Twelve groups of pictures of any colours; the redder ones were preferred."""
    rng, lines = random.Random(0), []
    for g in range(12):
        reds = [rng.randrange(256) for _ in range(4)]
        for i, red in enumerate(reds):
            colour = (red, rng.randrange(256), rng.randrange(256))
            Image.new("RGB", (24, 16), colour).save(tmp_path / f"{g}-{i}.png")
        ranking = [[i] for i in sorted(range(4), key=lambda i: -reds[i])]
        lines.append({"prompt": f"prompt {g}", "images": [f"{g}-{i}.png" for i in range(4)], "ranking": ranking})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line | {"version": 2}) + "\n" for line in lines))
    return tmp_path


# --- what it learns --------------------------------------------------------------------------------------------------


def test_it_learns_what_was_preferred_and_says_how_well_on_answers_it_has_not_seen() -> None:
    taste = fit(groups_of(20, 0), MeanColour())
    new = groups_of(200, 1)
    found = sum(agreed(taste.scores(group.x), group) for group in new) / len(new)
    assert found > 0.8
    assert taste.agreement.low < found < taste.agreement.high
    assert taste.agreement.above_chance
    assert taste.weights[0] > 5 * taste.weights[1:].abs().max()
    assert taste.weights[3] == 0  # the same within every group
    assert (taste.groups, taste.images, taste.pairs) == (20, 120, 300)


@pytest.mark.slow
def test_of_answers_by_dice_hardly_any_taste_is_above_chance() -> None:
    """The lower end of a 95 % interval is above chance in one case of 40; of 20, more than 2 are rarer than 1 in 50."""
    served = [fit(groups_of(8, seed, chance=True), MeanColour()).agreement.above_chance for seed in range(20)]
    assert sum(served) <= 2


def test_the_same_answers_make_the_same_taste_to_the_bit() -> None:
    one, two = (fit(groups_of(5, 0), MeanColour()) for _ in range(2))
    assert torch.equal(one.weights, two.weights)
    assert one.agreement == two.agreement


def test_few_answers_leave_doubt_and_many_take_it_away() -> None:
    new = [group.x for group in groups_of(20, 1)]
    few, many = (fit(groups_of(count, 0), MeanColour()) for count in (2, 60))
    assert sum(map(few.doubt, new)) > 2 * sum(map(many.doubt, new))
    assert all(0 <= few.doubt(x) <= 0.5 for x in new)
    assert many.doubt(new[0][:1].expand(4, 4)) == pytest.approx(0, abs=1e-4)  # equal pictures: nothing to get wrong


def test_more_features_than_pictures_are_fitted_as_well() -> None:
    class Wide(MeanColour):
        blocks = (("colour", 3), ("prompt", 1), ("rest", 300))

    noise = torch.Generator().manual_seed(3)
    wide = [Judged(torch.cat([g.x, torch.randn(SIZE, 300, generator=noise)], 1), g.pairs) for g in groups_of(6, 0)]
    taste = fit(wide, Wide())
    assert taste.weights.shape == (304,)
    assert sum(agreed(taste.scores(group.x), group) for group in wide) / len(wide) > 0.8
    assert taste.doubt(wide[0].x) < 0.5


def test_nothing_told_apart_is_refused() -> None:
    with pytest.raises(UserError, match="no group has a better and a worse picture"):
        fit([Judged(torch.rand(2, 4), ((0, 1, 0.5),))], MeanColour())


@pytest.mark.parametrize(
    ("shares", "above"),
    [([], False), ([1.0], False), ([1.0] * 3, False), ([1.0] * 4, True), ([0.6, 0.4] * 10, False), ([0.75] * 12, True)],
)
def test_a_few_groups_that_agree_are_not_enough(shares: list[float], above: bool) -> None:
    assert Agreement.of(shares).above_chance is above


def test_a_pair_that_was_tied_pulls_two_pictures_together() -> None:
    x = torch.tensor([[1.0, 0, 0, 5], [0, 1.0, 0, 5], [0, 0, 0, 5]])
    apart = fit([Judged(x, ((0, 2, 1.0),))], MeanColour())
    tied = fit([Judged(x, ((0, 2, 1.0), (0, 1, 0.5)))], MeanColour())
    gap = [float(taste.scores(x)[0] - taste.scores(x)[1]) for taste in (apart, tied)]
    assert 0 < gap[1] < 0.9 * gap[0]


def noise_groups(folder: Path, count: int = 8) -> Path:
    """Groups of noise that were ranked by dice; returns the preference file."""
    folder.mkdir()
    rng, lines = random.Random(3), []
    for g in range(count):
        names = [f"{g}-{i}.png" for i in range(SIZE)]
        for name in names:
            Image.frombytes("RGB", (4, 4), rng.randbytes(48)).save(folder / name)
        ranking = [[i] for i in rng.sample(range(SIZE), SIZE)]
        lines.append({"prompt": "p", "images": names, "ranking": ranking, "version": 2, "key": f"k{g}"})
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "answers.jsonl"


def test_answers_that_are_given_twice_count_once(tmp_path: Path) -> None:
    file = noise_groups(tmp_path / "asked")
    copy = shutil.copytree(file.parent, tmp_path / "copy")
    once = read_answers([file])
    for sources in ([file, file], [file, file.parent], [file.parent, copy], [copy / "answers.jsonl", file]):
        found = read_answers(sources)
        assert [group.scores for group in found.groups] == [group.scores for group in once.groups]
        assert found.notes == ("Left out: 8 groups are given twice.",)


def test_groups_that_are_in_another_order_are_the_same_and_another_answer_is_not(tmp_path: Path) -> None:
    file = noise_groups(tmp_path / "asked", 1)
    line = json.loads(file.read_text())
    turned = line | {"images": line["images"][::-1], "ranking": [[SIZE - 1 - i] for (i,) in line["ranking"]]}
    other = line | {"ranking": line["ranking"][::-1]}
    (tmp_path / "asked" / "more.jsonl").write_text(
        "".join(json.dumps(a) + "\n" for a in (turned, other | {"key": "o"}))
    )
    found = read_answers([tmp_path / "asked"])
    assert len(found.groups) == 2
    assert found.notes == ("Left out: 1 group is given twice.",)


def test_no_picture_is_learned_from_and_held_out_at_once(tmp_path: Path) -> None:
    """Dice are no better than chance where the same pictures are in several groups, with an answer that stays."""
    file = noise_groups(tmp_path / "asked")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    halves = [line | {"images": line["images"][:4], "ranking": [[i] for (i,) in line["ranking"] if i < 4]}
              for line in lines]  # fmt: skip
    (tmp_path / "asked" / "halves.jsonl").write_text("".join(json.dumps(half) + "\n" for half in halves))
    found = judged(read_answers([tmp_path / "asked"]).groups, MeanColour())
    taste, alone = fit(found, MeanColour()), fit(found[:8], MeanColour())
    assert (taste.groups, taste.agreement.groups) == (16, 8)
    assert not taste.agreement.above_chance
    assert taste.agreement.mean == pytest.approx(alone.agreement.mean, abs=0.15)


def test_groups_with_a_picture_in_common_alone_tell_nothing_of_how_well_a_taste_does() -> None:
    groups = [replace(group, pictures=("a", str(i), "")) for i, group in enumerate(groups_of(5, 0))]
    assert fit(groups, MeanColour()).agreement == Agreement()
    apart = [replace(group, pictures=("", "")) for group in groups]
    assert fit(apart, MeanColour()).agreement == fit(groups_of(5, 0), MeanColour()).agreement


@pytest.mark.parametrize("others", [0, 1])
def test_of_pictures_that_are_the_same_nothing_is_learned(others: int) -> None:
    """Where there are no others, and where a fold of the cross-validation is left without them."""
    twins, apart = torch.full((2, 4), 0.5), torch.tensor([[1.0, 0, 0, 5], [0, 0, 0, 5]])
    taste = fit([Judged(x, ((0, 1, 1.0),)) for x in [apart] * others + [twins] * (2 - others)], MeanColour())
    assert (taste.weights != 0).tolist() == [bool(others), False, False, False]
    assert taste.doubt(twins) == pytest.approx(0, abs=1e-4)
    assert taste.agreement.mean == 0.5
    assert not taste.agreement.above_chance


# --- what it sees ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_finds_that_a_picture_fits_its_own_prompt_better_than_anothers() -> None:
    rng = random.Random(0)
    scenes = world.by_category()
    pairs = [(world.sample_scene(rng, scenes), world.sample_scene(rng, scenes)) for _ in range(24)]
    drawn = [world.draw(world.place(right, rng), rng).picture for right, _ in pairs]
    images = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) / 255 for picture in drawn])
    own = likeness(images, [right.prompt() for right, _ in pairs])
    other = likeness(images, [wrong.prompt() for _, wrong in pairs])
    assert own.shape == (24, 4)
    assert ((own - other).mean(1) > 0).float().mean() > 0.9
    alone = likeness(images[3:4], [pairs[3][0].prompt()])
    torch.testing.assert_close(alone[0], own[3], rtol=1e-4, atol=1e-5)  # of float32 in another batch


def test_statistics_tell_colours_edges_and_places() -> None:
    left, right = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "white")
    left.paste((200, 0, 0), (0, 0, 32, 64))
    right.paste((200, 0, 0), (32, 0, 64, 64))
    grey, wide = Image.new("RGB", (64, 64), (128,) * 3), left.resize((640, 480), Image.Resampling.NEAREST)
    a, b, c, d = statistics([left, right, grey, wide])
    assert len(a) == sum(width for _, width in BuiltIn.blocks[1:])
    torch.testing.assert_close(a[:30], b[:30], atol=0.02, rtol=0)  # only the layout differs
    assert (a[30:] - b[30:]).abs().max() > 0.5
    assert c[18:30].abs().max() < 1e-6
    torch.testing.assert_close(a, d, atol=0.02, rtol=0)
    assert a[13] > 0.1  # red


def test_without_clips_weights_the_features_are_the_built_in_ones() -> None:
    assert features("built-in").kind == features().kind == "built-in"
    with pytest.raises(UserError, match="auto, clip or built-in"):
        features("resnet")


def test_clips_features_are_taken_where_its_weights_are_and_serve_there_alone(
    tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tiny_clip.save(tmp_path / "reward_models" / "clip-vit-large-patch14")
    monkeypatch.setattr(weight_files, "_folders", [clip.parent])
    out = asked / "red.safetensors"
    assert command.main([str(asked / "answers.jsonl"), "--out", str(out)]) == 0
    taste = Taste.load(out)
    assert (taste.kind, len(taste.weights)) == ("clip", 1 + tiny_clip.WIDTH + 62)
    assert out.stat().st_size < MOST_BYTES
    reward = make_reward("taste", {"path": str(out)})
    images, prompts = torch.rand(5, 3, 24, 16, generator=torch.Generator().manual_seed(0)), ["a", "b", "a", "a", "c"]
    scores = reward.score(images, prompts, [{}] * 5)
    assert scores.std() > 0
    parts = [reward.score(images[i : i + 1], prompts[i : i + 1], [{}]) for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), scores, rtol=1e-3, atol=1e-4)  # of float32 in other batches
    monkeypatch.setattr(weight_files, "_folders", [])
    with pytest.raises(UserError, match="Reward 'taste' needs openai/clip-vit-large-patch14"):
        require_reward("taste", {"path": str(out)})


# --- files and answers -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_makes_a_file_that_scores_as_a_reward(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = asked / "red.safetensors"
    assert command.main([str(asked / "answers.jsonl"), "--out", str(out), "--features", "built-in"]) == 0
    told = capsys.readouterr().out
    assert "made of 12 groups, 48 pictures and 72 pairs told apart (built-in)." in told
    assert "of the pairs (95 % interval" in told
    assert out.stat().st_size < MOST_BYTES
    (term,) = read_rewards(f"taste={out}")
    reward = make_reward(term.name, term.options)
    red, dark = torch.zeros(2, 3, 24, 24)
    red[0] = 0.9
    scores = reward.score(torch.stack([red, dark]), ["a", "a"], [{}, {}])
    assert scores[0] > scores[1]


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    taste = fit(groups_of(5, 0), MeanColour())
    taste.save(tmp_path / "a.safetensors")
    again = Taste.load(tmp_path / "a.safetensors")
    assert torch.equal(again.scores(torch.ones(1, 4)), taste.scores(torch.ones(1, 4)))
    assert (again.agreement, again.groups, again.kind) == (taste.agreement, 5, "built-in")


def test_no_taste_that_may_be_chance_is_served(tmp_path: Path) -> None:
    fit(groups_of(8, 0, chance=True), MeanColour()).save(tmp_path / "dice.safetensors")
    with pytest.raises(UserError, match="it is served once the interval is above 50 %"):
        require_reward("taste", {"path": str(tmp_path / "dice.safetensors")})


def test_what_is_no_taste_is_told_in_a_sentence(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"weights": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="is no taste that this version reads"):
        Taste.load(path)
    path.write_bytes(b"{")
    with pytest.raises(UserError, match="cannot be read"):
        Taste.load(path)
    path.write_bytes(b"0" * (MOST_BYTES + 1))
    with pytest.raises(UserError, match="more than 2 MB"):
        Taste.load(path)
    taste = fit(groups_of(5, 0), MeanColour())
    taste.save(path)
    with pytest.raises(UserError, match="was fitted on 4 features, and here are 66"):
        make_reward("taste", {"path": str(path)})
    with pytest.raises(UserError, match="needs a file: taste=FILE"):
        make_reward("taste")
    with pytest.raises(UserError, match="There is no taste"):
        make_reward("taste", {"path": str(tmp_path / "none.safetensors")})


def test_a_resumed_run_needs_the_taste_that_it_was_begun_with(tmp_path: Path) -> None:
    path = tmp_path / "my.safetensors"
    config = replace(Config(), reward=tuple(read_rewards(f"taste={path}")))

    def now(sign: float) -> Begun:
        weights = sign * torch.eye(BuiltIn().width)[12]
        Taste("built-in", weights, torch.zeros_like(weights), 9, 36, 50, Agreement(0.9, 0.8, 0.95, 9)).save(path)
        return Begun.with_(None, {"taste": make_reward("taste", {"path": str(path)})})

    info = now(1.0).info()
    now(1.0).require(info, config)
    now(-1.0).require({"ratings": ""}, config)  # a checkpoint of before tastes were noted
    with pytest.raises(UserError, match="The taste .*my.safetensors is not the one that the run began with"):
        now(-1.0).require(info, config)


@pytest.mark.slow
def test_a_workflow_names_a_taste_in_the_folder_of_reward_models_and_no_path(
    tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "reward_models"
    models.mkdir()
    monkeypatch.setattr(weight_files, "_folders", [models])
    command.main([str(asked), "--out", str(models / "red.safetensors"), "--features", "built-in"])
    check_shared([RewardTerm("taste", options={"name": "red"})], "The workflow")
    assert make_reward("taste", {"name": "red"}).taste.groups == 12
    with pytest.raises(UserError, match="sets the option path of the reward taste"):
        check_shared([RewardTerm("taste", options={"path": "/etc/x.safetensors"})], "The workflow")
    for name in ("../red", "a/b", "..", "none"):
        with pytest.raises(UserError, match="name|no taste"):
            make_reward("taste", {"name": name})


def test_pairs_are_learned_as_they_were_said(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    said = [[3, ">", 0], [1, "=", 2], [0, "?", 1]]
    line = {"prompt": "p", "images": [f"{i}.png" for i in range(4)], "pairs": said}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    (group,) = judged(read_preference_gallery(tmp_path / "a.jsonl").groups, MeanColour())
    assert group.pairs == ((3, 0, 1.0), (1, 2, 0.5))
    assert group.told_apart == [(3, 0, 1.0)]
    (group,) = judged(read_gallery(tmp_path).groups, MeanColour())
    assert group.pairs == ((3, 0, 1.0), (1, 2, 0.5))


def test_what_a_taste_answered_is_no_persons_answer(asked: Path) -> None:
    file = asked / "answers.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[3] |= {"by": "taste", "version": 3}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for gallery in (read_answers([file]), read_gallery(asked)):
        assert len(gallery.groups) == 11
        assert "Left out: 1 group was answered by a taste, not by you." in gallery.notes


@pytest.mark.parametrize(
    ("text", "options", "weight"),
    [
        ("taste=my.safetensors", {"path": "my.safetensors"}, 1.0),
        ("taste=a=b.safetensors=0.5", {"path": "a=b.safetensors"}, 0.5),
        ("taste=0.5", {}, 0.5),
        ("taste", {}, 1.0),
    ],
)
def test_the_reward_is_written_with_its_file(text: str, options: dict[str, str], weight: float) -> None:
    (term,) = read_rewards(text)
    assert (term.name, term.options, term.weight) == ("taste", options, weight)


def test_a_missing_source_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path / "none")]) == 2
    assert "give preference files or folders of rated pictures" in capsys.readouterr().err
    assert command.main([]) == 2
    assert command.main([str(tmp_path), "--out", "a.bin"]) == 2
