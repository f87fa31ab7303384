"""What only a graph as a whole can tell, before anything is drawn: settings of several nodes that do not fit.

`of_graph` reads a graph as it is queued. A value that comes over a link is not known yet, so nothing is said of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from aiohttp import web

from dgpo_core.comfy.forms import AS_BELOW, MODELS_OWN, chosen_preset, shipped_model
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.common.source import Source
from dgpo_core.diffusion.solvers import SOLVERS, check_solver
from dgpo_core.policy import FAMILIES, family_of, image_limits
from dgpo_core.rewards import WEIGHTS_FILE, check_cheaply
from dgpo_core.settings import shipped
from dgpo_core.settings.config import RewardTerm, RolloutConfig, TrainingConfig
from dgpo_core.settings.gates import check_rewards
from dgpo_core.settings.validation import check_timesteps

from .common import faults, fields, host, words
from .common.faults import Fault
from .prompts import read
from .ranker import NO_REWARD
from .ranker import REWARD as WHEN_LATE
from .rewards import term
from .runs.loop import NO_SCORES

Graph = Mapping[str, Mapping[str, Any]]
Found = dict[str, Fault]
Handler = Callable[[web.Request], Awaitable[Any]]

_GROUPS = ("scored", "groups", "previous")  # inputs by which groups go from node to node
_OURS = "DGPO_"
_LOOKED_AT = ("DGPO_GroupSampler", "DGPO_RewardScorer", "DGPO_HumanRanker", "DGPO_BeforeAfter")  # and the trainers
_TRAINERS = ("DGPO_TrainingLoop", "DGPO_LoRATrainer")
_LATER = Source("", (0, 0))  # of a prompt whose picture comes over a link


@web.middleware
async def checking(request: web.Request, handler: Handler) -> Any:
    """Looks at each graph before ComfyUI does; of what ComfyUI answers, leaves each sentence once, where it belongs."""
    if request.method != "POST" or request.path.removeprefix("/api") != "/prompt":
        return await handler(request)
    found: Found = {}
    with suppress(ValueError, UnicodeDecodeError, RecursionError):  # ComfyUI says what it thinks of such a body
        body = await request.json()
        found = of_graph(body.get("prompt") if isinstance(body, dict) else None)
    with faults.request(found) as named:
        answer = await handler(request)
        if not named or not isinstance(answer, web.Response):
            return answer
        said = json.loads(answer.text or "{}")
        if isinstance(said, dict) and said.get("node_errors"):
            said["node_errors"] = faults.one_each(said["node_errors"], named)
            return web.json_response(said, status=answer.status)
        return answer


def of_graph(graph: Any) -> Found:
    """The first fault of each node, by its id; empty for what is no graph."""
    found: Found = {}
    if not isinstance(graph, Mapping):
        return found
    for id_, node in graph.items():
        kind = node.get("class_type") if isinstance(node, Mapping) else None
        if isinstance(kind, str) and kind.startswith(_OURS) and (fault := _of_values(node.get("inputs"))):
            found[id_] = fault
        if kind in _TRAINERS or kind in _LOOKED_AT:
            with suppress(KeyError, TypeError, AttributeError, ValueError):  # what is not as it should be ComfyUI tells
                for faulty, fault in _of_node(graph, id_, kind):
                    found.setdefault(faulty, fault)
    return found


def _of_values(inputs: Any) -> Fault | None:
    """What no widget gives, but a graph of somebody's own may have: to a node, nothing is what a linked input is."""
    for name, value in inputs.items() if isinstance(inputs, Mapping) else ():
        if value is None:
            return Fault(name, "It has no value: choose or write one.")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                return Fault(name, f"{shown(value)} holds half a character (a lone surrogate): write it anew.")
    return None


def _of_node(graph: Graph, id_: str, kind: str) -> Iterator[tuple[str, Fault]]:
    """What does not fit among the nodes that one of them brings together."""
    inputs = graph[id_]["inputs"]
    if kind == "DGPO_LoRATrainer" and _at(graph, id_, "scored", "DGPO_GroupSampler"):
        yield id_, Fault("scored", NO_SCORES)
    if kind == "DGPO_HumanRanker" and inputs["on_timeout"] == WHEN_LATE and not inputs.get("reward"):
        yield id_, Fault("reward", NO_REWARD)
    drawing = _drawing(graph, id_) if kind != "DGPO_TrainingLoop" else id_
    sampler = _at(graph, drawing, "sampler" if kind == "DGPO_TrainingLoop" else "settings", "DGPO_SamplerSettings")
    if kind in _TRAINERS:
        settings = _at(graph, id_, "settings", "DGPO_TrainingSettings")
        yield from _steps(graph, settings, sampler)
    policy = _at(graph, drawing, "policy", "DGPO_LoadPolicy")
    yield from _model(graph, policy, sampler)
    prompts = _at(graph, drawing, "prompts", "DGPO_Prompts")
    reward = _at(graph, id_, "reward", "DGPO_Reward")
    yield from _rewards(graph, reward, prompts)
    if kind == "DGPO_TrainingLoop":
        watch = _at(graph, id_, "watch", "DGPO_Reward")
        yield from _watched(graph, id_, reward, watch)


def _at(graph: Graph, id_: str | None, name: str, kind: str) -> str | None:
    """The node of this kind that is connected to an input."""
    link = graph[id_]["inputs"].get(name) if id_ is not None else None
    source = link[0] if isinstance(link, list) and len(link) == 2 else None
    return source if source in graph and graph[source].get("class_type") == kind else None


def _drawing(graph: Graph, id_: str) -> str | None:
    """The Group Sampler from which a node's groups come, or the node itself where it draws."""
    seen: set[str] = set()
    while id_ not in seen:
        seen.add(id_)
        if graph[id_]["class_type"] in ("DGPO_GroupSampler", "DGPO_BeforeAfter"):
            return id_
        links = [graph[id_]["inputs"].get(name) for name in _GROUPS]
        link = next((link for link in links if isinstance(link, list) and link[0] in graph), None)
        if link is None:
            return None
        id_ = link[0]
    return None


# --- what must fit ---------------------------------------------------------------------------------------------------


def _training(inputs: Mapping[str, Any]) -> TrainingConfig:
    chosen = chosen_preset(inputs["preset"]) if inputs["preset"] != AS_BELOW else None
    return chosen[0] if chosen else fields.values(TrainingConfig, _plain(inputs))


def _rollout(inputs: Mapping[str, Any]) -> RolloutConfig:
    scheduler = inputs.get("scheduler", MODELS_OWN)
    return fields.values(RolloutConfig, {**_plain(inputs), "scheduler": "" if scheduler == MODELS_OWN else scheduler})


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The widgets' values; KeyError where one of them comes over a link."""
    if any(isinstance(value, list) for value in inputs.values()):
        raise KeyError("linked")
    return dict(inputs)


def _steps(graph: Graph, settings: str | None, sampler: str | None) -> Iterator[tuple[str, Fault]]:
    """The trained steps are steps of the sampler."""
    made = []
    for node, make in ((settings, _training), (sampler, _rollout)):
        if node is None:
            return
        try:
            made.append(make(graph[node]["inputs"]))
        except UserError as error:
            yield node, _fault(error, graph[node]["inputs"])
            return
    try:
        check_timesteps(made[1], made[0])
    except UserError as error:
        yield settings or "", _fault(error, graph[settings or ""]["inputs"])


def _model(graph: Graph, policy: str | None, sampler: str | None) -> Iterator[tuple[str, Fault]]:
    """The model has the sampler, and images of this size."""
    if policy is None or sampler is None:
        return
    model, inputs = graph[policy]["inputs"]["model"], graph[sampler]["inputs"]
    try:
        path = host.model_path(model)
        path = str(shipped.MODELS.get(path, path))
        family = FAMILIES[family_of(path)]
    except UserError as error:
        if not shipped_model(model):
            yield policy, Fault("model", str(error))
        return
    asked = graph[policy]["inputs"].get("prediction", "auto")
    kind = family.kinds[0] if asked == "auto" else asked
    if kind in SOLVERS and isinstance(inputs["solver"], str):
        try:
            check_solver(inputs["solver"], kind)
        except UserError as error:
            yield sampler, Fault("solver", words.on_screen(str(error)))
    limits = image_limits(path)
    for side in ("height", "width"):
        try:
            limits.check(side, inputs[side])
        except UserError as error:
            yield sampler, Fault(side, str(error))


def _rewards(graph: Graph, reward: str | None, prompts: str | None) -> Iterator[tuple[str, Fault]]:
    """The rewards go together, and can judge the prompts."""
    chain = list(_chain(graph, reward))
    for node, found in chain:
        try:
            check_rewards([t for _, t in chain])
        except UserError as error:
            if str(error).find(f" {found.name} ") >= 0:
                text = words.on_screen(str(error))
                yield node, Fault("only_if" if "condition" in text else "weight" if "weight" in text else "name", text)
        texts = _texts(graph, prompts)
        if texts:
            try:
                check_cheaply(found, texts)
            except UserError as error:
                yield node, Fault("name", str(error))


def _watched(graph: Graph, loop: str, reward: str | None, watch: str | None) -> Iterator[tuple[str, Fault]]:
    trained = {found.name for _, found in _chain(graph, reward)}
    both = trained & {found.name for _, found in _chain(graph, watch)}
    if both:
        text = f"{min(both)} is trained, so it cannot be measured besides: take it out of what is connected there."
        yield loop, Fault("watch", text)
    if watch is not None and not graph[loop]["inputs"].get("held_out"):
        text = f"It is measured on test prompts: connect some to {words.named('held_out')}."
        yield loop, Fault("watch", text)


def _chain(graph: Graph, reward: str | None) -> Iterator[tuple[str, RewardTerm]]:
    """The Reward nodes of a chain, with what they say; those that say nothing yet, or nonsense, are left out."""
    seen: set[str] = set()
    while reward is not None and reward not in seen:
        seen.add(reward)
        inputs = graph[reward]["inputs"]
        with suppress(UserError, KeyError):
            said = _plain(
                {name: inputs.get(name, "") for name in ("name", "weight", "options", "only_if", WEIGHTS_FILE)}
            )
            yield reward, term(**said)
        reward = _at(graph, reward, "reward", "DGPO_Reward")


def _texts(graph: Graph, prompts: str | None) -> Sequence[Prompt]:
    if prompts is None:
        return []
    inputs = graph[prompts]["inputs"]
    if not isinstance(inputs["source"], str) or not isinstance(inputs["text"], str):
        return []
    with suppress(UserError):  # Prompts tells that itself
        found = read(inputs["source"], inputs["text"])
        return [replace(prompt, sources=(_LATER,)) for prompt in found] if inputs.get("images") else found
    return []


def _fault(error: UserError, inputs: Mapping[str, Any]) -> Fault:
    """About the first setting that the sentence names and the node has."""
    text = str(error)
    named = [name for name in words.settings_in(text) if name in inputs]
    named += [name for name in inputs if re.search(rf"\b{name}\b", text)]  # of one group the group is not said
    return Fault((named or list(inputs))[0], words.on_screen(text))
