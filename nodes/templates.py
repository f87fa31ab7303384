"""The order in which ComfyUI offers the templates: its own is that of the file system, which is none."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

FIRST = ("start_here", "quickstart", "human_ranking", "visual_loop")
"""Before all others, which follow by name."""


def in_order(names: Sequence[str]) -> list[str]:
    """The names of templates as they are to be offered."""
    places = {name: place for place, name in enumerate(FIRST)}
    return sorted(names, key=lambda name: (places.get(name, len(FIRST)), name))


def ordering(pack: str) -> Callable[[web.Request, Callable[[web.Request], Awaitable[Any]]], Awaitable[Any]]:
    """A middleware that puts the templates of the pack, by the name of its folder, in order in ComfyUI's list."""

    @web.middleware
    async def ordered(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
        answer = await handler(request)
        if request.path.removeprefix("/api") != "/workflow_templates" or not isinstance(answer, web.Response):
            return answer
        offered = json.loads(answer.text or "{}")
        if isinstance(offered, dict) and isinstance(offered.get(pack), list):
            return web.json_response({**offered, pack: in_order(offered[pack])})
        return answer

    return ordered
