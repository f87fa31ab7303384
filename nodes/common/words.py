"""What inputs are called on the screen, and what they do: the effect first, the paper's symbol last.

Ids stay as they are: saved workflows and settings files have them. A front end that shows no display names (1.27, of
ComfyUI 0.3.64) shows the ids, so a sentence about an input says both: `named`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Word(NamedTuple):
    """Of an input: its display name, and its tooltip; "" where the id, or what the node or setting says, will do."""

    label: str = ""
    help: str = ""


WORDS: Mapping[str, Word] = {
    # Load Policy, DGPO Policy
    "run": Word("training name", "Name of this training: what it has learned is kept in output/dgpo/<name>."),
    "run_seed": Word(
        "training seed", "Another number is another training from the start: seed of everything random in it."
    ),
    "rank": Word("LoRA size (rank)", "How much the LoRA can learn, and how large its file is: its rank, 1 to 4096."),
    "alpha": Word(
        "LoRA scale (alpha)",
        "How much the LoRA counts: what it adds is multiplied by alpha / rank. Keep it at twice the rank.",
    ),
    "dropout": Word("", "Above 0 the LoRA learns more slowly and remembers less by heart: dropout, 0 to below 1."),
    "targets": Word(
        "layers to train",
        "Which layers learn: the ends of their names, with commas, such as to_q, to_v; empty: all attention layers.",
    ),
    "start_from": Word("start from LoRA"),
    "dtype": Word("number type"),
    "gradient_checkpointing": Word(
        "save memory if needed",
        "Much less memory where the card has too little: a training step then computes activations twice (gradient"
        " checkpointing), and takes 1.4 to 2.3 times as long. Off: only where nothing else fits.",
    ),
    "offload": Word("text encoders wait", "Less memory: text encoders and VAE leave the card while they are not used."),
    "prediction": Word("model predicts"),
    "quantize": Word(
        "smaller model",
        "Half the memory for the model's weights (fp8, int8) or a quarter (nf4, which needs bitsandbytes), a little"
        " slower; images and what is learned differ slightly. The LoRA stays an ordinary one.",
    ),
    "compile": Word(
        "compile the model",
        "Faster rounds after a slow first one: torch.compile makes machine code of the model's repeated blocks. It"
        " needs Triton on a GPU and a C++ compiler on a CPU; images and what is learned differ by rounding alone.",
    ),
    # Prompts
    "source": Word("prompts from"),
    "text": Word("prompts, one per line"),
    "images": Word("pictures to edit"),
    "per_iteration": Word(
        "prompts per round",
        "More make a steadier step, and take longer: the prompts, and so the groups of images, of each iteration (P).",
    ),
    "order_seed": Word("prompt order seed", "Another number takes the prompts in another order."),
    "wildcards": Word(
        "texts per wildcard prompt",
        "Prompts with {red|blue} or __colour__ in them become so many, each with words drawn by chance; 0 takes these"
        " as they are written. __colour__ is a line of wildcards/colour.txt in ComfyUI's input folder.",
    ),
    "wildcard_seed": Word("wildcard seed", "Another number draws other words."),
    # Sampler Settings
    "solver": Word(
        "sampler", "How noise becomes an image. Only samplers that add none on the way: ODE solvers, such as dpmpp_2m."
    ),
    "cfg": Word(
        "", "How closely images follow the prompt while drawing, 1 to 100; 1 is no guidance, and half the time."
    ),
    "group_size": Word(
        "images per prompt",
        "Images that are compared with each other, at least 2: more show more clearly what is better, and take longer"
        " (the group size G).",
    ),
    "batch": Word(
        "images at once",
        "Memory and speed, not the images: how many are drawn together; 0: a whole round; -1: what fits the card.",
    ),
    "negative_prompt": Word("negative prompt", "What images should not show; it counts where cfg is above 1."),
    "on_policy_steps": Word(
        "newest draws until",
        "After so many rounds a moving average of the LoRA draws in place of the newest one (the fast EMA).",
    ),
    # Training Settings
    "combine": Word(
        "several rewards",
        "How several rewards become one: normalised, so that each counts alike whatever its scale; sum, as they are.",
    ),
    "advantage_std": Word(
        "score spread",
        "How much better counts as better: against the spread of scores in the group, for yes-or-no rewards and your"
        " rankings, or of all images (global).",
    ),
    "advantage_clamp": Word(
        "largest advantage", "No image counts more than this, however far it is from the mean of its group."
    ),
    "beta": Word(
        "preference sharpness",
        "How decidedly the better half of a group is preferred: 10 to 100, in mode 2b 2000 to 5000 (beta).",
    ),
    "logit_scaling": Word(
        "gradient scale",
        "Whether the sharpness also scales the step: paper does, official does not, as the authors' code.",
    ),
    "clip": Word(
        "limit per image",
        "A brake for single images that have changed much since they were drawn; 0 is off (mode 1: 0.001 to 0.01,"
        " mode 2: 0.00001 to 0.0001; clip).",
    ),
    "kl_weight": Word(
        "stay close to original",
        "Holds the model to what it was: 0.001 is loose, 0.02 firm, 0 off. Raise it if images get worse while the"
        " reward rises (KL weight).",
    ),
    "kl_target": Word(
        "distance to hold",
        "Holds the model this far from what it was, by a pull that grows and shrinks: the mean squared distance of its"
        " predictions (metric kl); 0: the pull stays as it is set (KL target).",
    ),
    "norm_guard": Word(
        "guard against plastic look",
        "Holds back predictions that grow larger than the original's, which goes along with over-saturated, plastic"
        " pictures: 0.1 is a start, 0 is off (norm guard).",
    ),
    "kl_cfg": Word(
        "original's cfg",
        "The cfg at which the original model is compared with, 1 to 100: 1 in mode 1, 4.5 in mode 2a.",
    ),
    "reference": Word(
        "compared with",
        "What a preference is measured against: the original (frozen), or the model of some rounds ago (old, mode 2b).",
    ),
    "timesteps": Word(
        "noise levels each",
        "How many noise levels of each image are trained: fewer are faster and rougher (the paper's M).",
    ),
    "timestep_source": Word(
        "noise levels from",
        "Which noise levels are trained: those at which the images were drawn (rollout), or any above t_min (uniform).",
    ),
    "t_min": Word(
        "trained steps",
        "How many of the sampler's first steps are trained; a number below 1 is the lowest noise level instead; 0: all,"
        " with the flaws in the fine detail (t_min).",
    ),
    "micro_batch": Word(
        "trained at once",
        "Memory and speed, not the result: how many are trained together; -1: what fits the card (micro-batch).",
    ),
    "lr": Word(
        "how strongly it learns",
        "Higher learns faster, and breaks images sooner: 0.0003 suits most models (the learning rate of AdamW).",
    ),
    "weight_decay": Word("weight decay", "Draws the LoRA's numbers towards nothing, a little at each step (of AdamW)."),
    "betas": Word("momentum", "How long earlier steps count in the next: two numbers below 1 (betas of AdamW)."),
    "max_grad_norm": Word("largest step", "A step that is larger is cut to this: the gradient's norm; 0 is off."),
    "ema_fast_max": Word(
        "drawing average",
        "How much of the past is in the average that draws, at most, 0 to below 1 (decay of the fast EMA).",
    ),
    "ema_fast_rate": Word(
        "its growth",
        "How fast its share of the past grows to that, by so much a step (decay of the fast EMA).",
    ),
    "ema_slow": Word(
        "averaged LoRA",
        "How much of the past is in the averaged LoRA, 0 to below 1: nearer to 1 is steadier, and lags further behind"
        " (decay of the slow EMA).",
    ),
    "ema_slow_every": Word(
        "averaged every",
        "Rounds between two updates of the averaged LoRA: set 1 for a training of less than 200 rounds, or it will show"
        " hardly any change (slow EMA).",
    ),
    # DGPO LoRA Trainer, Training Loop, Group Sampler
    "weights": Word(
        "LoRA: newest/average",
        "Which LoRA to take: the newest (current), or a moving average (ema): steadier, but far behind in a short"
        " training.",
    ),
    "iteration": Word("round (iteration)"),
    "iterations": Word(
        "rounds (iterations)", "How many rounds of drawing, scoring and learning in all. A larger number goes on."
    ),
    "save_every": Word("save every", "Rounds between two saved states."),
    "held_out": Word("test prompts"),
    "watch": Word("also measure"),
    "evaluate_every": Word("test every", "Rounds between two measurements on the test prompts."),
    "evaluation_images": Word("images per test"),
    "on_alarm": Word("if images get worse"),
    # Reward
    "options": Word("options (JSON)"),
    "only_if": Word("only if"),
}


def named(name: str) -> str:
    """An input for a sentence: its display name, and its id where that does not say it."""
    label = WORDS[name].label
    return f'"{label}"' if f"({name})" in label else f'"{label}" ({name})' if label else name


_GROUPS = "rollout|training|model|lora|data|memory|evaluation"
_SETTING = re.compile(rf"\b(?:{_GROUPS})\.([a-z]\w*)")
_CONFIG_WORDS = {"groups_per_iteration": "per_iteration", "unipc": "uni_pc"}  # which are others in the nodes


def settings_in(sentence: str) -> list[str]:
    """The ids of the inputs whose settings a sentence of the engine names, in their order."""
    return [_CONFIG_WORDS.get(name, name) for name in _SETTING.findall(sentence)]


def on_screen(sentence: str) -> str:
    """A sentence of the engine with the names that the screen has: "trained steps" (t_min) for training.t_min."""

    def shown(found: re.Match[str]) -> str:
        name = _CONFIG_WORDS.get(found[1], found[1])
        return named(name) if name in WORDS else name

    return re.sub(r"\bunipc\b", "uni_pc", _SETTING.sub(shown, sentence))
