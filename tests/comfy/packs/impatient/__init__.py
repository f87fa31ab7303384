"""A custom node pack for the tests of Teach: once its node has run, a person has not five minutes, but as long as the
training."""

import sys
from typing import Any

from comfy_api.v0_0_2 import ComfyExtension, io, ui


class TestImpatient(io.ComfyNode):
    """Shortens what people have at least to answer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="TestImpatient", category="test", is_output_node=True)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        for name, module in list(sys.modules.items()):
            if name.endswith("nodes.runs.judges"):
                module.LEAST_WAIT_S = 1
        return io.NodeOutput(ui=ui.PreviewText("done"))


class Extension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[Any]:
        return [TestImpatient]


async def comfy_entrypoint() -> Extension:
    """Called by ComfyUI once, at its start."""
    return Extension()
