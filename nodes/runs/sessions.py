"""The steps that nodes take with policies. What lives from one to the next is in `held` and on disk.

Nothing relies on what the model's adapters hold: every step begins by loading the state that it starts from, so a step
that Cancel or an error has cut short leaves no trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.evaluation.held_out import Drawing, Row, evaluation_set
from dgpo_core.evaluation.scores import Evaluation
from dgpo_core.method.memory import within_memory
from dgpo_core.method.step import Step, StepSettings
from dgpo_core.policy import AdapterName, Policy
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.runs import origin
from dgpo_core.settings.config import (
    AUTO,
    HUMAN,
    Config,
    DataConfig,
    EvalConfig,
    RewardTerm,
    RolloutConfig,
    TrainingConfig,
)
from dgpo_core.settings.validation import check_timesteps

from ..common import host, warn
from ..common.lora_model import LoraModel
from ..common.values import Groups, PolicyHandle, PolicySpec, Sampler, Training, key_of
from . import edits, keys
from .held import HELD, LoadedModel
from .scoring import beside_drawing, results_of, score_all
from .sources import SOURCES
from .states import State, Store, root_key

GO_ON = -1
"""The iteration that follows on where the run is."""
DRAWING = TrainingConfig(timesteps=1, t_min=0.0)  # fits every solver: drawing does not train


def store(spec: PolicySpec) -> Store:
    """The run's states on disk."""
    return Store(host.runs_folder(), spec)


def turns(run: str | None) -> int:
    """How often the run (None: any) was taken to another branch, or lost its folder, since ComfyUI started.

    Outputs that ComfyUI remembers from before the last time no longer fit to where the run is.
    """
    return HELD.turns(run)


def steps_kept() -> int:
    """How often a run went on to another state since ComfyUI started."""
    return HELD.steps_kept()


def where(handle: PolicyHandle, iteration: int) -> int:
    """The iteration that is meant: `GO_ON` is the one after all that the policy, or else its run, has made."""
    if iteration != GO_ON:
        return iteration
    return handle.step if handle.state else store(handle.spec).newest()


def resolve(handle: PolicyHandle, iteration: int) -> PolicyHandle:
    """The handle with its state: its own, or else the run's after `iteration` steps."""
    return handle if handle.state else store(handle.spec).at(iteration)


# --- steps -----------------------------------------------------------------------------------------------------------


def draw(
    handle: PolicyHandle, places: Sequence[tuple[int, Prompt]], sampler: Sampler, iteration: int, tick: Callable
) -> Groups:
    """The groups of one iteration: one for each (place, prompt), drawn by the handle's state."""
    handle = resolve(handle, iteration)
    with host.engine():
        step = _enter(handle, sampler, DRAWING, (), tick)
        groups = step.draw(places)
        _note_memory(handle.spec, step)
    return Groups(tuple(_on_cpu(g) for g in groups), handle, sampler, iteration, keys.drawn(handle, places, sampler))


def draw_scored(
    handle: PolicyHandle,
    places: Sequence[tuple[int, Prompt]],
    sampler: Sampler,
    iteration: int,
    terms: Sequence[RewardTerm],
    tick: Callable,
) -> Groups:
    """`draw` and `score` in one: a server, or a reward on the CPU, scores a group while the next ones are drawn."""
    handle = resolve(handle, iteration)
    with host.engine():
        step = _enter(handle, sampler, DRAWING, (), tick)
        with beside_drawing(terms, step.policy.device, sampler.rollout.group_size) as running:
            groups = step.draw(places, running.start)
            _note_memory(handle.spec, step)
            scored = tuple(_on_cpu(group) for group in results_of(running, groups))
    key = keys.scored(keys.drawn(handle, places, sampler), terms)
    return Groups(scored, handle, sampler, iteration, key, tuple(terms))


def score(groups: Groups, terms: Sequence[RewardTerm]) -> Groups:
    """The groups with the scores of all rewards."""
    scored = score_all(groups.groups, terms)
    return replace(groups, groups=tuple(scored), terms=tuple(terms), key=keys.scored(groups.key, terms))


def learn(
    handle: PolicyHandle,
    groups: Groups,
    training: Training,
    tick: Callable,
    note: Callable[[], Mapping[str, float]] = dict,
) -> tuple[PolicyHandle, State]:
    """One step from `handle`, or from the state that drew the groups; not taken again where it has been.

    note: what the record of the step is to say besides its metrics. The new state is in memory only: `keep` it.
    """
    if handle.spec != groups.policy.spec:
        raise UserError("The groups are of another policy than the one to train: connect the same one to both.")
    if not handle.state:
        handle = groups.policy
    after = keys.learned(handle, groups.key, training)
    if is_kept(after):
        return after, state_of(after)
    with host.engine():
        check_timesteps(groups.sampler.rollout, training.training)
        step = _enter(handle, groups.sampler, training.training, groups.terms, tick, training.combine)
        edits.require_editor(step.policy, groups.groups, step.size)
        before = state_of(handle)
        done = step.learn([_on(group, step.policy.device) for group in groups.groups], range(len(groups.groups)))
        _note_memory(handle.spec, step)
        record = {"iteration": step.iteration, **done.metrics, **_of_people(groups, done.metrics), **note()}
        state = _snapshot(step, [*before.history, record], [*before.line, after.state])
        _load(handle.spec).last = (after.state, state)
    return after, state


def _of_people(groups: Groups, metrics: Mapping[str, float]) -> dict[str, float]:
    """How many groups a person saw and told apart, whose mean score says nothing; empty where a reward scored."""
    if not any(term.name == HUMAN for term in groups.terms):
        return {}
    asked = len(groups.groups)
    return {"asked": asked, "ranked": round(metrics["informative"] * asked)}


def keep(handle: PolicyHandle, state: State) -> None:
    """Write what `learn` gave out to disk, if it is not there; from here on the run goes by it."""
    runs = store(handle.spec)
    HELD.note_writing(runs.folder)
    if not runs.has(handle.state):
        runs.save(handle.state, state)
    HELD.note_kept(handle, runs.folder, turned=runs.follow(state))


def lora(
    handle: PolicyHandle, state: State, terms: Sequence[RewardTerm], config: Config, adapter: AdapterName = "ema"
) -> LoraModel:
    """The adapter of a policy in this state, as a file would hold it."""
    with host.engine():
        loaded = _load(handle.spec)
        _restore(loaded, state, adapter)
        described = origin.describe(replace(config, reward=tuple(terms)), handle.step)
        metadata = loaded.policy.lora_metadata(described)
        return LoraModel(lora_file.for_comfyui(loaded.policy.lora_tensors(adapter)), metadata)


def patched(handle: PolicyHandle, adapter: AdapterName) -> Any:
    """A MODEL of ComfyUI's with one adapter of the handle's state. UserError where the policy is not on a MODEL."""
    with host.engine():
        loaded = _load(handle.spec)
        _restore(loaded, state_of(handle), adapter)
        return loaded.opened.patched(loaded.policy.lora_tensors(adapter))


def draw_with(
    handle: PolicyHandle, adapter: AdapterName | None, prompts: Sequence[Prompt], seeds: Sequence[int], sampler: Sampler
) -> list[Group]:
    """One group per prompt from the same seeds, with one adapter of the handle's state or with the base."""
    return draw_rows(handle, adapter, [(prompt, list(seeds)) for prompt in prompts], sampler)


def draw_rows(handle: PolicyHandle, adapter: AdapterName | None, rows: Sequence[Row], sampler: Sampler) -> list[Group]:
    """One group for each (prompt, seeds)."""
    with host.engine():
        step, drawn = _enter(handle, sampler, DRAWING, (), host.stop_if_cancelled), sampler.rollout
        drawing = Drawing(step.policy, step.solver, step.size, drawn.cfg, drawn.negative_prompt)

        def work(batch: int) -> list[Group]:
            return drawing.draw(adapter, rows, batch, host.stop_if_cancelled)

        images = sum(len(seeds) for _, seeds in rows)
        groups, step.rollout_batch = within_memory(work, step.rollout_batch, images)
        _note_memory(handle.spec, step)
        return [_on_cpu(group) for group in groups]


def evaluate(
    handle: PolicyHandle,
    adapter: AdapterName | None,
    prompts: Sequence[Prompt],
    images: int,
    sampler: Sampler,
    terms: Sequence[RewardTerm],
) -> Evaluation:
    """What held-out images score that one adapter of the handle's state draws, or the base (None, at iteration 0).

    The seeds are those of every evaluation. Kept on disk, and found again there.
    """
    known = evaluated(handle, adapter, prompts, images, sampler, terms)
    if known:
        return known
    with host.engine():
        groups = draw_rows(handle, adapter, evaluation_set(prompts, images), sampler)
        scored = score_all(groups, terms)
    step = 0 if adapter is None else handle.step
    evaluation = Evaluation.of(step, [(i, group.scores) for i, group in enumerate(scored)])
    runs = store(handle.spec)
    HELD.note_writing(runs.folder)
    runs.save_evaluation(keys.evaluated(handle, adapter, prompts, images, sampler, terms), evaluation)
    return evaluation


def evaluated(handle: PolicyHandle, adapter: AdapterName | None, *asked: Any) -> Evaluation | None:
    """What `evaluate` has found before, for the same arguments."""
    with contextlib.suppress(UserError):
        return store(handle.spec).load_evaluation(keys.evaluated(handle, adapter, *asked))
    return None


def encode(handle: PolicyHandle, prompt: Prompt, images: torch.Tensor, sampler: Sampler, iteration: int) -> Groups:
    """A group from pictures [G, 3, H, W] in [0, 1] that somebody has, cropped and scaled to the sampler's size, as is
    what they are edits of."""
    handle = resolve(handle, iteration)
    with host.engine():
        step = _enter(handle, sampler, DRAWING, (), host.stop_if_cancelled)
        edits.require_source(step.policy, prompt)
        prompt, pictures = edits.fitted(prompt, images, lambda whole: host.fit(whole, *step.size))
        latents = step.policy.encode_images(pictures.to(step.policy.device)).cpu()
    group = Group(prompt, tuple(range(len(pictures))), latents, pictures)
    return Groups((group,), handle, sampler, iteration, keys.given(handle, group, sampler))


def config_of(
    spec: PolicySpec,
    sampler: Sampler,
    training: TrainingConfig,
    terms: Sequence[RewardTerm] = (),
    combine: str = "sum",
) -> Config:
    """What the settings of a graph are for the engine."""
    return Config(
        name=spec.run,
        seed=spec.seed,
        reward=tuple(terms),
        combine=combine,
        model=replace(spec.model, quantize=spec.model.kept_as, height=sampler.height, width=sampler.width),
        lora=spec.lora,
        data=DataConfig(held_out=""),
        rollout=sampler.rollout,
        training=training,
        memory=spec.memory,
        evaluation=EvalConfig(steps=sampler.rollout.steps, cfg=sampler.rollout.cfg, batch=sampler.rollout.batch),
    )


def policy_of(spec: PolicySpec) -> Policy:
    """The policy on its loaded model."""
    return _load(spec).policy


def choose(spec: PolicySpec, config: Config) -> None:
    """What settings leave open is as in `config`, until the model is loaded anew."""
    _load(spec).choose(config)


# --- inside ----------------------------------------------------------------------------------------------------------


def _load(spec: PolicySpec) -> LoadedModel:
    """The model, from memory or from its files, where it computes."""
    model = HELD.model(key_of(root_key(spec), spec.memory), spec, _open)
    model.opened.load()
    return model


def _open(spec: PolicySpec) -> LoadedModel:
    """The model from its files, with its state before the first step."""
    with host.engine():  # weights that are made in inference mode could never be trained
        opened = SOURCES[spec.source](spec)
        settings = StepSettings(spec.seed, RolloutConfig(), DRAWING)
        fresh = _snapshot(Step(opened.policy, settings, size=opened.size))
    return LoadedModel(opened, fresh, (root_key(spec), fresh))


def use(handle: PolicyHandle) -> None:
    """A state that is on disk stays there longer."""
    store(handle.spec).use(handle.state)


def is_kept(handle: PolicyHandle) -> bool:
    """Whether `state_of` has it."""
    return HELD.state(handle.state) is not None or store(handle.spec).has(handle.state)


def furthest(spec: PolicySpec) -> int:
    """The most steps of any state of the run that `state_of` has."""
    return max(store(spec).furthest(), HELD.furthest())


def state_of(handle: PolicyHandle) -> State:
    """The handle's state, from memory or from disk."""
    state = HELD.state(handle.state)
    if state is not None:
        return state
    if handle.state == root_key(handle.spec):
        return _load(handle.spec).fresh
    return store(handle.spec).load(handle.state)


def _enter(
    handle: PolicyHandle,
    sampler: Sampler,
    training: TrainingConfig,
    terms: Sequence[RewardTerm],
    tick: Callable,
    combine: str = "sum",
) -> Step:
    """A step on the loaded model in the handle's state."""
    loaded = _load(handle.spec)
    spec = handle.spec
    warn.of_few_steps(loaded.policy.few_steps, sampler.rollout)
    settings = StepSettings(spec.seed, sampler.rollout, training, terms, combine, spec.lora.dropout)
    size = sampler.height or loaded.opened.size[0], sampler.width or loaded.opened.size[1]
    loaded.policy.latent_shape(*size)
    step = Step(loaded.policy, settings, size=size, check=tick)
    state = state_of(handle)
    step.load_state(state.tensors, state.info)
    for setting, asked in _batches(loaded, settings).items():
        most = loaded.fits.get(setting)
        setattr(step, setting, min(asked or most, most) if most else asked)
    return step


def _batches(loaded: LoadedModel, settings: StepSettings) -> dict[str, int]:
    """Samples at once as the settings ask, or leave it open."""
    drawn, t = settings.rollout, settings.training
    asked = {"rollout_batch": drawn.at_once, "micro_batch": t.at_once}
    left_open = {"rollout_batch": drawn.batch == AUTO, "micro_batch": t.micro_batch == AUTO}
    return {name: loaded.chosen.get(name, batch) if left_open[name] else batch for name, batch in asked.items()}


def _note_memory(spec: PolicySpec, step: Step) -> None:
    """A batch that the step had to halve stays halved in the steps that follow, until the model is loaded anew."""
    loaded = _load(spec)
    for setting, most in _batches(loaded, step.settings).items():
        fitted = getattr(step, setting)
        if fitted and fitted != most:
            loaded.fits[setting] = fitted


def _restore(loaded: LoadedModel, state: State, adapter: AdapterName) -> None:
    """Only one adapter's weights."""
    with torch.no_grad():
        for key, value in loaded.policy.adapter_state(adapter).items():
            value.copy_(state.tensors[f"{adapter}/{key}"])


def _snapshot(step: Step, history: Sequence[Mapping[str, Any]] = (), line: Sequence[str] = ()) -> State:
    """The step's state with memory of its own."""
    tensors, info = step.state()
    return State({name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}, info, history, line)


def _on_cpu(group: Group) -> Group:
    return replace(group, latents=group.latents.cpu())


def _on(group: Group, device: torch.device) -> Group:
    return replace(group, latents=group.latents.to(device))
