"""HPS v2.1: OpenCLIP's own model, small and random, saved as the published checkpoint, against OpenCLIP itself."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import make_reward
from dgpo_core.rewards.hpsv2 import architecture, preprocess

open_clip = pytest.importorskip("open_clip")

PROMPTS = ["red", "a blue cat", "red", "a red, blue red. blue", "a text &amp; more than the model can read " * 9]
# ViT-H-14's widths per head, which the file does not say
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**SMALL).eval()
    with torch.no_grad():  # as it is initialised, all images look alike to it
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def file(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the form of HPS_v2.1_compressed.pt."""
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "name": "small", "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth pictures, float32 [5, 3, 40, 60]."""
    noise = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, scale_factor=10, mode="bilinear")


def test_the_score_is_open_clips_cosine(file: Path, model: torch.nn.Module, images: Tensor) -> None:
    scores = make_reward("hpsv2", {"path": str(file), "batch": 2}).score(images, PROMPTS, [{}] * 5)
    tokens = open_clip.tokenizer.SimpleTokenizer(context_length=77)(PROMPTS)
    with torch.no_grad():
        seen, read, _ = model(preprocess(images, 28), tokens)
    assert scores.std() > 0.01
    # float32 sums of 160 terms in another order of batches: some 1e-6
    torch.testing.assert_close(scores, (seen * read).sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (50, 50), (28, 28), (21, 28)])
def test_the_whole_image_is_seen_as_by_the_authors(size: tuple[int, int]) -> None:
    """Their `ResizeMaxSize`, written out with torchvision: longer edge to 28, black around, then the normalisation."""
    from torchvision.transforms import functional as F

    picture = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(3)).float() / 255
    scale = 28 / max(size)
    height, width = (round(edge * scale) for edge in size)
    small = F.resize(picture, [height, width], F.InterpolationMode.BICUBIC, antialias=True)
    top, left = (28 - height) // 2, (28 - width) // 2
    padded = F.pad(small, [left, top, 28 - width - left, 28 - height - top])
    expected = F.normalize(padded, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    torch.testing.assert_close(preprocess(picture[None], 28)[0], expected, atol=1e-5, rtol=0)


def test_the_published_architecture_is_read_off_its_weights() -> None:
    with torch.device("meta"):
        published = open_clip.get_model_config("ViT-H-14")
        model = open_clip.model.CLIP(**published)
    assert architecture(model.state_dict()) == published
    millions = sum(math.prod(parameter.shape) for parameter in model.parameters()) / 1e6
    assert millions * 4 / 1000 == pytest.approx(3.94, abs=0.01)  # GB in float32, as the download says


def test_idle_and_other_number_types(file: Path, images: Tensor) -> None:
    exact = make_reward("hpsv2", {"path": str(file)})
    scores = exact.score(images, PROMPTS, [{}] * 5)
    exact.idle()
    assert torch.equal(exact.score(images, PROMPTS, [{}] * 5), scores)
    rounded = make_reward("hpsv2", {"path": str(file), "dtype": "bfloat16"}).score(images, PROMPTS, [{}] * 5)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, scores, atol=0.05, rtol=0)  # 8 bits of a cosine, over five layers


def test_other_files_are_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {"layers.0.weight": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"is not HPS v2.1"):
        make_reward("hpsv2", {"path": str(path)})
    lacking = {name: tensor for name, tensor in model.state_dict().items() if name != "visual.ln_post.bias"}
    torch.save({"state_dict": lacking}, path)
    with pytest.raises(UserError, match=r"is not HPS v2.1"):
        make_reward("hpsv2", {"path": str(path)})


def test_a_missing_package_and_missing_weights_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"xswu/HPSv2/HPS_v2.1_compressed.pt \(3.9 GB\).*`hf download xswu/HPSv2 HPS_v2"
    ):
        make_reward("hpsv2")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        make_reward("hpsv2")
