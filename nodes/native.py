"""DGPO Policy (native): a LoRA to train on the MODEL that the graph has loaded."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from dgpo_core.config import LoraConfig, MemoryConfig, ModelConfig
from dgpo_core.errors import UserError

from . import fields, host, native_models, sessions
from .values import PolicyHandle, PolicySpec


class NativePolicyNode(io.ComfyNode):
    """Names a run on a MODEL, CLIP and VAE; the adapters are made where they are needed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_NativePolicy",
            display_name="DGPO Policy (native)",
            category=host.CATEGORY,
            description="A LoRA to train on a MODEL of ComfyUI's, with the LoRAs and patches that are already on it.",
            inputs=[
                io.Model.Input("model", tooltip="What is trained on; it stays as it is."),
                io.Clip.Input("clip", tooltip="Reads the prompts."),
                io.Vae.Input("vae", tooltip="Turns latents into pictures."),
                *fields.run_widgets(),
                *fields.widgets(LoraConfig, "rank", "alpha", "targets"),
                *fields.widgets(MemoryConfig, "gradient_checkpointing"),
            ],
            outputs=[fields.Policy.Output(display_name="policy", tooltip="The model and where its training is.")],
        )

    @classmethod
    def validate_inputs(cls, run: str | None) -> bool | str:
        """A name that cannot be a folder is told before anything runs."""
        try:  # a connected input is None here
            if run is not None:
                host.check_name(run, "run name")
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, run: str | None = None, **_: Any) -> list[int]:
        """Made anew once the run goes by another branch, and once ComfyUI has dropped a model."""
        return [sessions.turns(run), native_models.lost()]

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, run: str, run_seed: int, **settings: Any) -> io.NodeOutput:
        spec = PolicySpec(
            run=host.check_name(run, "run name"),
            seed=run_seed,
            model=ModelConfig(path=native_models.remember(model, clip, vae)),
            lora=fields.values(LoraConfig, settings),
            memory=fields.values(MemoryConfig, settings),
            source="native",
        )
        return io.NodeOutput(PolicyHandle(spec))


NODES = [NativePolicyNode]
