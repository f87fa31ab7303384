"""A reward on another accelerator or machine, where `python -m dgpo_core.rewards.serve` runs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgpo_core.rewards import wire
from dgpo_core.rewards.base import Reward, runs
from dgpo_core.rewards.web import Refused, Server, whole

NAME = "remote"


class Remote(Reward):
    """The scores of a reward server; in the range of its reward.

    Images travel with 8 bits per channel: scores are those of the images rounded to whole 255ths, as in a PNG.
    url: the server's address, such as http://127.0.0.1:8000. token_env: the name of the environment variable that holds
    its token, never the token. batch: images per request; more only where one group has more, as groups stay whole.
    timeout, retries, backoff: see `web.Server`. Neither token nor images are encrypted on the way, except to an https://
    address: between machines use an SSH tunnel (`ssh -L 8000:127.0.0.1:8000 HOST`) or a network you trust.
    Raises UserError for unusable options, and with the server's own sentence for what it cannot score.
    """

    def __init__(
        self,
        device: str = "cpu",
        url: str = "",
        token_env: str = "",
        timeout: float = 300.0,
        batch: int = 16,
        retries: int = 4,
        backoff: float = 1.0,
    ) -> None:
        super().__init__(device)
        self.server = Server(NAME, url, token_env, timeout, retries, backoff)
        self.batch = whole(NAME, "batch", batch, least=1)

    def overlaps(self, device: torch.device, group_size: int) -> bool:
        return 2 * group_size > self.batch  # smaller groups are better sent together

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        parts = [self._part(part, images, prompts, metadata) for part in batches(prompts, self.batch)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _part(
        self, part: slice, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        count = part.stop - part.start
        try:
            body = wire.pack(images[part], prompts[part], metadata[part])
        except TypeError as error:
            self.server.fail(f"the metadata of the prompt {prompts[part.start]!r} cannot be sent as JSON ({error}).")
        sample = f"sample {part.start}" if count == 1 else f"samples {part.start} to {part.stop - 1}"
        sample += f" ({prompts[part.start]!r}{'' if count == 1 else ', ...'})"
        return self.server.ask(wire.PATH, body, wire.KIND, lambda answer: _scores(answer, count), sample)


def batches(prompts: Sequence[str], most: int) -> list[slice]:
    """Whole groups together, as many as have at most `most` images; a larger group by itself."""
    found: list[slice] = []
    for group in runs(prompts):
        if found and group.stop - found[-1].start <= most:
            found[-1] = slice(found[-1].start, group.stop)
        else:
            found.append(group)
    return found


def _scores(answer: bytes, count: int) -> Tensor:
    try:
        scores = json.loads(answer)["scores"]
    except (ValueError, KeyError, TypeError):
        raise Refused("did not answer with scores: is it `python -m dgpo_core.rewards.serve`?", again=False) from None
    numbers = isinstance(scores, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in scores)
    if not numbers or len(scores) != count:
        raise Refused(f"did not answer with {count} numbers", again=False)
    return torch.tensor(scores, dtype=torch.float32)
