"""Load Policy: a model with a LoRA to train."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from dgpo_core.comfy.forms import LOAD_POLICY, NO_LORA, shipped_model
from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig

from .common import fields, host
from .common.values import PolicyHandle, PolicySpec
from .runs import sessions


class LoadPolicy(io.ComfyNode):
    """Names a model, a LoRA and a run; nothing is loaded before it is needed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_LoadPolicy",
            display_name="Load Policy (diffusers)",
            category=f"{host.CATEGORY}/train",
            **fields.aliases("reinforcement", "rlhf", "dpo", "train lora", "model to train"),
            description="A model with a LoRA to train: the embedded one, a checkpoint file or a diffusers folder.",
            inputs=fields.inputs(
                LOAD_POLICY,
                advanced=(
                    *("dropout", "targets", "dtype", "gradient_checkpointing", "offload", "prediction", "quantize"),
                    "compile",
                ),
                **fields.RUN,
                model={
                    "options": host.model_choices(),
                    "tooltip": "The embedded model, a file in models/checkpoints or a folder in models/diffusers.",
                },
                start_from={
                    "options": host.lora_choices(),
                    "tooltip": "Go on from a plain LoRA of any trainer.",
                },
            ),
            outputs=[fields.Policy.Output(display_name="policy", tooltip="The model and where its training is.")],
        )

    @classmethod
    def validate_inputs(cls, model: str | None, run: str | None, start_from: str | None) -> bool | str:
        """A name that cannot be a folder, and a file that is gone, are told before anything runs."""
        return fields.first_error(
            run=(host.check_run, run), model=(host.model_path, model), start_from=(host.lora_path, start_from)
        )

    @classmethod
    def fingerprint_inputs(cls, run: str | None = None, **_: Any) -> int:
        """What hangs on this node is made anew once the run goes by another branch: its states are others."""
        return sessions.turns(run)

    @classmethod
    def execute(cls, model: str, run: str, run_seed: int, start_from: str, **settings: Any) -> io.NodeOutput:
        spec = PolicySpec(
            run=host.check_run(run),
            seed=run_seed,
            model=fields.values(ModelConfig, {"path": shipped_model(model) or model, **settings}),
            lora=fields.values(LoraConfig, {"init": "" if start_from == NO_LORA else start_from, **settings}),
            memory=fields.values(MemoryConfig, settings),
        )
        return io.NodeOutput(PolicyHandle(spec))


NODES = [LoadPolicy]
