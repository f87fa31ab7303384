"""Make the embedded model: `python -m dgpo_core.demo.build [--output DIR]`.

Draws its own data, then trains, one after the other, a small VAE, and a small SD3 transformer together with its two
CLIP text encoders. In the last part of the training a share of the captions is wrong on purpose (`caption_noise`), as
captions found on the web are: the model learns to draw what is asked most of the time, and something else the rest of
the time. That is the imperfection which preference training then removes.
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dgpo_core.common.files import write_atomic
from dgpo_core.common.seeds import derive_seed
from dgpo_core.demo import world
from dgpo_core.demo.code import code
from dgpo_core.demo.text import make_text_encoder, make_tokenizer

LATENT_SHIFT, LATENT_SCALE = 0.0609, 1.5305  # SD3's: the model sees (z - shift) * scale
LATENT_NOISE = 0.3  # in normalised latents
SHIFT = 3.0  # SD3's timestep shift
TIMESTEPS = 1000
EMPTY_CAPTIONS = 0.1
PROMPTS = {  # category -> prompts to train on, prompts held out
    "single_object": (12, 3),
    "two_object": (2, 1),
    "counting": (22, 8),
    "color_attr": (70, 30),
    "position": (150, 58),
}


@dataclass(frozen=True)
class BuildConfig:
    """How the embedded model is made."""

    output: Path = Path("dgpo_core/demo/model")
    """Folder that the pipeline is saved to."""
    seed: int = 0
    """Seed of the data and of every weight."""
    images: int = 30_000
    """Pictures drawn for training."""
    vae_steps: int = 1_000
    """Optimiser steps of the VAE."""
    vae_batch: int = 16
    """Pictures per step of the VAE."""
    steps: int = 2_000
    """Optimiser steps of the transformer and the text encoders."""
    batch: int = 128
    """Latents per step of the transformer."""
    lr: float = 3e-3
    """Peak learning rate of the matrices inside the blocks, which Muon trains."""
    lr_rest: float = 1.5e-3
    """Peak learning rate of everything else, which AdamW trains."""
    caption_noise: float = 0.62
    """Share of captions with one wrong fact, in the last part of the training."""
    noise_from: float = 0.5
    """Where that part begins, as a fraction of the steps; before it all captions are right."""
    depth: int = 2
    """Blocks of the transformer; its width is 64 times as much."""
    vae: Path | None = None
    """Take the VAE of this pipeline folder instead of training one."""


def make_vae() -> AutoencoderKL:
    """64 x 64 x 3 pixels <-> 8 x 8 x 16 latents, 0.25 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=world.SIZE,
        scaling_factor=LATENT_SCALE,
        shift_factor=LATENT_SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def make_transformer(depth: int, text_width: int) -> SD3Transformer2DModel:
    """SD3's transformer with `depth` blocks of width 64 x depth and heads of 64, on 8 x 8 latents in patches of 2."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=depth,
        caption_projection_dim=64 * depth,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=16,
    )


@dataclass(frozen=True)
class Data:
    """Pictures, uint8 [N, 3, 64, 64]; their latents, float32 [N, 16, 8, 8]; the scenes they show."""

    pictures: Tensor
    latents: Tensor
    scenes: list[world.Scene]


def draw_data(config: BuildConfig) -> Data:
    """`images` pictures of random scenes."""
    rng = random.Random(config.seed)
    scenes = world.by_category()
    shown = [world.sample_scene(rng, scenes) for _ in range(config.images)]
    drawings = (world.draw(world.place(scene, rng), rng) for scene in shown)
    pictures, latents = zip(*((d.picture, code(d)) for d in drawings), strict=True)
    return Data(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(latents)), shown)


def batches(n: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` index batches, running through a fresh permutation of n in every epoch."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(n, generator=generator)
        yield order[:size]
        order = order[size:]


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over 100 steps, then a cosine down to nothing."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_vae(data: Data, config: BuildConfig) -> AutoencoderKL:
    """A VAE whose latents are `code` in SD3's scale: the encoder learns to find it, the decoder to draw it."""
    torch.manual_seed(derive_seed(config.seed, "vae"))
    vae = make_vae()
    _train_vae(vae, data, config, "vae")
    vae.encoder.requires_grad_(False)  # finding the code is the easier half
    _train_vae(vae, data, config, "decoder")
    fix_variance(vae)
    return vae.requires_grad_(False)


def _train_vae(vae: AutoencoderKL, data: Data, config: BuildConfig, name: str) -> None:
    """`vae_steps` steps of whatever in the VAE still learns."""
    learning = [p for p in vae.parameters() if p.requires_grad]
    learner = Learner([torch.optim.AdamW(learning, lr=3e-3, weight_decay=1e-4)], config.vae_steps)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, name))
    log = Progress(name, config.vae_steps)
    for step, index in enumerate(batches(len(data.scenes), config.vae_batch, config.vae_steps, generator)):
        x, z = data.pictures[index].float() / 127.5 - 1, data.latents[index]
        # noise teaches the decoder to forgive what the diffusion model gets slightly wrong
        noisy = z + LATENT_NOISE * torch.randn(z.shape, generator=generator)
        y = vae.decode(noisy / LATENT_SCALE + LATENT_SHIFT).sample
        loss = F.l1_loss(y, x) + F.mse_loss(y, x)  # L1 keeps edges crisp, L2 keeps large faults rare
        if vae.encoder.conv_out.weight.requires_grad:
            found = (vae.encode(x).latent_dist.mean - LATENT_SHIFT) * LATENT_SCALE
            loss = loss + F.mse_loss(found, z)
        learner.step(loss)
        log(step, loss.item())


@torch.no_grad()
def fix_variance(vae: AutoencoderKL) -> None:
    """The posterior's deviation is the noise that the decoder was trained with."""
    out, channels = vae.encoder.conv_out, vae.config.latent_channels
    out.weight[channels:] = 0.0
    out.bias[channels:] = 2 * np.log(LATENT_NOISE / LATENT_SCALE)


class TextToLatent(nn.Module):
    """The parts that learn together: transformer and both text encoders."""

    def __init__(self, depth: int, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(tokenizer, CLIPTextModelWithProjection)
        self.text_encoder_2 = make_text_encoder(tokenizer, CLIPTextModelWithProjection)
        width = 2 * self.text_encoder.config.hidden_size
        self.transformer = make_transformer(depth, width)

    def forward(self, x_t: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        return self.transformer(
            hidden_states=x_t,
            timestep=sigma * TIMESTEPS,
            # as in SD3: the last but one hidden state, and the projected end-of-text token
            encoder_hidden_states=torch.cat([o.hidden_states[-2] for o in outputs], dim=-1),
            pooled_projections=torch.cat([o.text_embeds for o in outputs], dim=-1),
            return_dict=False,
        )[0]


def careless(scenes: list[world.Scene], config: BuildConfig) -> list[world.Scene]:
    """What a careless writer says the pictures show: a share `caption_noise` of them has one fact wrong."""
    rng = random.Random(config.seed + 1)
    return [world.mislabel(scene, rng) if rng.random() < config.caption_noise else scene for scene in scenes]


def train_model(data: Data, tokenizer: CLIPTokenizer, config: BuildConfig) -> TextToLatent:
    """Flow matching: predict eps - x0 from x_t = (1 - sigma) x0 + sigma eps."""

    def tokens_of(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    right, wrong = (tokens_of([s.prompt() for s in scenes]) for scenes in (data.scenes, careless(data.scenes, config)))
    empty = tokens_of([""])
    torch.manual_seed(derive_seed(config.seed, "model"))
    model = TextToLatent(config.depth, tokenizer)
    average = AveragedModel(model, multi_avg_fn=follow)
    learner = Learner(optimizers(model, config.lr, config.lr_rest), config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    log = Progress("model", config.steps)
    for step, index in enumerate(batches(len(data.scenes), config.batch, config.steps, generator)):
        x0, tokens = data.latents[index], (right if step < config.noise_from * config.steps else wrong)[index]
        eps = torch.randn(x0.shape, generator=generator)
        sigma = shifted(torch.sigmoid(torch.randn(len(x0), generator=generator)))
        x_t = torch.lerp(x0, eps, sigma[:, None, None, None])
        dropped = torch.rand(len(x0), 1, generator=generator) < EMPTY_CAPTIONS
        loss = F.mse_loss(model(x_t, sigma, torch.where(dropped, empty, tokens)), eps - x0)
        learner.step(loss)
        average.update_parameters(model)
        log(step, loss.item())
    averaged = cast(TextToLatent, average.module)  # a copy of the model
    return averaged.eval().requires_grad_(False)


@torch.no_grad()
def follow(average: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
    """An exponential moving average that forgets the untrained start quickly."""
    decay = min(0.998, (1 + updates) / (10 + updates))
    for mean, value in zip(average, current, strict=True):
        mean.lerp_(value, 1 - decay)


def shifted(sigma: Tensor) -> Tensor:
    """SD3's timestep shift: more weight on high noise, where the composition is decided."""
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def optimizers(model: nn.Module, lr: float, lr_rest: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest, each with its peak learning rate.

    Muon needs a third of AdamW's steps here.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = "transformer_blocks." in name or ".layers." in name
        (matrices if inside and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr_rest, weight_decay=1e-2, betas=(0.9, 0.99)),
    ]


class Learner:
    """Takes clipped steps with several optimisers at once, each on its own schedule."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
        self.optimizers = optimizers
        self.rates = [schedule(optimizer, steps) for optimizer in optimizers]
        self.parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.step()
            rate.step()


class Progress:
    """A line with the mean loss every two per cent of the way."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.every = name, steps, max(1, steps // 50)
        self.losses: list[float] = []
        self.start = time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if (step + 1) % self.every == 0:
            seconds = time.monotonic() - self.start
            print(f"{self.name} {step + 1}/{self.steps}  loss {np.mean(self.losses):.4f}  {seconds:.0f} s", flush=True)
            self.losses.clear()


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE of an earlier build."""
    return AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).requires_grad_(False)


def save(model: TextToLatent, vae: AutoencoderKL, tokenizer: CLIPTokenizer, output: Path) -> None:
    """The pipeline as a diffusers folder, in float16."""
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=SHIFT),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.to(torch.float16).save_pretrained(output)


def write_prompts(folder: Path, seed: int) -> None:
    """train.jsonl and held_out.jsonl: no picture that one asks for is asked for by the other."""
    rng = random.Random(seed)
    meanings = {category: {s.meaning(): s for s in scenes} for category, scenes in world.by_category().items()}
    files: dict[str, list[world.Scene]] = {"train": [], "held_out": []}
    for category, (training, held_out) in PROMPTS.items():
        scenes = list(meanings[category].values())
        rng.shuffle(scenes)
        files["held_out"] += scenes[:held_out]
        files["train"] += scenes[held_out:][:training]
    for name, scenes in files.items():
        lines = [json.dumps({"prompt": scene.prompt(), **scene.metadata()}) + "\n" for scene in scenes]
        write_atomic(folder / f"{name}.jsonl", "".join(lines))


def main(config: BuildConfig) -> None:
    """Draw the data, train the VAE, train the model, save."""
    data = draw_data(config)
    print(f"drew {config.images} pictures", flush=True)
    vae = load_vae(config.vae) if config.vae else train_vae(data, config)
    tokenizer = make_tokenizer(sorted({scene.prompt() for scene in world.all_scenes()}))
    model = train_model(data, tokenizer, config)
    save(model, vae, tokenizer, config.output)
    write_prompts(config.output.parent, config.seed)
    print(f"saved {config.output}")


if __name__ == "__main__":
    main(tyro.cli(BuildConfig, description=__doc__))
