"""The addresses that the pack's pages ask and answer under."""

from importlib.resources import files
from typing import Any

from aiohttp import web

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_json
from dgpo_core.people.questions import Questions, UnknownQuestion

from .common.presets import preset_values


def add_presets(routes: Any) -> None:
    """GET /dgpo/presets gives `preset_values`."""

    @routes.get("/dgpo/presets")
    async def presets(_: web.Request) -> web.Response:
        return web.json_response(preset_values())


def add_questions(routes: Any, questions: Questions) -> None:
    """GET /dgpo/questions lists the open ones; POST /dgpo/questions/{token} answers one; /dgpo/web/ has the dialog."""
    routes.static("/dgpo/web", str(files("dgpo_core.people").joinpath("web")))

    @routes.get("/dgpo/questions")
    async def pending(_: web.Request) -> web.Response:
        return web.json_response({"questions": questions.pending()})

    @routes.post("/dgpo/questions/{token}")
    async def answer(request: web.Request) -> web.Response:
        try:
            questions.answer(request.match_info["token"], parse_json(await request.read(), "The answer"))
        except UnknownQuestion as error:
            return web.json_response({"error": str(error)}, status=404)
        except UserError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({})
