"""The CLIP rewards: the published architectures, small and random, in the published files, against the formula."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.rewards import make_reward
from dgpo_core.rewards.clip import preprocess

try:  # transformers 5
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
except ImportError:
    from transformers import CLIPImageProcessor as Processor

PROMPTS = ["red", "blue", "red", "a red, blue red. blue", "a text that is far longer than what the model can read"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth pictures, float32 [5, 3, 40, 56], whose numbers are whole 255ths."""
    noise = torch.rand(5, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(noise, scale_factor=8, mode="bilinear") * 255).round() / 255


def pixels(image: Tensor, side: int = tiny_clip.SIDE) -> Tensor:
    """[1, 3, side, side] by transformers' own processor."""
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    array = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return Processor(**size)(images=Image.fromarray(array), return_tensors="pt")["pixel_values"]


def logits(folder: Path, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """exp(logit_scale) * cosine by CLIPModel's own forward, one pair at a time; and exp(logit_scale)."""
    model, tok = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        pairs = [
            model(pixel_values=pixels(image), **tok(prompt, truncation=True, max_length=16, return_tensors="pt"))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return torch.cat([pair.logits_per_image[0] for pair in pairs]), model.logit_scale.exp()


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 217), (217, 300), (100, 150), (1000, 301), (225, 224)])
def test_preprocessing_is_the_processors(size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = Processor()(images=picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(preprocess(picture, 224), expected, atol=2e-6, rtol=0)


def test_clip_score(folder: Path, images: Tensor) -> None:
    scores = make_reward("clip_score", {"path": str(folder), "batch": 2}).score(images, PROMPTS, [{}] * 5)
    expected, factor = logits(folder, images, PROMPTS)
    assert scores.shape == (5,)
    assert scores.std() > 0.01
    torch.testing.assert_close(scores, expected / factor, atol=1e-5, rtol=0)


def test_clip_direction_is_the_cosine_of_the_step_in_pictures_with_the_step_in_words(
    folder: Path, images: Tensor
) -> None:
    facts = [{"source_caption": "red", "target_caption": text} for text in ("blue", "blue", "a red, blue red")]
    sources = [[images[0]], [images[0]], [images[1]]]
    reward = make_reward("clip_direction", {"path": str(folder), "batch": 2})
    scores = reward.score_edits(images[2:5], ["edit"] * 3, facts, sources)

    model, tok = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def unit(features: object) -> Tensor:
        return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)[0]

    with torch.no_grad():
        seen = [unit(model.get_image_features(pixels(image))) for image in images]
        read = {t: unit(model.get_text_features(**tok(t, return_tensors="pt"))) for f in facts for t in f.values()}
    expected = [
        torch.cosine_similarity(seen[i] - seen[of], read[fact["target_caption"]] - read["red"], dim=0)
        for i, of, fact in zip((2, 3, 4), (0, 0, 1), facts, strict=True)
    ]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=0)
    same = reward.score_edits(images[:1], ["edit"], facts[:1], [[images[0]]])
    assert same.abs().max() < 1e-3  # nothing has changed


def test_clip_direction_refuses_a_prompt_without_its_captions(folder: Path) -> None:
    reward = make_reward("clip_direction", {"path": str(folder)})
    with pytest.raises(UserError, match=r"^p\.jsonl:4: .*; 'target_caption' is not there"):
        reward.check([Prompt("make it blue", {"source_caption": "red"}, "p.jsonl:4")])


@pytest.mark.parametrize("scale", [1, 26])
def test_pickscore(folder: Path, images: Tensor, scale: float) -> None:
    reward = make_reward("pickscore", {"path": str(folder), "scale": scale, "batch": 3})
    expected, _ = logits(folder, images, PROMPTS)
    scores = reward.score(images, PROMPTS, [{}] * 5)
    torch.testing.assert_close(scores, expected / scale, atol=1e-4, rtol=0)
    reward.idle()
    torch.testing.assert_close(reward.score(images, PROMPTS, [{}] * 5), scores)


def test_the_processor_may_lie_elsewhere(folder: Path, images: Tensor, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    reward = make_reward("pickscore", {"path": str(tmp_path), "processor": str(folder)})
    expected, _ = logits(folder, images, PROMPTS)
    torch.testing.assert_close(reward.score(images, PROMPTS, [{}] * 5), expected, atol=1e-4, rtol=0)


def test_other_number_types(folder: Path, images: Tensor) -> None:
    exact = make_reward("clip_score", {"path": str(folder)}).score(images, PROMPTS, [{}] * 5)
    rounded = make_reward("clip_score", {"path": str(folder), "dtype": "bfloat16"}).score(images, PROMPTS, [{}] * 5)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0)


def published_predictor(width: int) -> dict[str, Tensor]:
    """The tensors of sac+logos+ava1-l14-linearMSE.pth, smaller."""
    generator = torch.Generator().manual_seed(2)
    widths = (width, 12, 8, 6, 4, 1)
    state = {}
    for number, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        state[f"layers.{number}.weight"] = torch.randn(b, a, generator=generator)
        state[f"layers.{number}.bias"] = torch.randn(b, generator=generator)
    return state


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic(folder: Path, images: Tensor, tmp_path: Path, suffix: str) -> None:
    state, file = published_predictor(tiny_clip.WIDTH), tmp_path / f"predictor{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    scores = make_reward("aesthetic", {"path": str(file), "clip": str(folder)}).score(images, PROMPTS, [{}] * 5)

    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pooled = model.vision_model(torch.cat([pixels(image) for image in images])).pooler_output
        x = pooled @ model.visual_projection.weight.T
    x = x / x.norm(dim=1, keepdim=True)
    for number in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    torch.testing.assert_close(scores, x[:, 0], atol=1e-4, rtol=1e-4)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("exit 1",)


def test_wrong_predictor_files(folder: Path, tmp_path: Path) -> None:
    def complaint(file: Path) -> str:
        with pytest.raises(UserError) as error:
            make_reward("aesthetic", {"path": str(file), "clip": str(folder)})
        return str(error.value)

    file = tmp_path / "predictor.pth"
    assert "there is no file" in complaint(file)
    torch.save({"layers.0.weight": Bomb()}, file)
    assert "is not a file of weights" in complaint(file)
    file.write_bytes(b"<!DOCTYPE html>")
    assert "is not a file of weights" in complaint(file)
    torch.save({"other": torch.zeros(1)}, file)
    assert "is not the LAION aesthetic predictor" in complaint(file)
    torch.save(published_predictor(24), file)
    assert "takes embeddings of 24 numbers, the CLIP model gives 16" in complaint(file)


def test_weights_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs no-one/no-model \(3.9 GB\).*`hf download no-one/no-model`"):
        make_reward("pickscore", {"path": "no-one/no-model", "processor": "no-one/no-model"})
    with pytest.raises(UserError, match="'clip_score': there is no folder"):
        make_reward("clip_score", {"path": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="'clip_score': the folder .* is not a"):
        make_reward("clip_score", {"path": str(tmp_path)})


def test_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would fill what is missing with random numbers, and the scores would be noise."""
    model = CLIPModel.from_pretrained(folder)
    state = {name: t.contiguous() for name, t in model.state_dict().items() if name != "visual_projection.weight"}
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not a complete CLIPModel: 1 of its weights are missing, such as visual_proj"):
        make_reward("clip_score", {"path": str(tmp_path)})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("clip_score", {"dtype": "int8"}, "dtype"),
        ("clip_score", {"batch": 0}, "batch"),
        ("clip_score", {"batch": "many"}, "batch"),
        ("pickscore", {"scale": 0}, "scale"),
        ("pickscore", {"size": 3}, "'pickscore' does not take these options"),
        ("clip_score", {"path": 3}, "must be a folder or a hub id"),
    ],
)
def test_wrong_options(name: str, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_reward(name, options)
