"""ImageReward: the published file, small and random, against BLIP's forward and the head written out here."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, softmax

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import make_reward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", ",", "."]
PROMPTS = ["red", "A blue cat", "red", "a red, blue cat.", "a cat " * 40]
SIDE, PATCH, HEADS = 48, 16, 2  # pixels; heads of 64 numbers
VISION, TEXT = 128, 128


def published(seed: int = 0) -> dict[str, Tensor]:
    """The tensors of ImageReward.pt under their own names, with fewer and smaller layers."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int, scale: float = 1.0) -> None:
        state[name] = scale * torch.randn(*shape, generator=generator)

    def linear(name: str, out: int, into: int) -> None:
        put(f"{name}.weight", out, into, scale=1.5 / math.sqrt(into))
        put(f"{name}.bias", out, scale=0.1)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        put(f"{name}.bias", width, scale=0.1)

    image = "blip.visual_encoder."
    put(f"{image}cls_token", 1, 1, VISION)
    put(f"{image}pos_embed", 1, (SIDE // PATCH) ** 2 + 1, VISION)
    put(f"{image}patch_embed.proj.weight", VISION, 3, PATCH, PATCH, scale=0.1)
    put(f"{image}patch_embed.proj.bias", VISION, scale=0.1)
    for i in range(2):
        block = f"{image}blocks.{i}."
        norm(f"{block}norm1", VISION)
        norm(f"{block}norm2", VISION)
        linear(f"{block}attn.qkv", 3 * VISION, VISION)
        linear(f"{block}attn.proj", VISION, VISION)
        linear(f"{block}mlp.fc1", 4 * VISION, VISION)
        linear(f"{block}mlp.fc2", VISION, 4 * VISION)
    norm(f"{image}norm", VISION)

    words = "blip.text_encoder."
    state[f"{words}embeddings.position_ids"] = torch.arange(64)[None]
    put(f"{words}embeddings.word_embeddings.weight", len(WORDS) + 2, TEXT)  # with [DEC] and [ENC]
    put(f"{words}embeddings.position_embeddings.weight", 64, TEXT)
    norm(f"{words}embeddings.LayerNorm", TEXT)
    for i in range(2):
        layer = f"{words}encoder.layer.{i}."
        for kind, source in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}{kind}.self.query", TEXT, TEXT)
            linear(f"{layer}{kind}.self.key", TEXT, source)
            linear(f"{layer}{kind}.self.value", TEXT, source)
            linear(f"{layer}{kind}.output.dense", TEXT, TEXT)
            norm(f"{layer}{kind}.output.LayerNorm", TEXT)
        linear(f"{layer}intermediate.dense", 3 * TEXT, TEXT)
        linear(f"{layer}output.dense", TEXT, 3 * TEXT)
        norm(f"{layer}output.LayerNorm", TEXT)
    for projection, width in (("vision_proj", VISION), ("text_proj", TEXT)):  # in the file, of no use
        linear(f"blip.{projection}", 16, width)

    widths = (TEXT, 32, 16, 8, 4, 1)
    for number, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        linear(f"mlp.layers.{number}", b, a)
    return state


class Written:
    """The score of one image and prompt by the formulas, on the tensors of the file."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [n, D], k and v [m, D], mask bool [m] -> [n, D]."""
        heads = [x.reshape(len(x), HEADS, -1).transpose(0, 1) for x in (q, k, v)]
        logits = heads[0] @ heads[1].transpose(1, 2) / math.sqrt(heads[0].shape[-1])
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        return (softmax(logits, -1) @ heads[2]).transpose(0, 1).reshape(len(q), -1)

    def image(self, pixels: Tensor) -> Tensor:
        """pixels [3, S, S] -> [tokens, D]."""
        p = "blip.visual_encoder."
        patches = torch.nn.functional.conv2d(
            pixels[None], self.state[f"{p}patch_embed.proj.weight"], self.state[f"{p}patch_embed.proj.bias"], PATCH
        )
        x = torch.cat([self.state[f"{p}cls_token"][0], patches[0].flatten(1).T]) + self.state[f"{p}pos_embed"][0]
        for i in range(2):
            block = f"{p}blocks.{i}."
            q, k, v = self.linear(self.norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, dim=-1)
            x = x + self.linear(self.attend(q, k, v), f"{block}attn.proj")
            hidden = gelu(self.linear(self.norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1"))
            x = x + self.linear(hidden, f"{block}mlp.fc2")
        return self.norm(x, f"{p}norm", 1e-6)

    def text(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        """ids and mask [35] -> [35, D]."""
        p = "blip.text_encoder."
        x = self.state[f"{p}embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{p}embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(x, f"{p}embeddings.LayerNorm", 1e-12)
        for i in range(2):
            layer = f"{p}encoder.layer.{i}."
            for kind, source, allowed in (("attention", None, mask.bool()), ("crossattention", seen, None)):
                keys = x if source is None else source
                q = self.linear(x, f"{layer}{kind}.self.query")
                k, v = self.linear(keys, f"{layer}{kind}.self.key"), self.linear(keys, f"{layer}{kind}.self.value")
                out = self.linear(self.attend(q, k, v, allowed), f"{layer}{kind}.output.dense")
                x = self.norm(x + out, f"{layer}{kind}.output.LayerNorm", 1e-12)
            out = self.linear(gelu(self.linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense")
            x = self.norm(x + out, f"{layer}output.LayerNorm", 1e-12)
        return x

    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.text(ids, mask, self.image(pixels))[0]
        for number in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{number}")
        return (x[0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageReward.pt, and BERT's tokenizer with a few words."""
    folder = tmp_path_factory.mktemp("image_reward")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "bert" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
    )
    torch.save(published(), folder / "ImageReward.pt")
    return folder


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth pictures, float32 [5, 3, 60, 80], of whole 255ths."""
    noise = torch.rand(5, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(noise, scale_factor=10, mode="bilinear") * 255).round() / 255


def options(folder: Path, **more: object) -> dict[str, object]:
    return {"path": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert"), **more}


def tokens(prompt: str) -> tuple[Tensor, Tensor]:
    """[CLS] words [SEP], cut at 35 and padded to 35, by hand."""
    words = [WORDS.index(word) for word in prompt.lower().replace(",", " ,").replace(".", " .").split()][:33]
    ids = [2, *words, 3]
    return torch.tensor(ids + [0] * (35 - len(ids))), torch.tensor([1] * len(ids) + [0] * (35 - len(ids)))


def pixels(image: Tensor) -> Tensor:
    """The authors' transform, by hand: shorter edge to SIDE, the middle of the longer one, CLIP's normalisation."""
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    width, height = (int(SIDE * edge / min(picture.size)) for edge in picture.size)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    cut = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    x = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)


def test_the_score_is_that_of_the_formulas(folder: Path, images: Tensor) -> None:
    scores = make_reward("image_reward", options(folder, batch=2)).score(images, PROMPTS, [{}] * 5)
    model = Written(published())
    expected = [model.score(pixels(i), *tokens(p)) for i, p in zip(images, PROMPTS, strict=True)]
    assert scores.std() > 0.1
    # float32 through eight layers, sums in another order: some 1e-5
    torch.testing.assert_close(scores, torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_image_and_prompt_both_count(folder: Path, images: Tensor) -> None:
    reward = make_reward("image_reward", options(folder))
    same = reward.score(images[:1].expand(2, -1, -1, -1), ["red", "a blue cat"], [{}] * 2)
    assert abs(same[0] - same[1]) > 0.01
    other = reward.score(images[:2], ["red", "red"], [{}] * 2)
    assert abs(other[0] - other[1]) > 0.01


def test_idle_and_other_number_types(folder: Path, images: Tensor) -> None:
    exact = make_reward("image_reward", options(folder))
    scores = exact.score(images, PROMPTS, [{}] * 5)
    exact.idle()
    assert torch.equal(exact.score(images, PROMPTS, [{}] * 5), scores)
    rounded = make_reward("image_reward", options(folder, dtype="bfloat16")).score(images, PROMPTS, [{}] * 5)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, scores, atol=0.3 * float(scores.std()) + 0.1, rtol=0)


@pytest.mark.parametrize(
    "gone", ["blip.visual_encoder.norm.bias", "blip.text_encoder.embeddings.LayerNorm.weight", "mlp.layers.7.bias"]
)
def test_incomplete_files_are_refused(folder: Path, tmp_path: Path, gone: str) -> None:
    torch.save({name: tensor for name, tensor in published().items() if name != gone}, tmp_path / "less.pt")
    with pytest.raises(UserError, match=r"is not ImageReward v1.0"):
        make_reward("image_reward", options(folder) | {"path": str(tmp_path / "less.pt")})


def test_missing_weights_are_told() -> None:
    with pytest.raises(UserError, match=r"zai-org/ImageReward/ImageReward.pt \(1.8 GB\)"):
        make_reward("image_reward")
