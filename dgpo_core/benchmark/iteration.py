"""One iteration of the engine's own code, counted: what it keeps in memory and computes, phase by phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dgpo_core.benchmark.advice import evaluated_at_once
from dgpo_core.benchmark.count import Ledger, Phase
from dgpo_core.benchmark.repeats import Repeats
from dgpo_core.benchmark.weightless import META, Answers, attention_of, cuda_workspace, numbers_kept, standing_in
from dgpo_core.common.distributed import World
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.source import Source
from dgpo_core.evaluation.held_out import Drawing
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import pipeline
from dgpo_core.policy.adapters import NAMES
from dgpo_core.policy.base import Cond, Policy
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.rewards import Reward
from dgpo_core.runs.assemble import rated_groups, training_prompts
from dgpo_core.settings.config import Config, RewardTerm

PHASES = ("encode", "draw", "decode", "update", "evaluation")
"""evaluation: encoding, drawing and decoding of one batch of an evaluation, on top of what an iteration leaves."""

STEADY = 3
"""The iteration that is counted: from it on the old policy is another one than the current, and is asked, too."""


class Differing(Reward):
    """A reward for pictures that nobody looks at: it costs nothing, and every group has something to learn."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return torch.arange(len(images)).float()


ANY = RewardTerm("any")
"""The term of a configuration that is trained on `Differing`, which is not in the registry."""


def with_pictures(prompts: Sequence[Prompt], policy: Policy, size: tuple[int, int], count: int = 0) -> list[Prompt]:
    """The prompts; those that bring none with `count` black pictures, or as many more as the policy needs to edit."""
    black = (Source.of_pixels(torch.zeros(3, *size)),) * max(count, policy.sources[0])
    return [prompt if prompt.sources else replace(prompt, sources=black) for prompt in prompts]


def largest_prompts(policy: Policy, config: Config, size: tuple[int, int]) -> list[Prompt]:
    """One for each group, as long as the longest that the settings name (some models take a text as it is, others fill
    it up), with as many pictures as any of theirs brings. Raises UserError for prompts that cannot be read."""
    known = [Prompt("no")]
    if config.data.prompts or config.data.text or config.groups:
        known = training_prompts(config, rated_groups(config))
    longest = max((prompt.text for prompt in known), key=len)
    texts = [Prompt(f"{longest} {i}") for i in range(config.data.groups_per_iteration)]
    return with_pictures(texts, policy, size, min(policy.sources[1], max(len(prompt.sources) for prompt in known)))


def count_iteration(policy: DiffusersPolicy, config: Config, size: tuple[int, int], ledger: Ledger) -> dict[str, Phase]:
    """What an iteration in the midst of a run takes, by `PHASES`; the policy is trained by it.

    size: height and width in pixels. ledger: of the policy's device.
    """
    config = replace(config, reward=(ANY,), training=replace(config.training, lr=1e-12))
    prompts = largest_prompts(policy, config, size)
    with _by_phase(policy, ledger), ledger:
        if policy.offload:  # they have been loaded there; a policy without storage is made on the device in whole
            policy.text_encoders_to("cpu")
            policy.vae_to("cpu")
        own_modules(policy, ledger)
        trainer = Trainer(policy, prompts, {ANY.name: Differing()}, config, size=size, world=World(str(policy.device)))
        for parameter in trainer.step.parameters.values():
            parameter.grad = torch.zeros_like(parameter)  # as from the first update on
        with ledger.phase("update"):
            trainer.step.condition(prompts)
        for _ in range(STEADY - 1):
            with ledger.phase("update"), standing_in(trainer.stream, {"per_iteration": _enough(config)}):
                trainer.iterate()
            _own_what_stays(trainer, ledger)
        encode = ledger.phases["encode"]  # later a prompt's embeddings are there
        ledger.phases.clear()
        ledger.phases["encode"] = encode
        with ledger.phase("update"):  # all that is not one of the others
            trainer.iterate()
        _own_what_stays(trainer, ledger)
        with _all_as("evaluation", ledger) as phase:
            phase.images = evaluated_at_once(config)
            rows = [(prompts[0], list(range(phase.images)))]
            Drawing.of(policy, config, size).draw(config.evaluation.weights, rows)
    return {name: ledger.phases.get(name, Phase()) for name in PHASES}


def _enough(config: Config) -> int:
    """Groups by which all comes into the state that is counted: as many as go through together."""
    groups, size = config.data.groups_per_iteration, config.rollout.group_size
    together = max(config.rollout.at_once or groups * size, config.training.at_once)
    return min(groups, math.ceil(together / size))


def count_without_weights(
    policy: DiffusersPolicy,
    config: Config,
    size: tuple[int, int],
    like: Literal["cuda", "cpu"] = "cuda",
    room: float = math.inf,
) -> dict[str, Phase]:
    """`count_iteration` for a policy on the device "meta": no forward is computed, and those of one kind are looked at
    once. like: whose attention it takes. room: bytes that the device has, by which the policy decides what
    makes room for what."""
    ledger = Ledger(META, cuda_workspace if like == "cuda" else lambda *_: 0, Answers())
    with (
        attention_of(like),
        numbers_kept(),
        Repeats(policy, ledger).standing_in(),
        standing_in(pipeline, {"_free_memory": lambda _: room - ledger.total}),
        standing_in(policy.network, {"to": _Mover(policy.network, ledger)}),
    ):
        return count_iteration(policy, config, size, ledger)


class _Mover:
    """`to` of a network without storage: its bytes leave the device and come back, and its parameters stay the same
    objects, as they do on a real one."""

    def __init__(self, network: nn.Module, ledger: Ledger) -> None:
        self.ledger, self.here = ledger, True
        adapters = [p.nbytes for name, p in network.named_parameters() if ".lora_" in name]
        whole = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        self.bytes = {"base": whole - sum(adapters), "adapters": sum(adapters)}

    def __call__(self, device: torch.device | str) -> None:
        stays = torch.device(device).type == self.ledger.device.type
        if stays != self.here:
            for kind, count in self.bytes.items():
                self.ledger.hold(count if stays else -count, kind)
        self.here = stays


def own_modules(policy: DiffusersPolicy, ledger: Ledger) -> None:
    """Tells the ledger what the policy's tensors are for."""
    for name, module in policy.pipe.components.items():
        if isinstance(module, nn.Module):
            kind = "VAE" if name == "vae" else "text encoders" if name.startswith("text_encoder") else "base"
            ledger.own((*module.parameters(), *module.buffers()), kind)
    for name in NAMES:
        ledger.own(policy.adapter_state(name).values(), "adapters")


def _own_what_stays(trainer: Trainer, ledger: Ledger) -> None:
    for parameter in trainer.step.parameters.values():
        ledger.own([parameter.grad, *trainer.step.optimizer.state[parameter].values()], "optimiser")


@contextmanager
def _by_phase(policy: DiffusersPolicy, ledger: Ledger) -> Iterator[None]:
    """Inside the block the policy's methods are phases, and its pictures have one pixel: nobody looks at them."""
    encode, sample, decode, predict = policy.encode, policy.sample, policy.decode, policy.predict

    def counted_encode(prompts: Sequence[str]) -> list[Cond]:
        with ledger.phase("encode"):
            conds = encode(prompts)
        ledger.own((tensor for cond in conds for tensor in cond.tensors.values()), "prompts")
        return conds

    def counted_sample(*args: Any) -> Tensor:
        with ledger.phase("draw"):
            return sample(*args)

    def counted_decode(latents: Tensor) -> Tensor:
        with ledger.phase("decode"):
            pictures = decode(latents)
        return torch.zeros(len(pictures), 3, 1, 1)

    def counted_predict(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        phase = ledger.current
        phase.calls += 1
        phase.forwards += len(x_t)
        if torch.is_grad_enabled():
            phase.backwards += len(x_t)
        return predict(x_t, t, cond)

    def then_own(move: Callable[[torch.device | str], None]) -> Callable[[torch.device | str], None]:
        def moved(device: torch.device | str) -> None:
            move(device)
            own_modules(policy, ledger)

        return moved

    moves = {name: then_own(getattr(policy, name)) for name in ("text_encoders_to", "vae_to")}
    own = moves | {
        "encode": counted_encode,
        "sample": counted_sample,
        "decode": counted_decode,
        "predict": counted_predict,
    }
    with standing_in(policy, own):
        yield


@contextmanager
def _all_as(name: str, ledger: Ledger) -> Iterator[Phase]:
    """Inside the block there is one phase."""
    with ledger.phase(name) as phase, standing_in(ledger, {"phase": lambda _: _same(phase)}):
        yield phase


@contextmanager
def _same(phase: Phase) -> Iterator[Phase]:
    yield phase
