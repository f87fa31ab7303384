"""Wan 2.1, and the one of Wan 2.2 that is alike: flow, prompts read by UMT5, pictures as films of one frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dgpo_core.policy.base import AdapterName
from dgpo_core.policy.families.flow import FlowPolicy
from dgpo_core.policy.families.frames import OfFrames
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.lora.names import Place, of_blocks

_TOKENS = 512  # default max_sequence_length of diffusers' pipeline, which fills up to as many with zeros

_BLOCK = {
    **{f"self_attn.{way}": (f"attn1.to_{way}",) for way in "qkv"}, "self_attn.o": ("attn1.to_out.0",),
    **{f"cross_attn.{way}": (f"attn2.to_{way}",) for way in "qkv"}, "cross_attn.o": ("attn2.to_out.0",),
    "ffn.0": ("ffn.net.0.proj",), "ffn.2": ("ffn.net.2",),
}  # fmt: skip
_ENDS = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
}  # fmt: skip
_INSTEAD = "take Wan 2.1 T2V or Wan 2.2 TI2V-5B"
_TWO = f"of Wan 2.2 A14B, whose two networks take turns in a picture, which cannot be trained here: {_INSTEAD}"
_GUIDED = f"a Wan that is shown a picture or a film, which cannot be trained here: {_INSTEAD}"


class _OfFrames(OfFrames):
    @property
    def factor(self) -> int:
        factor: int = self.vae.config.scale_factor_spatial
        return factor


class Wan(FlowPolicy):
    """Wan 2.1 T2V of 1.3B and of 14B, and Wan 2.2 TI2V-5B without a picture to begin with (all Apache-2.0).

    diffusers tells the 5B's network the time of each patch, which for a picture from noise is the same everywhere.
    """

    family = "wan"
    latents_class = _OfFrames
    pipeline_classes = ("WanPipeline", "WanVideoToVideoPipeline")
    other_pipelines = dict.fromkeys(("WanImageToVideoPipeline", "WanVACEPipeline", "WanAnimatePipeline"), _GUIDED)
    other_models = {"transformer_2": _TWO}  # noqa: RUF012 - as in the base class
    other_names = dict.fromkeys(("a14b", "high-noise", "highnoise", "low-noise", "lownoise"), _TWO)
    architecture = "wan2.1"
    base_version = "wan21"
    marks = ("head.modulation",)
    bare_names = True
    input_layer = "patch_embedding.weight"
    other_inputs = dict.fromkeys((32, 36, 52), "a Wan that is shown a picture or a film")
    parts = {"text_encoder": (), "vae": ()}  # noqa: RUF012 - as in the base class
    example = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"

    @classmethod
    def makers_names(cls, network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
        yield from of_blocks(network, "blocks", "blocks", _BLOCK)
        yield from ((name, Place((module,))) for name, module in _ENDS.items())

    @property
    def default_size(self) -> tuple[int, int]:
        # its makers' 480p, as in diffusers' pipeline, and 720p for the 5B, whose VAE has twice the factor
        return (704, 1280) if self._factor > 8 else (480, 832)

    def lora_tensors(self, name: AdapterName = "current") -> dict[str, Tensor]:
        """Under its makers' names: ComfyUI's own loader knows no others of this network, and diffusers knows both."""
        theirs = {place.modules[0]: known for known, place in self.makers_names(self.network, {})}
        state = {}
        for key, tensor in self.adapter_state(name).items():
            module, _, part = key.partition(".lora_")
            state[f"{theirs.get(module, module)}.lora_{part}"] = tensor
        return lora_file.tensors("diffusion_model", state, self.adapters.scale)

    def _encode(self, text: str) -> dict[str, Tensor]:
        tokens, _ = self.pipe.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=_TOKENS,
            device=self.pipe.text_encoder.device,
        )
        return {"tokens": tokens}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        film: Tensor = self.network(
            hidden_states=x.unsqueeze(2), timestep=t, encoder_hidden_states=cond["tokens"], return_dict=False
        )[0]
        return film.squeeze(2)

    def _solver_options(self, steps: int, latent: tuple[int, int, int]) -> dict[str, Any]:
        return {}  # its pipeline leaves the levels to the scheduler
