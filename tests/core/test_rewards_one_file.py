"""CLIP in one file, as ComfyUI downloads it: the same scores as from the folder, and nothing else is taken for it."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import chosen_file, clip_file, make_reward, require_reward, weight_files
from dgpo_core.rewards.clip import LAION, OPENAI
from dgpo_core.rewards.published import CLIP_WORDS, names_here

PROMPTS = ["red", "blue", "a red, blue red. blue", "a text that is far longer than what the model can read"]
PICKSCORE = "PickScore_v1.safetensors"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder like ComfyUI's models/reward_models, in a program that has CLIP's tokenizer."""
    monkeypatch.setattr(weight_files, "_folders", [])
    monkeypatch.setattr(weight_files, "_supplied", {})
    folder = tmp_path / "reward_models"
    folder.mkdir()
    weight_files.look_in([tmp_path / "not there", folder])
    words = tiny_clip.save(tmp_path / "words")
    for file in ("model.safetensors", "config.json"):
        (words / file).unlink()
    weight_files.supply(CLIP_WORDS, words)
    return folder


def whole(folder: Path, activation: str) -> Path:
    return tiny_clip.save(folder, **tiny_clip.WHOLE_HEADS, hidden_act=activation)


def in_one_file(folder: Path, file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    return Path(shutil.copy(folder / "model.safetensors", file))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(len(PROMPTS), 3, 40, 56, generator=torch.Generator().manual_seed(1))


def scores(name: str, images: Tensor, **options: object) -> Tensor:
    return make_reward(name, options).score(images, PROMPTS, [{}] * len(images))


@pytest.mark.parametrize(("name", "activation"), [("pickscore", LAION), ("clip_score", OPENAI)])
def test_a_model_in_one_file_scores_as_its_folder_does_bit_for_bit(
    name: str, activation: str, models: Path, images: Tensor, tmp_path: Path
) -> None:
    folder = whole(tmp_path / "whole", activation)
    expected = scores(name, images, path=str(folder))
    file = in_one_file(folder, models / "mine" / "clip.safetensors")
    assert expected.std() > 0
    assert torch.equal(scores(name, images, path=str(file)), expected)
    for chosen in ("mine/clip.safetensors", "mine\\clip.safetensors"):  # the latter on Windows
        assert torch.equal(scores(name, images, weights_file=chosen), expected)
    other = whole(tmp_path / "other", LAION if activation == OPENAI else OPENAI)
    assert not torch.equal(scores(name, images, path=str(other)), expected)


def test_a_file_with_half_of_the_digits_scores_nearly_the_same(models: Path, images: Tensor, tmp_path: Path) -> None:
    folder = whole(tmp_path / "whole", LAION)
    half = {key: tensor.half() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, models / "half.safetensors")
    found = scores("pickscore", images, weights_file="half.safetensors")
    torch.testing.assert_close(found, scores("pickscore", images, path=str(folder)), atol=0.05, rtol=0)


def test_under_its_own_name_it_is_found_without_a_choice_and_the_choice_changes_nothing(
    models: Path, images: Tensor, tmp_path: Path
) -> None:
    assert chosen_file("pickscore", PICKSCORE) == {}
    with pytest.raises(UserError, match=r"'pickscore' needs yuvalkirstain/PickScore_v1 \(3.9 GB\)"):
        require_reward("pickscore", {"weights_file": PICKSCORE})  # as without a choice: from the hub, if there is one
    assert PICKSCORE not in names_here()
    folder = whole(tmp_path / "whole", LAION)
    in_one_file(folder, models / PICKSCORE)
    require_reward("pickscore")
    assert PICKSCORE in names_here()
    expected = scores("pickscore", images, path=str(folder))
    for options in ({}, {"weights_file": PICKSCORE}, {"weights_file": "automatic"}, {"weights_file": ""}):
        assert torch.equal(scores("pickscore", images, **options), expected)


def test_every_other_reward_that_looks_by_clip_takes_it_in_one_file_too(
    models: Path, images: Tensor, tmp_path: Path
) -> None:
    folder, file = whole(tmp_path / "whole", OPENAI), models / "clip-vit-large-patch14.safetensors"
    sizes = (tiny_clip.WIDTH, 12, 8, 6, 4, 1)
    layers = zip((0, 2, 4, 6, 7), itertools.pairwise(sizes), strict=True)
    state = {f"layers.{at}.weight": torch.randn(b, a) for at, (a, b) in layers}
    state |= {name.replace("weight", "bias"): torch.randn(len(tensor)) for name, tensor in state.items()}
    save_file(state, models / "predictor.safetensors")
    expected = scores("aesthetic", images, weights_file="predictor.safetensors", clip=str(folder))
    in_one_file(folder, file)
    assert torch.equal(scores("aesthetic", images, weights_file="predictor.safetensors"), expected)


def test_a_file_inside_the_folder_of_its_model_is_read_with_what_lies_beside_it(models: Path, images: Tensor) -> None:
    """The folder's config.json says what the tensors do not: here four heads of 8 numbers."""
    folder = tiny_clip.save(models / "mine")
    found = scores("pickscore", images, weights_file="mine/model.safetensors")
    assert torch.equal(found, scores("pickscore", images, path=str(folder)))


def test_the_programs_tokenizer_is_taken_before_the_hubs(models: Path, tmp_path: Path) -> None:
    in_one_file(whole(tmp_path / "whole", LAION), models / PICKSCORE)
    require_reward("pickscore")
    weight_files._supplied.clear()
    for name, hub in (("pickscore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"), ("clip_score", "openai/clip-vit-large")):
        with pytest.raises(UserError, match=f"'{name}' needs {hub}.* \\(its tokenizer, 4 MB\\)"):
            require_reward(name, {"path": str(models / PICKSCORE)})


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "C:\\x.safetensors", "..\\x.safetensors"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, models: Path, tmp_path: Path) -> None:
    in_one_file(whole(tmp_path / "whole", LAION), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="are not the name of a file in the folder of reward models"):
        require_reward("pickscore", {"weights_file": name})


def test_a_file_that_is_not_there_is_told_with_the_folder(models: Path) -> None:
    with pytest.raises(UserError) as error:
        require_reward("pickscore", {"weights_file": "mine.safetensors"})
    assert "There is no file mine.safetensors in the folder of reward models (" in str(error.value)
    assert str(error.value).endswith("put it there, or choose automatic.")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "brightness",
            {"weights_file": "x.safetensors"},
            "'brightness' does not take the weights x.safetensors: choose",
        ),
        ("hpsv2", {"weights_file": PICKSCORE}, f"'hpsv2' does not take the weights {PICKSCORE}, which are yuvalkirst"),
        ("pickscore", {"weights_file": "x.safetensors", "path": "y"}, "has both weights_file and path"),
        ("pickscore", {"weights_file": 3}, "must be a file's name, not 3"),
    ],
)
def test_a_choice_that_makes_no_sense_is_one_sentence(name: str, options: dict, says: str, models: Path) -> None:
    with pytest.raises(UserError, match=says):
        require_reward(name, options)


def test_what_is_no_clip_model_is_told_from_its_head_before_it_is_loaded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = load_file(whole(tmp_path / "whole", LAION) / "model.safetensors")
    text = {key: tensor for key, tensor in state.items() if key.startswith("text_model.")}  # such as ComfyUI's clip_l
    less = {key: tensor for key, tensor in state.items() if key != "text_model.encoder.layers.1.mlp.fc1.bias"}
    other = {**state, "visual_projection.weight": state["visual_projection.weight"][:, :-1].contiguous()}
    monkeypatch.setattr(clip_file, "load_tensors", lambda file: pytest.fail("it was loaded"))
    for broken, says in (
        ({"a": torch.zeros(2)}, "it has no text_model.embeddings.token_embedding.weight"),
        (text, "it has no vision_model.embeddings"),
        (less, "its text_model.encoder.layers.1.mlp.fc1.bias is missing or of another size"),
        (other, "its visual_projection.weight is missing or of another size"),
    ):
        save_file(broken, models / "x.safetensors")
        with pytest.raises(UserError, match=f"x.safetensors is not a CLIP model as transformers saves it \\({says}"):
            require_reward("pickscore", {"weights_file": "x.safetensors"})
    for content in (b"", b"<!DOCTYPE html>", json.dumps({"a": 1}).encode()):
        (models / "x.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="is not a CLIP model"):
            require_reward("pickscore", {"weights_file": "x.safetensors"})
    with pytest.raises(UserError, match="is not a CLIP model"):
        make_reward("pickscore", {"weights_file": "x.safetensors"})


@pytest.mark.parametrize(
    ("text", "vision", "projection", "heads"),
    [
        ((512, 8, 12), (768, 12, 12, 32, 50), 512, "ViT-B/32"),
        ((768, 12, 12), (1024, 16, 24, 14, 257), 768, "ViT-L/14"),
        ((1024, 16, 24), (1280, 16, 32, 14, 257), 1024, "ViT-H/14"),
        ((1280, 20, 32), (1664, 16, 48, 14, 257), 1280, "ViT-bigG/14"),
    ],
)
def test_the_published_models_are_known_by_their_shapes(
    text: tuple, vision: tuple, projection: int, heads: str
) -> None:
    """Width, heads and layers as in each one's config.json."""
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, text[0]),
        "text_model.embeddings.position_embedding.weight": (77, text[0]),
        "vision_model.embeddings.patch_embedding.weight": (vision[0], 3, vision[3], vision[3]),
        "vision_model.embeddings.position_embedding.weight": (vision[4], vision[0]),
        "visual_projection.weight": (projection, vision[0]),
    }
    for part, (width, _, layers) in (("text_model", text), ("vision_model", vision[:3])):
        for layer in range(layers):
            shapes[f"{part}.encoder.layers.{layer}.mlp.fc1.weight"] = (4 * width, width)
    config = clip_file.architecture(shapes)
    for part, (width, count, layers) in ((config.text_config, text), (config.vision_config, vision[:3])):
        found = (part.hidden_size, part.num_attention_heads, part.num_hidden_layers, part.intermediate_size)
        assert found == (width, count, layers, 4 * width)
    assert config.vision_config.image_size == 224
    assert config.vision_config.patch_size == vision[3]
    assert config.projection_dim == projection
    assert (config.text_config.vocab_size, config.text_config.eos_token_id) == (49408, 49407)
