"""The nodes of a training as a workflow file holds them: every input once, with what it sets.

The nodes build their inputs from these forms, and `workflow` reads files by them. The words that stand for something
else than themselves in a widget are here, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dgpo_core.rewards.base import AUTOMATIC, WEIGHTS_FILE
from dgpo_core.settings import shipped
from dgpo_core.settings.config import AUTO, EMBEDDED, Config, RolloutConfig, TrainingConfig
from dgpo_core.settings.presets import MODES, apply_mode, load_preset, preset_names

MODELS_OWN = "model's own"
"""The choice of Sampler Settings that is no scheduler."""
TEXT = "the text below"
"""The choice of Prompts that is no file."""
HELD_OUT = "embedded, held out"
"""The choice of Prompts that is the embedded model's prompts which it does not train on."""
WILDCARDS = "wildcards"
"""The folder of wildcard files, in ComfyUI's input folder."""
EDITS = "embedded edits"
EDITS_HELD_OUT = "embedded edits, held out"
"""The same for the embedded editor."""
SHIPPED = {
    EMBEDDED: shipped.TRAINING[EMBEDDED],
    HELD_OUT: shipped.HELD_OUT[EMBEDDED],
    EDITS: shipped.TRAINING[shipped.EDITS],
    EDITS_HELD_OUT: shipped.HELD_OUT[shipped.EDITS],
}
"""The choices of Prompts that are files which ship."""
EMBEDDED_MODEL, EMBEDDED_EDITOR = (f"{word} (shapes world)" for word in shipped.MODELS)
"""The choices of Load Policy that are no files; a file may name one by its first word."""
MODEL_FOLDERS = ("checkpoints", "diffusers")
"""The folders of models/ that Load Policy lists; its other choices begin with one of them and a slash."""
NO_LORA = "none"
"""The choice of a widget for LoRA files that is no file."""
AS_BELOW = "as set below"
"""The choice of Training Settings that is no preset."""
OPEN = -1
"""In a widget for a whole number: "auto", what fits the card."""
_MODE = "mode "


@dataclass(frozen=True)
class Widget:
    """An input whose value is in the node.

    setting: what the value sets in a `Config`, such as "lora.rank"; "" where it stands for something else, or sets
    nothing by itself. kind: of the value, where no setting tells. default: the node's, where it is not the setting's.
    needed: a file that lacks it is refused; else the setting keeps its default. optional: so in the node, too, because
    graphs were saved before it was there.
    """

    setting: str = ""
    kind: type = str
    default: Any = None
    needed: bool = True
    optional: bool = False


@dataclass(frozen=True)
class Link:
    """An input that is connected. edge: the type of what comes; source: the node that gives it without ComfyUI; ""
    where that takes ComfyUI."""

    edge: str
    source: str
    optional: bool = False


@dataclass(frozen=True)
class Form:
    """A node: its id, and its inputs by name, in their order.

    The node's schema has the id once more, as a literal: ComfyUI's registry looks for it in the source.
    """

    id: str
    inputs: Mapping[str, Widget | Link]

    def part(self, *names: str) -> "Form":
        """With these inputs alone, for another node that has them as well."""
        return Form(self.id, {name: self.inputs[name] for name in names})


POLICY, PROMPTS, SAMPLER, GROUP = "DGPO_POLICY", "DGPO_PROMPTS", "DGPO_SAMPLER", "DGPO_GROUP"
REWARD, TRAINING = "DGPO_REWARD", "DGPO_TRAINING"
IMAGE = "IMAGE"


def _same(group: str, *names: str, **others: Any) -> dict[str, Widget]:
    """Widgets that are called as the settings of a group."""
    return {name: Widget(f"{group}.{name}", **{"needed": False, **others}) for name in names}


LOAD_POLICY = Form(
    "DGPO_LoadPolicy",
    {
        "model": Widget(),
        "run": Widget("name", default="my_run"),
        "run_seed": Widget("seed"),  # the front end would draw a widget called "seed" anew at every press
        **_same("lora", "rank", "alpha", "dropout", "targets"),
        "start_from": Widget(),
        **_same("model", "dtype", needed=True),
        **_same("memory", "gradient_checkpointing", "offload"),
        **_same("model", "prediction", optional=True),
        **_same("model", "quantize", optional=True, default="none"),  # no base is made another by itself
        **_same("memory", "compile", optional=True),
    },
)
PROMPT_LIST = Form(
    "DGPO_Prompts",
    {
        "source": Widget(),
        "text": Widget(default=""),
        "per_iteration": Widget("data.groups_per_iteration"),
        "order_seed": Widget("data.order_seed", default=0),
        "images": Link(IMAGE, "", optional=True),
        **_same("data", "wildcards", "wildcard_seed", default=0, optional=True),
    },
)
SAMPLER_SETTINGS = Form(
    "DGPO_SamplerSettings",
    {
        **_same("rollout", *(field.name for field in fields(RolloutConfig) if field.name != "scheduler")),
        **_same("model", "height", "width", needed=True),
        "scheduler": Widget(default=MODELS_OWN, needed=False, optional=True),
    },
)
GROUP_SAMPLER = Form(
    "DGPO_GroupSampler",
    {
        "policy": Link(POLICY, LOAD_POLICY.id),
        "prompts": Link(PROMPTS, PROMPT_LIST.id),
        "settings": Link(SAMPLER, SAMPLER_SETTINGS.id),
        "iteration": Widget(kind=int, default=-1),
    },
)
REWARD_TERM = Form(
    "DGPO_Reward",
    {
        "name": Widget(),
        "weight": Widget(kind=float, default=1.0),
        "options": Widget(default="", needed=False),
        "reward": Link(REWARD, "DGPO_Reward", optional=True),
        "only_if": Widget(default="", needed=False, optional=True),
        WEIGHTS_FILE: Widget(default=AUTOMATIC, needed=False, optional=True),
    },
)
REWARD_SCORER = Form(
    "DGPO_RewardScorer", {"groups": Link(GROUP, GROUP_SAMPLER.id), "reward": Link(REWARD, REWARD_TERM.id)}
)
_NEWER = ("kl_target", "norm_guard")
TRAINING_SETTINGS = Form(
    "DGPO_TrainingSettings",
    {
        "preset": Widget(),
        "combine": Widget("combine"),
        **_same("training", *(field.name for field in fields(TrainingConfig) if field.name not in _NEWER)),
        **_same("training", *_NEWER, optional=True),  # older workflows have no values for them
    },
)
LORA_TRAINER = Form(
    "DGPO_LoRATrainer",
    {
        "policy": Link(POLICY, LOAD_POLICY.id),
        "scored": Link(GROUP, REWARD_SCORER.id),
        "settings": Link(TRAINING, TRAINING_SETTINGS.id),
        "weights": Widget("evaluation.weights"),
    },
)
TEACH_ME = "I choose"
"""The judge of Teach that is no reward."""
TEACH = Form(
    "DGPO_Teach",
    {
        "model": Widget(),
        **PROMPT_LIST.part("source", "text").inputs,
        "judge": Widget(),
        "minutes": Widget("minutes"),
        "run": LOAD_POLICY.inputs["run"],
        "policy": Link(POLICY, LOAD_POLICY.id, optional=True),
        "reward": Link(REWARD, REWARD_TERM.id, optional=True),
        "size": Widget(kind=int, default=0, needed=False, optional=True),
        "mode": Widget(needed=False, optional=True),
        "run_seed": Widget("seed", default=0, needed=False, optional=True),
    },
)
WATCHING = {  # of no effect where no held-out prompts are connected
    "evaluate_every": Widget("evaluation.every", default=10, needed=False, optional=True),
    "evaluation_images": Widget("evaluation.images", needed=False, optional=True),
    "on_alarm": Widget("evaluation.on_alarm", needed=False, optional=True),
}
TRAINING_LOOP = Form(
    "DGPO_TrainingLoop",
    {
        "policy": Link(POLICY, LOAD_POLICY.id),
        "prompts": Link(PROMPTS, PROMPT_LIST.id),
        "sampler": Link(SAMPLER, SAMPLER_SETTINGS.id),
        "reward": Link(REWARD, REWARD_TERM.id),
        "settings": Link(TRAINING, TRAINING_SETTINGS.id),
        "iterations": Widget("iterations", default=40),
        "save_every": Widget(kind=int, default=10),
        "weights": Widget("evaluation.weights"),
        "held_out": Link(PROMPTS, PROMPT_LIST.id, optional=True),
        "watch": Link(REWARD, REWARD_TERM.id, optional=True),
        **WATCHING,
    },
)

FORMS = {
    form.id: form
    for form in (
        *(LOAD_POLICY, PROMPT_LIST, SAMPLER_SETTINGS, GROUP_SAMPLER, REWARD_TERM, REWARD_SCORER, TRAINING_SETTINGS),
        *(LORA_TRAINER, TRAINING_LOOP, TEACH),
    )
}


def as_setting(value: Any, default: Any) -> Any:
    """What a widget's value is in settings, where `default` is the setting's.

    A switch of a node that saves memory does so where it is needed: it is never just on.
    """
    if default == AUTO and isinstance(value, bool):
        return AUTO if value else False
    return AUTO if default == AUTO and value == OPEN else value


def as_widget(value: Any) -> Any:
    """The other way round."""
    return OPEN if value == AUTO else value


def shipped_model(choice: str) -> str:
    """What settings call a choice of Load Policy that ships; empty for others."""
    word = choice.partition(" ")[0]
    return word if word in shipped.MODELS else ""


def preset_choices() -> list[str]:
    """All that the widget `preset` of Training Settings can be."""
    return [AS_BELOW, *preset_names(), *(_MODE + mode for mode in MODES)]


def chosen_preset(choice: str) -> tuple[TrainingConfig, str | None] | None:
    """What a choice of preset sets: the training, and `combine`, of which a mode says nothing (None).

    None for a choice that is no preset. Raises UserError for a mode that there is not.
    """
    if choice in preset_names():
        preset = load_preset(choice)
        return preset.training, preset.combine
    if choice.startswith(_MODE):
        return apply_mode(Config(), choice.removeprefix(_MODE)).training, None
    return None
