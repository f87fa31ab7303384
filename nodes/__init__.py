"""The nodes of the pack, by file, and all that it registers elsewhere. A new node is one entry in its file's NODES."""

from pathlib import Path
from typing import Any

from comfy_api.v0_0_2 import ComfyExtension
from server import PromptServer

from dgpo_core.rewards import weight_files
from dgpo_core.rewards.network import endpoints
from dgpo_core.rewards.published import CLIP_WORDS

from . import (
    checks,
    compare,
    lora,
    native,
    policy,
    prompts,
    ranker,
    rewards,
    routes,
    sampling,
    taste,
    teach,
    templates,
    training,
)
from .common import host
from .runs.finishing import FINISHING
from .runs.questions import QUESTIONS


class DGPOExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[Any]:
        files = (teach, policy, native, prompts, sampling, rewards, taste, ranker, training, lora, compare)
        return [node for file in files for node in file.NODES]


async def comfy_entrypoint() -> DGPOExtension:
    """Called by ComfyUI once, at its start. (The `on_load` of its extensions is not called in every version.)"""
    routes.add_presets(PromptServer.instance.routes)
    routes.add_finish(PromptServer.instance.routes, FINISHING.ask)
    routes.add_questions(PromptServer.instance.routes, QUESTIONS)
    PromptServer.instance.app.middlewares.append(checks.checking)
    PromptServer.instance.app.middlewares.append(templates.ordering(Path(__file__).parents[1].name))
    weight_files.look_in(host.reward_folders())
    if host.clip_words().is_dir():
        weight_files.supply(CLIP_WORDS, host.clip_words())
    endpoints.keep_in(host.endpoints_file())
    return DGPOExtension()
