"""`DiffusersPolicy`: a policy on a diffusers pipeline and peft. A family's file says only what is its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dgpo_core.common.errors import UserError
from dgpo_core.common.sending import sent
from dgpo_core.diffusion.prediction import Prediction
from dgpo_core.diffusion.solvers import SchedulerSolver, Solver, make_solver
from dgpo_core.policy.attention import trainable_attention
from dgpo_core.policy.base import AdapterName, Check, Cond, Policy, guided
from dgpo_core.policy.family import TEXT_ENCODERS, Family
from dgpo_core.policy.host_blocks import keep_on_host
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.lora import names as lora_names
from dgpo_core.policy.own_memory import own_memory
from dgpo_core.policy.peft_adapters import PeftAdapters
from dgpo_core.policy.prompt_cache import PromptCache
from dgpo_core.policy.quantised import NONE, quantise
from dgpo_core.policy.vae import Latents

# A prompt of SD3 with T5 takes 2.7 MB: past this much host memory the oldest are dropped, and encoded again if needed,
# or read from the cache on disk, where there is one.
_CACHE_BYTES = 16 * 2**30
_BESIDE_A_CACHE = 2 * 2**30
_AHEAD = 256  # prompts that are read in one go
_WORKING_BYTES = 2**30  # what text encoders need besides their weights


class DiffusersPolicy(Family, Policy):
    """The shared part of all families: see `Family` for what each says, and `Policy` for what the methods promise.

    pipe: the loaded pipeline, its modules already in `dtype` on `device`; adapters are added to its network here.
    guidance: embedded guidance scale, for networks that have one (Flux dev). offload: text encoders and VAE stay on the
    CPU and come to the device only while they work. quantize, quantize_text: how the large Linears of the
    network and of the text encoders are kept, see `quantised`. offload_blocks: its blocks stay in main
    memory, see `host_blocks`. cache: prompts that were read before. late: gives the
    text encoders of a `pipe` without them, by name, each time anew; they are asked for once a prompt must be read.
    """

    latents_class: ClassVar[type[Latents]] = Latents
    """What its latents are to its VAE."""

    def __init__(
        self,
        pipe: Any,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str] | None,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        guidance: float = 3.5,
        offload: bool = False,
        quantize: str = NONE,
        quantize_text: str = NONE,
        offload_blocks: bool = False,
        cache: PromptCache | None = None,
        late: Callable[[], Mapping[str, nn.Module]] | None = None,
    ) -> None:
        self.pipe, self.dtype, self.device, self.guidance, self.offload = pipe, dtype, device, guidance, offload
        self.network: Any = getattr(pipe, self.network_name)
        self.scheduler_config: dict[str, Any] = dict(pipe.scheduler.config)
        self.quantize_text, self.cache, self._late = quantize_text, cache, late
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                self._freeze(module)
        if dtype == torch.float16 and getattr(pipe.vae.config, "force_upcast", False):
            pipe.vae.to(dtype=torch.float32)  # SDXL's VAE overflows in float16
        if quantize != NONE:
            quantise(self.network, quantize, device, self.kept_whole)
        self._quantise_text_encoders()
        self.blocks = keep_on_host(self.network, device, self._repeated()) if offload_blocks else None
        self.network.to(device)
        if not offload:
            self.text_encoders_to(device)
            self.vae_to(device)
        self.adapters = PeftAdapters(
            self.network, rank=rank, alpha=alpha, dropout=dropout, targets=targets or self.targets, seed=seed
        )
        self.prediction: Prediction = self._prediction()
        self._readers: tuple[str, ...] = ()  # text encoders that came late and are there
        self._conds: dict[str, Cond] = {}
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._conds_bytes = 0
        self._latents = self.latents_class(pipe.vae)
        self._channels, self._factor = self._latents.channels, self._latents.factor

    def _freeze(self, module: nn.Module) -> None:
        module.requires_grad_(False).eval()
        if self.device.type == "cpu":
            own_memory(module)

    # --- what a family says ------------------------------------------------------------------------------------------

    @abstractmethod
    def _prediction(self) -> Prediction:
        """The prediction that the checkpoint was trained for."""

    @abstractmethod
    def _encode(self, text: str) -> dict[str, Tensor]:
        """The conditioning of one prompt, each tensor with a leading 1."""

    @abstractmethod
    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The network on x [B,C,h,w] in `dtype`, t [B] float32."""

    def _solver_options(self, steps: int, latent: tuple[int, int, int]) -> dict[str, Any]:
        """Further arguments of `make_solver`: mu, sigmas."""
        return {}

    def _constant(self, key: tuple[Any, ...], make: Callable[[], Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that depends on the shapes alone, made once, on the device and in `dtype`, else the network's."""
        if key not in self._constants:
            self._constants[key] = make().to(self.device, dtype or self.dtype)
        return self._constants[key]

    # --- prompts -----------------------------------------------------------------------------------------------------

    def is_encoded(self, prompts: Sequence[str]) -> bool:
        cache = self.cache
        return all(text in self._conds or (cache is not None and cache.has(text)) for text in prompts)

    def encode(self, prompts: Sequence[str]) -> list[Cond]:
        unique = list(dict.fromkeys(prompts))
        self._read(unique)
        conds = {text: self._conds[text].to(self.device) for text in unique}
        self._forget(keep=len(conds))
        return [conds[text] for text in prompts]

    def read_ahead(self, prompts: Iterable[str], check: Check) -> None:
        cache = self.cache
        if cache is None:
            return
        ahead = list(dict.fromkeys(prompts))
        kept = 0
        for part in (ahead[i : i + _AHEAD] for i in range(0, len(ahead), _AHEAD)):
            self._read(part, check)
            kept += sum(_bytes(self._conds[text]) for text in part)
            self._forget(keep=0)
            if kept > cache.most:
                return
        if all(map(cache.has, ahead)):
            for name in self._readers:
                setattr(self.pipe, name, None)
            self._readers = ()

    @torch.no_grad()
    def _read(self, prompts: Sequence[str], check: Check | None = None) -> None:
        """Puts what is not yet in memory there: from the cache, or read by the text encoders."""
        new = [text for text in prompts if text not in self._conds and not self._find(text)]
        if not new:
            return
        self._bring_text_encoders()
        self._require_text_encoders()
        leave = self.offload or self._late is not None
        with self._room_for(self._text_encoders()), self._at_work(self.text_encoders_to, leave):
            for text in new:  # one at a time: an embedding must not depend on the prompts around it
                if check:
                    check()
                tensors = Cond(self._encode(text)).to("cpu", self.dtype).tensors
                self._remember(text, tensors)
                if self.cache:
                    self.cache.write(text, tensors)
        if self.cache:
            self.cache.make_room()

    def _find(self, text: str) -> bool:
        found = self.cache.read(text) if self.cache else None
        if found is not None:
            self._remember(text, found)
        return found is not None

    def _bring_text_encoders(self) -> None:
        """Loads those that the pipeline was made without; they are on the device only while they work."""
        if self._late is None or self._readers:
            return
        modules = self._late()
        for name, module in modules.items():
            self._freeze(module)
            setattr(self.pipe, name, module)
        self._readers = tuple(modules)
        self._quantise_text_encoders()

    def _quantise_text_encoders(self) -> None:
        for module in self._text_encoders() if self.quantize_text != NONE else ():
            quantise(module, self.quantize_text, self.device)

    def _require_text_encoders(self) -> None:
        missing = [n for n in self.text_encoder_names if getattr(self.pipe, n, None) is None]
        if missing:
            raise UserError(
                f"The model has no {' and no '.join(missing)}, so it cannot read prompts: load a whole one."
            )

    def _remember(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        self._conds[text] = Cond(tensors)
        self._conds_bytes += _bytes(self._conds[text])

    def _forget(self, keep: int) -> None:
        """Drops the oldest prompts where the cache has grown out of all proportion, but not the latest `keep`."""
        most = _BESIDE_A_CACHE if self.cache else _CACHE_BYTES
        while self._conds_bytes > most and len(self._conds) > keep:
            self._conds_bytes -= _bytes(self._conds.pop(next(iter(self._conds))))

    # --- the network -------------------------------------------------------------------------------------------------

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self._forward(x_t.to(self.dtype), t, cond.tensors).float()

    def solver(
        self, name: str, steps: int, height: int, width: int, shift: float | None = None, scheduler: str = ""
    ) -> SchedulerSolver:
        if scheduler:
            raise UserError(
                f"The scheduler {scheduler!r} is one of ComfyUI's, for native policies: leave rollout.scheduler empty"
                " (in the node: model's own)."
            )
        options = self._solver_options(steps, self.latent_shape(height, width))
        return make_solver(name, self.scheduler_config, self.prediction, steps, shift=shift, **options)

    @torch.no_grad()
    def sample(self, solver: Solver, x_T: Tensor, cond: Cond, uncond: Cond, cfg: float, check: Check) -> Tensor:
        made_here = cast(SchedulerSolver, solver)  # by `solver`, as `Policy.sample` asks

        def predict(x: Tensor, t: Tensor) -> Tensor:
            check()
            return guided(self, x, t, cond, uncond, cfg)

        return made_here.sample(predict, sent(x_T, self.device))

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.network.is_gradient_checkpointing)

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        self.network.disable_gradient_checkpointing()

    def compile(self, backend: str = "inductor") -> None:
        """Compiles the repeated blocks one by one: much faster to compile than the whole, and as fast to run."""
        # Every adapter, with and without gradients, is a graph of each kind of block: past torch's limit of 8 it would
        # fall back to eager without a word.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)
        for module in self.network.modules():
            if type(module).__name__ in self._repeated():
                module.compile(backend=backend)

    def _repeated(self) -> set[str]:
        """The classes of the blocks that the network is made of."""
        return set(getattr(self.network, "_repeated_blocks", None) or ()) | set(self.repeated_blocks)

    # --- the VAE -----------------------------------------------------------------------------------------------------

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        unit = self._factor * self.patch
        if height < unit or width < unit or height % unit or width % unit:
            raise UserError(
                f"Images of this model have a height and width of multiples of {unit}, not {height} x {width}."
            )
        return self._channels, height // self._factor, width // self._factor

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was made for."""
        latent = getattr(self.pipe, "default_sample_size", 0) or getattr(self.network.config, "sample_size", 0)
        side = self.side or self._factor * latent
        return side, side

    def decode(self, latents: Tensor) -> Tensor:
        with self._at_work(self.vae_to, self.offload):
            return self._latents.decoded(latents)

    def encode_images(self, images: Tensor) -> Tensor:
        with self._at_work(self.vae_to, self.offload):
            return self._latents.encoded(images)

    # --- adapters ----------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, name: AdapterName | None) -> Iterator[None]:
        with self.adapters.using(name), trainable_attention():
            yield

    def dropping(self, seeds: Sequence[int]) -> AbstractContextManager[None]:
        return self.adapters.dropping(seeds)

    def trainable(self) -> dict[str, Parameter]:
        return self.adapters.state("current")

    def adapter_state(self, name: AdapterName) -> dict[str, Tensor]:
        return dict(self.adapters.state(name))

    def load_lora(self, lora: str | Path | lora_file.LoraFile) -> None:
        """Starts all three adapters from a plain LoRA of any trainer; UserError if it does not fit."""
        plain = lora if isinstance(lora, lora_file.LoraFile) else lora_file.read(lora)
        layers = frozenset(name for name, _ in self.network.named_modules())
        state = self.adapters.state("current")
        named = lora_names.resolve(plain, self.network, self.makers_names)
        self.adapters.load(lora_file.fit(named, state, self.adapters.scale, layers))

    def lora_tensors(self, name: AdapterName = "current") -> dict[str, Tensor]:
        return lora_file.tensors(self.network_name, self.adapter_state(name), self.adapters.scale)

    def lora_metadata(self, extra: Mapping[str, str]) -> dict[str, str]:
        architecture, base_version = self._labels()
        return lora_file.describe(
            architecture=architecture,
            base_version=base_version,
            rank=self.adapters.rank,
            alpha=self.adapters.alpha,
            prediction=self.prediction.name,
            extra=extra,
        )

    def _labels(self) -> tuple[str, str]:
        """`modelspec.architecture` of the base and `ss_base_model_version`."""
        return self.architecture, self.base_version

    # --- off the accelerator -----------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.network.to(self.device)
        if self.blocks:
            self.blocks.move(self.device)
        self._constants.clear()
        if not self.offload:
            self.vae_to(self.device)
            if self._late is None:
                self.text_encoders_to(self.device)

    def movable(self) -> nn.Module:
        parts = [self.network] if self.offload else list(self.pipe.components.values())
        return nn.ModuleList(part for part in parts if isinstance(part, nn.Module))

    def text_encoders_to(self, device: torch.device | str) -> None:
        for module in self._text_encoders():
            module.to(device)

    def _text_encoders(self) -> list[nn.Module]:
        components = [getattr(self.pipe, name, None) for name in TEXT_ENCODERS]
        return [module for module in components if module is not None]

    @contextmanager
    def _room_for(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Where they do not stay, the network leaves the device inside the block if they do not fit beside it.

        T5 takes 9.5 GB: beside Flux it fits no 24 GB card, and beside SD3.5 no 12 GB card.
        """
        need = sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))
        away = (self.offload or self._late is not None) and _free_memory(self.device) < need + _WORKING_BYTES
        if away:
            self.network.to("cpu")
        try:
            yield
        finally:
            if away:
                self.network.to(self.device)

    def vae_to(self, device: torch.device | str) -> None:
        self.pipe.vae.to(device)

    @contextmanager
    def _at_work(self, move: Callable[[torch.device | str], None], leave: bool) -> Iterator[None]:
        """Where they `leave`, modules are on the device inside the block and on the CPU outside."""
        if not leave:
            yield
            return
        move(self.device)
        try:
            yield
        finally:
            move("cpu")


def _free_memory(device: torch.device) -> float:
    """Bytes that are free on an accelerator; on a CPU nothing has to make room."""
    if device.type != "cuda":
        return float("inf")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _bytes(cond: Cond) -> int:
    return sum(v.nbytes for v in cond.tensors.values())
