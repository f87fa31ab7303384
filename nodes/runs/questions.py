"""The open questions of this process to a person, and who hears of them. What asks and answers is the engine's.

`QUESTIONS` is made when ComfyUI imports the nodes, and gone with the process: whoever waits for an answer then runs no
longer. The thread in which nodes run asks, ComfyUI's server answers; the engine locks what both touch.
"""

from collections.abc import Mapping
from typing import Any

from server import PromptServer

from dgpo_core.people.questions import OPENED, Questions


def _notify(event: str, data: Mapping[str, Any]) -> None:
    """A new question goes to who queued the prompt, or to all where that is no open page; its end goes to all."""
    server = PromptServer.instance
    asker = server.client_id if event == OPENED and server.client_id in server.sockets else None
    server.send_sync(event, data, asker)


QUESTIONS = Questions(_notify)
