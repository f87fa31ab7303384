"""The nodes of the pack, by file. A new node is one entry in its file's NODES."""

from typing import Any

from comfy_api.v0_0_2 import ComfyExtension

from . import compare, lora, native, policy, prompts, ranker, rewards, sampling, training


class DGPOExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[Any]:
        files = (policy, native, prompts, sampling, rewards, ranker, training, lora, compare)
        return [node for file in files for node in file.NODES]


async def comfy_entrypoint() -> DGPOExtension:
    """Called by ComfyUI once, at its start."""
    return DGPOExtension()
