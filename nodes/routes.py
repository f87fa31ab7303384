"""The addresses that the pack's pages ask and answer under."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from aiohttp import web

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_json
from dgpo_core.people.questions import Questions, UnknownQuestion

from .common.presets import preset_values

MOST_BYTES = 2**20
"""Of an answer to a question; a thousand pairs of images take 15,000."""


def add_presets(routes: Any) -> None:
    """GET /dgpo/presets gives `preset_values`."""

    @routes.get("/dgpo/presets")
    async def presets(_: web.Request) -> web.Response:
        return web.json_response(preset_values())


def add_finish(routes: Any, ask: Callable[[str], bool]) -> None:
    """POST /dgpo/finish of {"node": ID} asks the training of a node to end with what it has; gives {"finishing": ...},
    whether there is one."""

    @routes.post("/dgpo/finish")
    async def finish(request: web.Request) -> web.Response:
        try:
            said = parse_json(await _body(request), "The request")
        except UserError as error:
            return web.json_response({"error": str(error)}, status=400)
        node = said.get("node") if isinstance(said, dict) else None
        if not isinstance(node, str):
            return web.json_response({"error": 'Say which node: {"node": "7"}.'}, status=400)
        return web.json_response({"finishing": ask(node)})


def add_questions(routes: Any, questions: Questions) -> None:
    """GET /dgpo/questions lists the open ones; POST /dgpo/questions/{token} answers one, and POST
    /dgpo/questions/{token}/next tells which pair of images comes next; /dgpo/web/ has the dialog.
    """
    routes.static("/dgpo/web", str(files("dgpo_core.people").joinpath("web")))

    @routes.get("/dgpo/questions")
    async def pending(_: web.Request) -> web.Response:
        return web.json_response({"questions": questions.pending()})

    @routes.post("/dgpo/questions/{token}")
    async def answer(request: web.Request) -> web.Response:
        return await _told(request, questions.answer)

    @routes.post("/dgpo/questions/{token}/next")
    async def following(request: web.Request) -> web.Response:
        return await _told(request, questions.next)


async def _body(request: web.Request) -> bytes:
    """What was posted. Raises HTTPRequestEntityTooLarge for what no page of ours posts: while it is parsed, ComfyUI
    answers nobody else."""
    return await request.clone(client_max_size=MOST_BYTES).read()


async def _told(request: web.Request, tell: Callable[[str, Any], Any]) -> web.Response:
    """Gives what was posted about a question to `tell`, and back what it says, or what is wrong."""
    try:
        said = tell(request.match_info["token"], parse_json(await _body(request), "The answer"))
    except UnknownQuestion as error:
        return web.json_response({"error": str(error)}, status=404)
    except UserError as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response(said or {})
