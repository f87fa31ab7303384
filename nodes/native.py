"""The native policies: a LoRA to train on the MODEL that the graph has loaded, and that MODEL with the LoRA."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from dgpo_core.comfy.forms import LOAD_POLICY, NO_LORA, PROMPT_LIST
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.policy.quantised import NONE
from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig

from .common import fields, host
from .common.values import Conditionings, PolicyHandle, PolicySpec, Prompts
from .on_model import texts as native_texts
from .on_model.models import MODELS
from .runs import sessions


class _NativePolicy(io.ComfyNode):
    """What both forms of the node have in common."""

    @classmethod
    def validate_inputs(cls, run: str | None, start_from: str | None) -> bool | str:
        """A name that cannot be a folder, and a file that is gone, are told before anything runs."""
        return fields.first_error(run=(host.check_run, run), start_from=(host.lora_path, start_from))

    @classmethod
    def fingerprint_inputs(cls, run: str | None = None, **_: Any) -> list[int]:
        """Made anew once the run goes by another branch, and once ComfyUI has dropped a model."""
        return [sessions.turns(run), MODELS.lost(run)]

    @classmethod
    def policy(
        cls,
        model: Any,
        texts: native_texts.Texts,
        vae: Any,
        *,
        run: str,
        run_seed: int,
        start_from: str,
        prediction: str = "auto",
        quantize: str = NONE,
        **lora: Any,
    ) -> PolicyHandle:
        """The handle of a run on these; the adapters are made where they are needed."""
        name = host.check_run(run)
        init = "" if start_from == NO_LORA else start_from
        path = MODELS.remember(model, texts, vae, name, str(cls.hidden.unique_id))
        spec = PolicySpec(
            run=name,
            seed=run_seed,
            model=fields.values(ModelConfig, {"path": path, "prediction": prediction, "quantize": quantize}),
            lora=fields.values(LoraConfig, {"init": init, **lora}),
            memory=fields.values(MemoryConfig, lora),
            source="native",
        )
        if not host.keeps_outputs():
            MODELS.keep(path, spec)
        return PolicyHandle(spec)


def _run_and_lora() -> list[io.Input]:
    names = ("run", "run_seed", "rank", "alpha", "dropout", "targets", "start_from", "gradient_checkpointing")
    return fields.inputs(
        LOAD_POLICY.part(*names),
        advanced=("dropout", "targets", "gradient_checkpointing"),
        **fields.RUN,
        start_from={
            "options": host.lora_choices(),
            "tooltip": "A LoRA for this model, of any trainer, to go on from.",
        },
    )


def _base() -> list[io.Input]:
    """The last widgets of a node, as they came last."""
    names = ("prediction", "quantize", "compile")
    return fields.inputs(LOAD_POLICY.part(*names), advanced=names)


class NativePolicyNode(_NativePolicy):
    """Names a run on a MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_NativePolicy",
            display_name="DGPO Policy (native)",
            category=f"{host.CATEGORY}/native",
            **fields.aliases("reinforcement", "rlhf", "dpo", "train lora", "model to train"),
            description="A LoRA to train on a MODEL of ComfyUI's, with the LoRAs and patches that are already on it.",
            inputs=[
                io.Model.Input("model", tooltip="What is trained on; it stays as it is."),
                io.Clip.Input("clip", tooltip="Reads the prompts."),
                io.Vae.Input("vae", tooltip="Turns latents into pictures."),
                *_run_and_lora(),
                *_base(),
            ],
            outputs=[fields.Policy.Output(display_name="policy", tooltip="The model and where its training is.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(cls.policy(model, native_texts.by_clip(clip), vae, **settings))


class ConditionedPrompt(io.ComfyNode):
    """A prompt whose CONDITIONING comes from nodes of the graph; several are chained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_ConditionedPrompt",
            display_name="Conditioned Prompt",
            category=f"{host.CATEGORY}/native",
            **fields.aliases("controlnet", "conditioning"),
            description="A prompt with a CONDITIONING of your own making: areas, ControlNets, other encoders.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="What the model is told."),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    display_name="prompt in words",
                    tooltip="What rewards are told, and the images are labelled by.",
                ),
                fields.Conditionings.Input(
                    "previous", optional=True, display_name="add to", tooltip="Prompts that this one is added to."
                ),
            ],
            outputs=[
                fields.Conditionings.Output(display_name="conditionings", tooltip="For the policy, or the next prompt.")
            ],
        )

    @classmethod
    def execute(cls, conditioning: Any, text: str, previous: Conditionings | None = None) -> io.NodeOutput:
        return io.NodeOutput((previous or Conditionings()).and_then(text, conditioning))


class NativePolicyConditioning(_NativePolicy):
    """Names a run on a MODEL, a VAE and conditionings of the graph, and gives out their prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_NativePolicyConditioning",
            display_name="DGPO Policy (native, conditioning)",
            category=f"{host.CATEGORY}/native",
            **fields.aliases("reinforcement", "rlhf", "dpo", "train lora", "controlnet"),
            description="As DGPO Policy (native), with a CONDITIONING for each prompt in place of a CLIP.",
            inputs=[
                io.Model.Input("model", tooltip="What is trained on; it stays as it is."),
                io.Vae.Input("vae", tooltip="Turns latents into pictures."),
                fields.Conditionings.Input("conditionings", tooltip="The last of a chain of Conditioned Prompts."),
                io.Conditioning.Input("negative", tooltip="As in KSampler; where cfg is 1, it has no effect."),
                *_run_and_lora(),
                *fields.inputs(PROMPT_LIST.part("per_iteration", "order_seed"), ("order_seed",), **fields.ORDER),
                *_base(),
            ],
            outputs=[
                fields.Policy.Output(display_name="policy", tooltip="The model and where its training is."),
                fields.Prompts.Output(display_name="prompts", tooltip="The chain's texts, for a sampler or a loop."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        conditionings: Conditionings,
        negative: Any,
        per_iteration: int,
        order_seed: int,
        **settings: Any,
    ) -> io.NodeOutput:
        handle = cls.policy(model, native_texts.as_given(conditionings, negative, model), vae, **settings)
        prompts = tuple(Prompt(text) for text, _ in conditionings.prompts)
        return io.NodeOutput(handle, Prompts(prompts, per_iteration, order_seed))


class PolicyModel(io.ComfyNode):
    """The MODEL that a native policy trains, with the LoRA applied."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_PolicyModel",
            display_name="Policy to MODEL",
            category=f"{host.CATEGORY}/native",
            **fields.aliases("trained model"),
            description="The MODEL that the policy trains, with its LoRA applied, for any sampler.",
            inputs=[
                fields.Policy.Input("policy", tooltip="A native policy, from a trainer or loop."),
                fields.weights_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="An ordinary MODEL with an ordinary LoRA.")],
        )

    @classmethod
    def execute(cls, policy: PolicyHandle, weights: str) -> io.NodeOutput:
        if not policy.state:  # it would stand for another one with each step
            raise UserError("This policy is not trained yet: connect the one that a trainer or loop gives out.")
        return io.NodeOutput(sessions.patched(policy, weights))


NODES = [NativePolicyNode, ConditionedPrompt, NativePolicyConditioning, PolicyModel]
