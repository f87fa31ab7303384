"""Load Policy: a model with a LoRA to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.v0_0_2 import io

from dgpo_core.config import LoraConfig, MemoryConfig, ModelConfig
from dgpo_core.errors import UserError

from . import fields, host
from .values import PolicyHandle, PolicySpec


class LoadPolicy(io.ComfyNode):
    """Names a model, a LoRA and a run; nothing is loaded before it is needed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_LoadPolicy",
            display_name="Load Policy (diffusers)",
            category=host.CATEGORY,
            description="A model with a LoRA to train: the embedded one, a checkpoint file or a diffusers folder.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=host.model_choices(),
                    tooltip="The embedded model, a file in models/checkpoints or a folder in models/diffusers.",
                ),
                io.String.Input(
                    "run", default="my_run", tooltip="Name of the run: its states are kept in output/dgpo/<run>."
                ),
                io.Int.Input(
                    "run_seed",  # the front end would draw a widget called "seed" anew at every press
                    default=0,
                    min=0,
                    max=fields.SEEDS,
                    tooltip="Seed of everything random in the run. Another seed is another run from the start.",
                ),
                *fields.widgets(LoraConfig, "rank", "alpha", "dropout", "targets"),
                io.Combo.Input(
                    "start_from", options=host.lora_choices(), tooltip="A LoRA in diffusers format to continue from."
                ),
                *fields.widgets(ModelConfig, "dtype"),
                *fields.widgets(MemoryConfig, "gradient_checkpointing", "offload"),
            ],
            outputs=[fields.Policy.Output(display_name="policy", tooltip="The model and where its training is.")],
        )

    @classmethod
    def validate_inputs(cls, model: str, run: str) -> bool | str:
        """A name that cannot be a folder, and a model that is gone, are told before anything runs."""
        try:
            host.check_name(run, "run name")
            path = host.model_path(model)
        except UserError as error:
            return str(error)
        return True if path == "embedded" or Path(path).exists() else f"There is no model {model}: refresh the list."

    @classmethod
    def execute(cls, model: str, run: str, run_seed: int, start_from: str, **settings: Any) -> io.NodeOutput:
        spec = PolicySpec(
            run=host.check_name(run, "run name"),
            seed=run_seed,
            model=fields.values(ModelConfig, {"path": host.model_path(model), **settings}),
            lora=fields.values(LoraConfig, {"init": host.lora_path(start_from), **settings}),
            memory=fields.values(MemoryConfig, settings),
        )
        return io.NodeOutput(PolicyHandle(spec))


NODES = [LoadPolicy]
