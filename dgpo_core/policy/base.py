"""What the trainer sees of a model: `Policy`, its prompt conditioning `Cond`, and classifier-free guidance.

Nothing here knows diffusers or peft, so that a policy on another engine can be written against the same interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.common.sending import sent
from dgpo_core.diffusion.prediction import Prediction
from dgpo_core.diffusion.solvers import Solver
from dgpo_core.policy.distilled import FewSteps
from dgpo_core.policy.lora import file as lora_file

AdapterName = Literal["current", "old", "ema"]
Check = Callable[[], None]  # called before every forward; raises to stop


@dataclass(frozen=True, eq=False)
class Cond:
    """The conditioning of B prompts: named tensors, each with a leading batch dimension B."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def expand(self, n: int) -> Cond:
        """Every row n times, rows of one prompt side by side: B -> B*n. For B = 1 this is a view, no copy."""
        if len(self) == 1:
            return Cond({k: v.expand(n, *v.shape[1:]) for k, v in self.tensors.items()})
        return Cond({k: v.repeat_interleave(n, dim=0) for k, v in self.tensors.items()})

    def select(self, index: Tensor | Sequence[int] | slice) -> Cond:
        """The rows `index`."""
        index = index if isinstance(index, slice | Tensor) else torch.as_tensor(index, dtype=torch.long)
        return Cond(
            {k: v[sent(index, v.device) if isinstance(index, Tensor) else index] for k, v in self.tensors.items()}
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """Moved and, floating-point tensors only, cast. Masks stay where they are: how many tokens count is asked at
        every forward, and an answer from a device has to be waited for."""
        return Cond({k: _moved(v, device, dtype) for k, v in self.tensors.items()})

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """One after the other along the batch; shorter sequences [B,L,...], and masks, are filled up with zeros."""
        if len(conds) == 1:
            return conds[0]
        return Cond({k: _stacked([c.tensors[k] for c in conds]) for k in conds[0].tensors})


def _moved(tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    longest = max((part.shape[1] for part in parts if part.ndim > 1), default=0)
    if any(part.ndim > 1 and part.shape[1] < longest for part in parts):
        parts = [
            torch.cat([part, part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:])], 1) for part in parts
        ]
    return torch.cat(list(parts))


class Policy(ABC):
    """A text-to-image model, or one that edits images, with three LoRA adapters on one frozen base.

    The adapters: "current" is trained, "old" is its fast EMA, "ema" the slow one; None is the base, the reference.
    All three start equal. Only "current" has parameters that require a gradient.

    Latents are [B,C,h,w] here; of a model of videos, whose pictures are one frame, [B,C,1,h,w].

    family: "sd15", "sdxl", "sd3", "flux", ...; scheduler_config: the checkpoint's; dtype: of the frozen base (the
    adapters are float32 always). sources: how many pictures a prompt must bring at least and may at most.
    few_steps: what is known of a base that was distilled to draw in a few.
    """

    sources: tuple[int, int] = (0, 0)
    family: str
    prediction: Prediction
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    few_steps: FewSteps | None = None

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was made for."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w) or (C, 1, h, w) of the latent of an image of height x width pixels.

        Raises UserError if the size does not fit.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Cond]:
        """One Cond with B = 1 per prompt. A text is encoded once per run, and the same whatever texts are beside it."""

    def condition(self, prompts: Sequence[Prompt], negative: str, size: tuple[int, int]) -> tuple[list[Cond], Cond]:
        """One Cond with B = 1 per prompt, its sources included, and the negative prompt's.

        The latter has one row, or, of an editor, a row for each prompt: it sees the sources, too. size: (height, width)
        in pixels of what is drawn.
        """
        *conds, uncond = self.encode([*(prompt.text for prompt in prompts), self.negative_text(negative)])
        return conds, uncond

    def negative_text(self, negative: str) -> str:
        """What `encode` and `read_ahead` are given for a negative prompt: another text where it is read otherwise."""
        return negative

    def check_sources(self, prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
        """Raises UserError for a prompt with fewer or more sources than the model takes, or of another shape."""
        least, most = self.sources
        for prompt in prompts:
            count, where = len(prompt.sources), shown(prompt.where, 1000) or "A prompt"
            if count < least:
                raise UserError(
                    f"{where}: a model of the family {self.family} edits pictures, and the prompt"
                    f' {shown(prompt.text, 60)!r} brings none: add "image" to it in a .jsonl file, or'
                    ' "sources" in a preference file.'
                )
            if count > most:
                takes, instead = (
                    "draws from text alone",
                    'take one that edits (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit), or leave "image" out',
                )
                if most:
                    takes, instead = f"takes at most {most}", "leave the others out"
                raise UserError(
                    f"{where}: the prompt {shown(prompt.text, 60)!r} brings {count} picture{'s' if count > 1 else ''},"
                    f" but a model of the family {self.family} {takes}: {instead}."
                )
            for source in prompt.sources:
                source.require_shape(size)

    def is_encoded(self, prompts: Sequence[str]) -> bool:
        """Whether `encode` would need no text encoder for these prompts."""
        return False

    def read_ahead(self, prompts: Iterable[str], check: Check) -> None:  # noqa: B027 - nothing to do is a fine default
        """Reads prompts that will be asked for into a cache, where there is one, and lets go of the text encoders.

        They are then on the device once, in place of in each iteration that has new prompts. Nothing comes of it where
        the cache has no room for all of them, and where there is none.
        """

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """One forward of the network with the active adapter and no CFG: x_t [B,C,h,w], t [B] -> float32 [B,C,h,w]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,h,w] -> images [B,3,H,W], float32, 0..1."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in 0..1 -> latents [B,C,h,w], float32: the mode of the VAE's posterior, scaled."""

    @abstractmethod
    def solver(
        self, name: str, steps: int, height: int, width: int, shift: float | None = None, scheduler: str = ""
    ) -> Solver:
        """A deterministic solver on this model's noise levels for images of height x width pixels.

        scheduler: the name of other noise levels, where the policy knows any. Raises UserError for a name unknown here.
        """

    def guide(self, u: Tensor, c: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of the predictions u (of the negative prompt) and c, both [B,C,h,w]."""
        return u + scale * (c - u)

    @abstractmethod
    def sample(self, solver: Solver, x_T: Tensor, cond: Cond, uncond: Cond, cfg: float, check: Check) -> Tensor:
        """Clean latents x0 from initial noise x_T, both [B,C,h,w], by a solver of this policy's and without gradients.

        cond has B rows, uncond one or B; cfg: the guidance scale, 1 is without guidance.
        """

    @abstractmethod
    def using(self, name: AdapterName | None) -> AbstractContextManager[None]:
        """Inside the block `predict` uses this adapter (None: the base alone); no weight is copied.

        A backward with gradient checkpointing recomputes the forward with the adapter that is active *then*: call it
        where the same adapter is active.
        """

    @abstractmethod
    def dropping(self, seeds: Sequence[int]) -> AbstractContextManager[None]:
        """Inside the block the LoRA dropout of "current" is on; it is off everywhere else.

        seeds: one of each row of `predict`, which decides the row's masks, whatever rows are beside it.
        """

    @abstractmethod
    def trainable(self) -> dict[str, Parameter]:
        """The parameters of "current" by name; the names are those of `adapter_state`."""

    @abstractmethod
    def adapter_state(self, name: AdapterName) -> dict[str, Tensor]:
        """The live parameters of one adapter, the same keys for all three; write into them with `copy_` or `lerp_`."""

    @abstractmethod
    def load_lora(self, lora: lora_file.LoraFile) -> None:
        """All three adapters become the one in the file; the base, and so the reference, stays without it.

        Raises UserError if it does not fit.
        """

    @abstractmethod
    def lora_tensors(self, name: AdapterName = "current") -> dict[str, Tensor]:
        """One adapter as a file holds it: at scale 1, float32, on the CPU, no memory shared with the adapter."""

    @abstractmethod
    def lora_metadata(self, extra: Mapping[str, str]) -> dict[str, str]:
        """What the file's header says of the adapter, with `extra` added or in its place."""

    def save_lora(
        self, path: str | Path, metadata: Mapping[str, str] | None = None, name: AdapterName = "current"
    ) -> None:
        """Writes one adapter atomically to a .safetensors file."""
        lora_file.write(path, self.lora_tensors(name), self.lora_metadata(metadata or {}))

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Moves the network, and whatever else is not moved about while it works."""

    @abstractmethod
    def movable(self) -> nn.Module:
        """All that `to` moves, for those who account for memory."""

    def text_encoders_to(self, device: torch.device | str) -> None:  # noqa: B027 - nothing to do is a fine default
        """Moves the text encoders; nothing to do where there are none."""

    def vae_to(self, device: torch.device | str) -> None:  # noqa: B027 - nothing to do is a fine default
        """Moves the VAE; nothing to do where there is none."""

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward, which takes less memory and more time."""
        return False

    def enable_gradient_checkpointing(self) -> None:  # noqa: B027 - nothing to do is a fine default
        """Trades time for memory in the backward; what is computed stays the same."""

    def disable_gradient_checkpointing(self) -> None:  # noqa: B027 - nothing to do is a fine default
        """The inverse."""

    def compile(self) -> None:  # noqa: B027 - nothing to do is a fine default
        """Compiles the network with torch.compile."""


def guided(policy: Policy, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond | None, scale: float) -> Tensor:
    """Classifier-free guidance, as `policy.guide` has it, in one forward of 2B; scale 1 is a plain prediction of B.

    x_t [B,C,h,w], t [B], cond and uncond of B rows each (uncond may have one row).
    """
    if scale == 1.0 or uncond is None:
        return policy.predict(x_t, t, cond)
    if len(uncond) != len(cond):
        uncond = uncond.expand(len(cond))
    both = policy.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat([uncond, cond]))
    u, c = both.chunk(2)
    return policy.guide(u, c, scale)
