"""`NativePolicy`: the engine's policy on ComfyUI's MODEL and VAE, where they are and with the user's patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models as families
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.source import Source
from dgpo_core.policy import AdapterName, Cond, Policy
from dgpo_core.policy.base import Check
from dgpo_core.policy.frozen_linear import LoraBank
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.quantised import NONE

from . import compiling, counting
from . import sampling as native_sampling
from . import texts as native_texts
from .attention import OVERRIDE, attention, watch
from .hooks import Hooks, differentiable, target_shapes
from .packed import packed
from .sampling import NativeSolver
from .weights import told_of_others_weights

INJECTION = "dgpo"
NETWORK = "diffusion_model"  # what the names in a LoRA file begin with
_PROMPT = "prompt"  # the one tensor of a Cond: which text each row has
_MOST_SOURCES = 8  # a Qwen-Image-Edit was trained with up to three
_KEPT = 1024  # conditionings in main memory: of Flux 4 MB each,
_KEPT_BYTES = 8 * 2**30  # of HiDream, which sees every layer of Llama, 69
_SIZES = {families.SD15: (512, 512), families.SD20: (512, 512), families.WAN21_T2V: (480, 832)}
_DEFAULT_SIZE = (1024, 1024)
_Asked = tuple[str, tuple[Source, ...], tuple[int, int]]  # a text, the pictures that it is about, (height, width)
_LABELS = {  # modelspec.architecture and ss_base_model_version of the LoRA, by ComfyUI's name of the family
    "SD15": ("stable-diffusion-v1", "sd_v1"),
    "SD20": ("stable-diffusion-v2", "sd_v2"),
    "SDXL": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "SD3": ("stable-diffusion-3", "sd3"),
    "Flux": ("flux-1-dev", "flux1"),
    "QwenImage": ("qwen-image", "qwen_image"),
    "Lumina2": ("lumina-2", "lumina2"),
    "HiDream": ("hidream-i1", "hidream_i1"),
    "ZImage": ("z-image", "zimage"),
    "WAN21_T2V": ("wan2.1", "wan21"),
}


class NativePolicy(Policy):
    """Adapters on a clone of `model`, which shares the MODEL's weights; see `Policy` for what the methods promise.

    encode_text: from a text, and the pictures [3,H,W] that it is about, to a CONDITIONING; vae: ComfyUI's; targets:
    ends of the names of the modules that get a LoRA, none for the attention projections; prediction: what the MODEL
    predicts, where "auto" (its own sampling) would be wrong; quantize: how the large layers are kept of a copy of the
    network that is then trained on, see `packed`. A `Cond` of this policy holds the numbers of its texts: conditionings
    stay in ComfyUI's form. Call its methods outside of inference mode (`host.engine`).

    Latents of a video model have one frame: [B,C,1,h,w]. Raises UserError for a MODEL that cannot be trained: weights
    that are kept in an unknown way, latents that are no pictures, another noise schedule.
    """

    def __init__(
        self,
        model: Any,
        encode_text: Callable[..., Any],
        vae: Any,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        targets: Sequence[str],
        seed: int,
        prediction: str = "auto",
        quantize: str = NONE,
    ) -> None:
        own = model.clone() if quantize == NONE else packed(model, quantize)
        compiling.without_comfyuis(own)
        watch(own)
        self.patcher, self.encode_text, self.vae = native_sampling.decided(own, prediction), encode_text, vae
        base = own.model
        if getattr(base.latent_format, "latent_dimensions", 2) not in (2, 3):
            raise UserError("The MODEL's latents are no pictures: use a text-to-image or text-to-video model.")
        self.device: torch.device = self.patcher.load_device
        self.dtype: torch.dtype = base.manual_cast_dtype or base.get_dtype()
        self.family = type(base.model_config).__name__
        sampling = self.patcher.get_model_object("model_sampling")
        self.few_steps = native_sampling.few_steps(self.patcher)
        self.prediction, self.scheduler_config = native_sampling.schedule(sampling, self.device)
        shapes = target_shapes(base.diffusion_model, targets)
        self.adapters = LoraBank(shapes, rank=rank, alpha=alpha, dropout=dropout, seed=seed, device=self.device)
        self.hooks = Hooks(base.diffusion_model, self.adapters)
        self.patcher.set_injections(INJECTION, [self.hooks.injection()])
        self._reserved = 0.0  # bytes beside the weights, since ComfyUI last placed them
        self.sources = (0, _MOST_SOURCES if sees_references(base) else 0)
        self.counts = counting.Counts(self, shapes, attention)
        self._numbers: dict[_Asked, int] = {}  # of every text so far
        self._conditionings: dict[int, Any] = {}  # by number, of the latest texts

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def default_size(self) -> tuple[int, int]:
        config = self.patcher.model.model_config
        return next((size for family, size in _SIZES.items() if isinstance(config, family)), _DEFAULT_SIZE)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        unit = int(self.vae.spacial_compression_encode())
        if height < unit or width < unit or height % unit or width % unit:
            raise UserError(
                f"Images of this model have a height and width of multiples of {unit}, not {height} x {width}."
            )
        latents = self.patcher.model.latent_format
        frames = (1,) if getattr(latents, "latent_dimensions", 2) == 3 else ()
        return latents.latent_channels, *frames, height // unit, width // unit

    # --- prompts -----------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> list[Cond]:
        return self._conds([(text, (), (0, 0)) for text in prompts])

    def condition(self, prompts: Sequence[Prompt], negative: str, size: tuple[int, int]) -> tuple[list[Cond], Cond]:
        if not any(prompt.sources for prompt in prompts):
            return super().condition(prompts, negative, size)
        asked: list[_Asked] = [(prompt.text, prompt.sources, size) for prompt in prompts]
        without: list[_Asked] = [(negative, sources, size) for _, sources, _ in asked]
        conds = self._conds([*asked, *without])
        return conds[: len(asked)], Cond.cat(conds[len(asked) :])

    def is_encoded(self, prompts: Sequence[str]) -> bool:
        return all(self._numbers.get((text, (), (0, 0))) in self._conditionings for text in prompts)

    def _conds(self, asked: Sequence[_Asked]) -> list[Cond]:
        numbers = [self._numbers.setdefault(one, len(self._numbers)) for one in asked]
        for number in dict.fromkeys(numbers):
            self._conditioning(number)
        sizes = {number: native_texts.size(found) for number, found in self._conditionings.items()}
        total = sum(sizes.values())
        for oldest in list(sizes)[: -len(set(numbers))]:
            if len(self._conditionings) <= _KEPT and total <= _KEPT_BYTES:
                break
            del self._conditionings[oldest]
            total -= sizes[oldest]
        return [Cond({_PROMPT: torch.tensor([number])}) for number in numbers]

    def _conditioning(self, number: int) -> Any:
        """Of the text with this number; encoded again where it was dropped, and now the latest."""
        found = self._conditionings.pop(number, None)
        self._conditionings[number] = found or self._encode(*list(self._numbers)[number])
        return self._conditionings[number]

    def conditioning(self, prompt: Prompt, size: tuple[int, int]) -> Any:
        """What a prompt is for the MODEL, in ComfyUI's form."""
        (cond,), _ = self.condition([prompt], "", size)
        return self._conditioning(int(cond.tensors[_PROMPT]))

    def _encode(self, text: str, sources: Sequence[Source], size: tuple[int, int]) -> Any:
        """Its CONDITIONING, on the CPU and in tensors that autograd takes; sources are its reference latents."""
        pictures = [source.fitted(size) for source in sources]
        with torch.inference_mode():
            found = self.encode_text(text, pictures) if pictures else self.encode_text(text)
            found = native_texts.referring(found, self.vae, pictures)
        return native_texts.own(found)

    # --- the network -------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """The MODEL's weights on the device, as far as ComfyUI has room for them, with the adapters on."""
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([self.patcher])
        self._reserved = 0.0

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x_t, t, texts = x_t.to(self.device, torch.float32), t.to(self.device), cond.tensors[_PROMPT]
        x, sigma = native_sampling.to_comfy(self.prediction, x_t, t)
        known = {text: self._conditioning(text) for text in texts.unique().tolist()}  # may make room for the CLIP
        together = native_texts.together(texts, sigma, known, by_level=native_sampling.is_patched(self.patcher))
        with self._running(x, next(iter(known.values())), native_texts.references(known.values())):
            x0 = self._by_text(x, sigma, together)
        return native_sampling.from_denoised(self.prediction, x_t, x0, t).float()

    def _by_text(self, x: Tensor, sigma: Tensor, together: Sequence[tuple[Tensor, Any]]) -> Tensor:
        if len(together) == 1:  # as it mostly is: nothing is picked, which would wait for the device
            return self._denoised(x, sigma, together[0][1])
        parts = []
        for rows, given in together:
            with self.adapters.dropout.dropping_rows(rows.tolist()):
                parts.append(self._denoised(x[rows], sigma[rows], given))
        return torch.cat(parts)[torch.cat([rows for rows, _ in together]).argsort()]

    @contextmanager
    def _running(self, x: Tensor, conditioning: Any, references: int = 0) -> Iterator[None]:
        """What ComfyUI does around a sampler's run. references: the most values per channel that a row sees besides."""
        self._make_room(x, conditioning, references)
        try:
            self.patcher.pre_run()
            with differentiable(), told_of_others_weights():
                yield
        finally:
            self.patcher.cleanup()

    def _make_room(self, x: Tensor, conditioning: Any, references: int = 0) -> None:
        """The weights on the device, as far as they leave room for a forward of x [B,C,...] and what training keeps."""
        seen = x[0, 0].numel() + references
        needed = self.patcher.model.memory_required(list(x.shape)) * seen / x[0, 0].numel()
        if torch.is_grad_enabled():
            needed = max(needed, self.counts.for_backward(x, conditioning, references, needed))
        if self.patcher.is_injected and needed <= self._reserved:
            return
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        self._reserved = needed

    def _denoised(self, x: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """The clean latent that the MODEL sees in x [B,C,...] at sigma [B], by the path that its samplers take."""
        helpers, samplers = comfy.sampler_helpers, comfy.samplers
        conds = {"positive": native_texts.without_gradient(helpers.convert_cond(conditioning))}
        others = self._load_others(conds)
        self.hooks.keep_inputs = any("control" in cond for cond in conds["positive"])
        options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        helpers.prepare_model_patcher(self.patcher, conds, options)
        samplers.filter_registered_hooks_on_conds(conds, options)
        of_network = options["transformer_options"]
        of_network.setdefault(OVERRIDE, attention)
        if hasattr(of_network.get("easycache"), "clone"):  # ComfyUI's; it would gather latents from forward to forward
            of_network["easycache"] = of_network["easycache"].clone()
        model = self.patcher.model
        with torch.no_grad():
            conds = samplers.process_conds(model, x, conds, x.device, latent_image=torch.zeros_like(x), seed=0)
        try:
            with native_sampling.repeatable(self.device):
                return samplers.calc_cond_batch(model, [conds["positive"]], x, sigma, options)[0]
        finally:
            helpers.cleanup_models(conds, others)

    def _load_others(self, conds: Any) -> list[Any]:
        """The models that conditionings bring with them, such as ControlNets, on the device beside this one."""
        others, needed = comfy.sampler_helpers.get_additional_models(conds, self.dtype)
        if others:
            needed += self._reserved  # for the forward and its backward
            with torch.inference_mode():
                comfy.model_management.load_models_gpu([self.patcher, *others], memory_required=needed)
        return others

    # --- drawing -----------------------------------------------------------------------------------------------------

    def solver(
        self, name: str, steps: int, height: int, width: int, shift: float | None = None, scheduler: str = ""
    ) -> NativeSolver:
        given = self.patcher, self.prediction, self.scheduler_config
        return native_sampling.make_native_solver(*given, name, steps, shift=shift, scheduler=scheduler)

    def sample(self, solver: NativeSolver, x_T: Tensor, cond: Cond, uncond: Cond, cfg: float, check: Check) -> Tensor:
        texts = cond.tensors[_PROMPT]
        without = uncond.tensors[_PROMPT].expand(len(texts))  # of an editor, a row for each: it sees the source, too
        parts, order = [], []
        for text in texts.unique().tolist():
            positive, negative = self._conditioning(text), self._conditioning(int(without[texts == text][0]))
            for rows in (texts == text).nonzero().flatten().split(self._at_once(x_T)):
                parts.append(native_sampling.draw(self.patcher, solver, x_T[rows], positive, negative, cfg, check))
                order.append(rows)
        self._reserved = 0.0  # samplers have the weights placed for what they need
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _at_once(self, batch: Tensor) -> int:
        """Rows that are drawn and decoded together. On a CPU a matrix product's last bits depend on how many there are,
        and each image must be what KSampler draws from its seed alone."""
        return 1 if self.device.type == "cpu" else len(batch)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.hooks.checkpointing

    def enable_gradient_checkpointing(self) -> None:
        self._recompute(True)

    def disable_gradient_checkpointing(self) -> None:
        self._recompute(False)

    def _recompute(self, on: bool) -> None:
        """Also on a network that has the hooks already, as where memory has run out amid a training."""
        self.hooks.checkpointing = on
        if self.patcher.is_injected:
            with torch.inference_mode():
                self.patcher.eject_model()
                self.patcher.inject_model()

    def compile(self, backend: str = "inductor") -> None:
        compiling.repeated(self.hooks.network)  # refuses a network without any
        self.hooks.compiler = backend

    # --- the VAE -----------------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor) -> Tensor:
        with torch.inference_mode():
            scaled = self.patcher.model.process_latent_out(latents.detach().clone())
            images = torch.cat([self.vae.decode(part) for part in scaled.split(self._at_once(scaled))])
        if images.ndim == 5:  # [B,frames,H,W,3]
            images = images[:, 0]
        return images.to(self.device, torch.float32, copy=True).movedim(-1, 1).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        pixels = images.movedim(1, -1).cpu()
        rows = pixels.split(1) if self.vae.latent_dim == 3 else [pixels]  # several would be the frames of one video
        with torch.inference_mode():
            latents = self.patcher.model.process_latent_in(torch.cat([self.vae.encode(row) for row in rows]))
        return latents.to(self.device, torch.float32, copy=True)

    # --- adapters ----------------------------------------------------------------------------------------------------

    def using(self, name: AdapterName | None) -> AbstractContextManager[None]:
        return self.adapters.using(name)

    def dropping(self, seeds: Sequence[int]) -> AbstractContextManager[None]:
        return self.adapters.dropping(seeds)

    def trainable(self) -> dict[str, Parameter]:
        return self.adapters.state("current")

    def adapter_state(self, name: AdapterName) -> dict[str, Tensor]:
        return dict(self.adapters.state(name))

    def load_lora(self, lora: lora_file.LoraFile) -> None:
        """All three adapters become the one in the file, its modules named as the network's.

        The base, and so the reference, stays without it. Raises UserError if it does not fit.
        """
        layers = frozenset(name for name, _ in self.patcher.model.diffusion_model.named_modules())
        state = self.adapter_state("current")
        self.adapters.load(lora_file.fit(lora, state, self.adapters.scale, layers))

    def lora_tensors(self, name: AdapterName = "current") -> dict[str, Tensor]:
        """Under the names that ComfyUI's own loader knows for every family: `diffusion_model.<module>`."""
        return lora_file.tensors(NETWORK, self.adapter_state(name), self.adapters.scale)

    def lora_metadata(self, extra: Mapping[str, str]) -> dict[str, str]:
        architecture, base_version = _LABELS.get(self.family, (self.family.lower(), self.family.lower()))
        own = {"modelspec.implementation": "comfyui", "ss_network_module": "networks.lora"}
        return lora_file.describe(
            architecture=architecture,
            base_version=base_version,
            rank=self.adapters.rank,
            alpha=self.adapters.alpha,
            prediction=self.prediction.name,
            extra={**own, **extra},
        )

    # --- off the accelerator -----------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> None:
        """To the CPU: takes the adapters off the network, which ComfyUI moves; they come back where it is needed."""
        if torch.device(device).type != "cpu":
            self.load()
            return
        with torch.inference_mode():
            self.patcher.detach(unpatch_all=False)

    def movable(self) -> nn.Module:
        return self.patcher.model


def sees_references(base: Any) -> bool:
    """Whether ComfyUI's class of a model looks at reference latents at all: it asks for them by name."""
    methods = [vars(cls).get("extra_conds") for cls in type(base).__mro__]
    return any("reference_latents" in method.__code__.co_consts for method in methods if method)
