"""Run by `test_forecast.py` in ComfyUI's folder and interpreter: prints what a training is said to need, as JSON.

The processor stands for a card: it is asked for its name and its memory, and for nothing else.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy_native_models  # noqa: F401 - first: it finds ComfyUI

# isort: split
import folder_paths
from comfy_native_case import Case

from dgpo_core.benchmark.advice import GIB, RESERVE
from dgpo_core.common.prompts import Prompt
from dgpo_core.settings.config import (
    Config,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    RewardTerm,
    RolloutConfig,
    TrainingConfig,
)

sessions = importlib.import_module("pack.runs.sessions")
forecast = importlib.import_module("pack.runs.forecast")
loop = importlib.import_module("pack.runs.loop")
judges = importlib.import_module("pack.runs.judges")
values = importlib.import_module("pack.common.values")
host = importlib.import_module("pack.common.host")

SPEC = values.PolicySpec("forecast", 0, ModelConfig(), LoraConfig(rank=2), MemoryConfig(gradient_checkpointing=False))
SAMPLER = values.Sampler(RolloutConfig(solver="euler", steps=2, cfg=1.0, group_size=4))
TRAINING = values.Training(TrainingConfig(timesteps=1, t_min=0.0))
ONE_DRAWN = values.Sampler(replace(SAMPLER.rollout, batch=1))
ALL_LEARNED = values.Training(replace(TRAINING.training, micro_batch=8))  # so that the backward takes most
PROMPTS = values.Prompts((Prompt("a red circle"), Prompt("a blue square")), 2, 0)


class Shown:
    """What a node shows, and how many forwards there were by then."""

    def __init__(self, forwards: list[int]) -> None:
        self.forwards, self.texts = forwards, []

    node = "1"

    def say(self, text: str) -> None:
        self.at(0, None, text)

    def at(self, value: int, picture: Any = None, text: str = "") -> None:
        self.texts.append((len(self.forwards), text))

    def close(self) -> None:
        """Of a console there is none."""


def told(whole: float, rounds: int, name: str = "NVIDIA GeForce RTX 4070") -> str:
    host.card = lambda: (name, whole)
    return forecast.tell(SPEC, PROMPTS, SAMPLER, TRAINING, rounds)


def recomputing() -> dict[str, dict[str, Any]]:
    """Whether activations are recomputed where settings leave it open, on a large card and on one where only that fits:
    of a loaded policy, which is also looked at before, and after it had to be turned on; and as chosen for a MODEL."""
    spec = replace(SPEC, memory=MemoryConfig(offload=True))
    sampler, training = ONE_DRAWN, ALL_LEARNED
    policy = sessions.policy_of(spec)
    whole = {"large": 80 * GIB, "small": tight(lambda config: forecast.of_files(config, 80 * GIB, None))}
    seen = {"loaded": policy.is_gradient_checkpointing}
    for card in ("large", "small", "large"):
        host.card = lambda card=card: ("NVIDIA GeForce RTX 4070", whole[card])
        forecast.tell(spec, PROMPTS, sampler, training, 1)
        seen[card] = policy.is_gradient_checkpointing
    policy.enable_gradient_checkpointing()
    forecast.tell(spec, PROMPTS, sampler, training, 1)
    return {"files": {**seen, "stays": policy.is_gradient_checkpointing}, "native": of_a_model()}


def of_a_model() -> dict[str, bool]:
    counts = Case("flux").policy().counts

    def found(config: Config, whole: float = 80 * GIB) -> Any:
        return forecast.of_network(config, lambda again: counts.of_prompt(Prompt("red"), 0, 0, again), whole, None)

    wholes = {"large": 80 * GIB, "small": tight(found)}
    return {
        card: found(settings(MemoryConfig(offload=True)), whole).config.memory.recompute
        for card, whole in wholes.items()
    }


def settings(memory: MemoryConfig) -> Config:
    spec = replace(SPEC, memory=memory)
    config = sessions.config_of(spec, ONE_DRAWN, ALL_LEARNED.training)
    return replace(config, data=replace(config.data, groups_per_iteration=2))


def tight(found: Callable[[Config], Any]) -> float:
    """Bytes of a card that has room for a training with recomputed activations alone."""
    needs = [found(settings(MemoryConfig(offload=True, gradient_checkpointing=again))).needs for again in (True, False)]
    assert needs[0] < needs[1], needs
    return RESERVE + sum(needs) / 2


def looped() -> dict[str, Any]:
    """The texts of a loop of one iteration, each with the forwards before it; and the batches of the forwards."""
    host.card = lambda: ("NVIDIA GeForce RTX 4070", 12 * GIB)
    forwards: list[int] = []
    policy = sessions.policy_of(SPEC)
    predict = policy.predict

    def counted(x: Any, t: Any, cond: Any) -> Any:
        forwards.append(len(x))
        return predict(x, t, cond)

    policy.predict = counted
    shown = Shown(forwards)
    judge = judges.ByRewards((RewardTerm("brightness"),))
    loop.run(loop.Plan(values.PolicyHandle(SPEC), PROMPTS, SAMPLER, judge, TRAINING, 1, 1), shown)
    return {"texts": shown.texts, "batches": forwards}


def native(family: str) -> dict[str, Any]:
    """Bytes of activations of a small MODEL's network: forward, and with backward, plain and checkpointed."""
    policy = Case(family).policy()
    found = {}
    for name in ("plain", "checkpointed"):
        policy.hooks.checkpointing = name == "checkpointed"
        counted = policy.counts.of(
            Case(family).shape, policy._conditioning(int(policy.encode(["red"])[0].tensors["prompt"]))
        )
        found[name] = (
            None if counted is None else [phase.peak["activations"] for phase in (counted.forward, counted.update)]
        )
    return found


def main() -> None:
    found = {"cpu": forecast.tell(SPEC, PROMPTS, SAMPLER, TRAINING, 100), "card": told(12 * GIB, 100)}
    found |= {
        "step": told(12 * GIB, 0),
        "unknown": told(12 * GIB, 100, "a card of tomorrow"),
        "small": told(0.801 * GIB, 9),
    }
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        found["loop"] = looped()
    found["recomputing"] = recomputing()
    found["native"] = {family: native(family) for family in ("sd15", "flux", "qwen", "hidream", "wan")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
