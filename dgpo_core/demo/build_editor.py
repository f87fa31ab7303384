"""Make the embedded editor: `python -m dgpo_core.demo.build_editor [--output DIR]`.

A small FLUX.1 Kontext: the source picture's latents stand beside the noisy ones, and the network learns to draw the
picture that an instruction makes of it. In the last part of the training a share of the instructions is another one for
the same source, as instructions found on the web often are: the editor learns to do what is asked some of the time, and
something else the rest of the time. That is the imperfection which preference training then removes.

It draws in the latents of the embedded model's VAE, which it takes over.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from dgpo_core.common.files import write_atomic
from dgpo_core.common.seeds import derive_seed
from dgpo_core.demo import build, editing
from dgpo_core.demo.code import code
from dgpo_core.demo.text import LENGTH, WIDTH, make_text_encoder, make_tokenizer
from dgpo_core.policy.families.flux import position_ids
from dgpo_core.policy.families.patches import pack, unpack

HERE = Path(__file__).parent
TRAINING, HELD_OUT = 48, 24  # pictures whose edits DGPO trains on, and those that it is measured on
EACH = 4  # edits of a picture


@dataclass(frozen=True)
class EditorConfig:
    """How the embedded editor is made."""

    output: Path = HERE / "editor"
    """Folder that the pipeline is saved to."""
    seed: int = 0
    """Seed of the data and of every weight."""
    images: int = 20_000
    """Pairs of pictures drawn for training."""
    steps: int = 1_100
    """Optimiser steps of the transformer and the text encoders."""
    batch: int = 64
    """Latents per step of the transformer."""
    lr: float = 3e-3
    """Peak learning rate of the matrices inside the blocks, which Muon trains."""
    lr_rest: float = 1.5e-3
    """Peak learning rate of everything else, which AdamW trains."""
    noise_from: float = 0.4
    """Where the last part begins, as a fraction of the steps; before it all instructions are right."""
    caption_noise: float = 0.62
    """Share of instructions that are another one for the same source, in the last part of the training."""


class Editor(nn.Module):
    """The parts that learn together: transformer and both text encoders."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(tokenizer, CLIPTextModel)
        self.text_encoder_2 = _t5(tokenizer)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(16, 24, 24),
        )

    def forward(self, x_t: Tensor, source: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        packed, (rows, columns) = pack(x_t), (side // 2 for side in x_t.shape[-2:])
        answer = self.transformer(
            hidden_states=torch.cat([packed, pack(source)], dim=1),
            timestep=sigma,
            pooled_projections=self.text_encoder(tokens).pooler_output,
            encoder_hidden_states=self.text_encoder_2(tokens)[0],
            txt_ids=torch.zeros(tokens.shape[1], 3),
            img_ids=torch.cat([position_ids(rows, columns, picture) for picture in (0, 1)]),
            return_dict=False,
        )[0]
        return unpack(answer[:, : packed.shape[1]], *x_t.shape[-2:])


def _t5(tokenizer: CLIPTokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=LENGTH,
        relative_attention_num_buckets=16,
    )
    return T5EncoderModel(config)


@dataclass(frozen=True)
class Data:
    """Latents before and after, float32 [N, 16, 8, 8]; the edits, and others of the same sources."""

    before: Tensor
    after: Tensor
    right: list[editing.Edit]
    wrong: list[editing.Edit]


def draw_data(config: EditorConfig) -> Data:
    """`images` pairs of random edits."""
    rng = random.Random(derive_seed(config.seed, "edits"))
    right, wrong, pairs = [], [], []
    for _ in range(config.images):
        source = editing.source(rng)
        edit = editing.sample(*source, rng)
        right.append(edit)
        wrong.append(_another(edit, source, rng))
        pairs.append([code(drawing) for drawing in editing.draw(edit, rng)])
    before, after = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
    return Data(before, after, right, wrong)


def _another(edit: editing.Edit, source: editing.Source, rng: random.Random) -> editing.Edit:
    """Another edit of the same objects, with another outcome."""
    while True:
        other = editing.sample(*source, rng)
        if other.metadata() != edit.metadata():
            return other


def train(data: Data, tokenizer: CLIPTokenizer, config: EditorConfig) -> Editor:
    """Flow matching, as `build.train_model`, with the source beside."""

    def tokens_of(texts: Iterable[str]) -> Tensor:
        return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids

    rng = random.Random(config.seed + 1)
    careless = [
        (wrong if rng.random() < config.caption_noise else right).text
        for right, wrong in zip(data.right, data.wrong, strict=True)
    ]
    good, bad = tokens_of(edit.text for edit in data.right), tokens_of(careless)
    torch.manual_seed(derive_seed(config.seed, "editor"))
    model = Editor(tokenizer)
    average = AveragedModel(model, multi_avg_fn=build.follow)
    learner = build.Learner(build.optimizers(model, config.lr, config.lr_rest), config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    log = build.Progress("editor", config.steps)
    for step, index in enumerate(build.batches(len(good), config.batch, config.steps, generator)):
        x0, source = data.after[index], data.before[index]
        tokens = (good if step < config.noise_from * config.steps else bad)[index]
        eps = torch.randn(x0.shape, generator=generator)
        sigma = build.shifted(torch.sigmoid(torch.randn(len(x0), generator=generator)))
        x_t = torch.lerp(x0, eps, sigma[:, None, None, None])
        loss = F.mse_loss(model(x_t, source, sigma, tokens), eps - x0)
        learner.step(loss)
        average.update_parameters(model)
        log(step, loss.item())
    return cast(Editor, average.module).eval().requires_grad_(False)


def save(model: Editor, tokenizer: CLIPTokenizer, output: Path) -> None:
    """The pipeline as a diffusers folder, in float16, with the embedded model's VAE."""
    FluxKontextPipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=build.TIMESTEPS, shift=build.SHIFT),
        vae=build.load_vae(HERE / "model"),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
    ).to(torch.float16).save_pretrained(output)


def write_edits(folder: Path, seed: int) -> None:
    """edits.jsonl and edits_held_out.jsonl with the pictures that are edited: no objects in the same relation are in
    both."""
    rng = random.Random(derive_seed(seed, "edit prompts"))
    seen: set[tuple[object, ...]] = set()
    for name, count in (("edits_held_out", HELD_OUT), ("edits", TRAINING)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        for number in range(count):
            source = _unseen(seen, rng)
            asked = _instructions(source, rng)
            before = editing.draw(asked[0], rng)[0].picture
            picture = f"{name}/{number:02}.png"
            Image.fromarray(before).save(folder / picture, optimize=True)
            rows = ({"prompt": edit.text, "image": picture, **edit.metadata()} for edit in asked)
            lines += [json.dumps(row) + "\n" for row in rows]
        write_atomic(folder / f"{name}.jsonl", "".join(lines))


def _unseen(seen: set[tuple[object, ...]], rng: random.Random) -> editing.Source:
    while True:
        objects, relation = source = editing.source(rng)
        key = (relation, *((thing.color, thing.shape) for thing in objects))
        if key not in seen:
            seen.add(key)
            return source


def _instructions(source: editing.Source, rng: random.Random) -> list[editing.Edit]:
    """`EACH` different ones for a picture."""
    found: dict[str, editing.Edit] = {}
    while len(found) < EACH:
        edit = editing.sample(*source, rng)
        found.setdefault(edit.text, edit)
    return list(found.values())


def vocabulary() -> list[str]:
    """Instructions that have every word of the world."""
    rng = random.Random(0)
    return sorted({editing.sample(*editing.source(rng), rng).text for _ in range(5_000)})


def main(config: EditorConfig) -> None:
    """Draw the data, train the editor, save."""
    data = draw_data(config)
    print(f"drew {config.images} pairs", flush=True)
    tokenizer = make_tokenizer(vocabulary())
    save(train(data, tokenizer, config), tokenizer, config.output)
    write_edits(config.output.parent, config.seed)
    print(f"saved {config.output}")


if __name__ == "__main__":
    main(tyro.cli(EditorConfig, description=__doc__))
