"""A reward on another accelerator or machine, where `python -m dgpo_core.rewards.serve` runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_json
from dgpo_core.rewards.base import runs
from dgpo_core.rewards.network import wire
from dgpo_core.rewards.network.web import Refused, Server, ServerReward, whole


class Remote(ServerReward):
    """The scores of a reward server; in the range of its reward.

    Images travel with 8 bits per channel: scores are those of the images rounded to whole 255ths, as in a PNG.
    endpoint: the name of the server in the file of endpoints (see `rewards.network.endpoints`). Instead of it, from the
    machine's own user alone: url, the server's address, such as http://127.0.0.1:8000, and token_env, the name of the
    environment variable that holds its token, never the token. batch: images per request; more only where one group has
    more, as groups stay whole. timeout, retries, backoff: see `web.Server`. Neither token nor images are encrypted on
    the way, except to an https:// address: between machines use an SSH tunnel (`ssh -L 8000:127.0.0.1:8000 HOST`) or a
    network you trust.
    Raises UserError for unusable options, and with the server's own sentence for what it cannot score.
    """

    name = "remote"
    key_option = "token_env"
    shareable = (*ServerReward.shareable, "batch")

    def __init__(
        self,
        device: str = "cpu",
        endpoint: str = "",
        url: str = "",
        token_env: str = "",
        timeout: float = 300.0,
        batch: int = 16,
        retries: int = 4,
        backoff: float = 1.0,
    ) -> None:
        super().__init__(device)
        place = self.place({"endpoint": endpoint, "url": url, "token_env": token_env})
        self.server = Server(self.name, place, timeout, retries, backoff)
        self.batch = whole(self.name, "batch", batch, least=1)

    def overlaps(self, device: torch.device, group_size: int) -> bool:
        return 2 * group_size > self.batch  # smaller groups are better sent together

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.score_edits(images, prompts, metadata, [()] * len(prompts))

    def score_edits(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        parts = [self._part(part, images, prompts, metadata, sources) for part in batches(prompts, self.batch)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _part(
        self,
        part: slice,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        count = part.stop - part.start
        try:
            body = wire.pack(images[part], prompts[part], metadata[part], sources[part])
        except TypeError as error:
            self.server.fail(f"the metadata of the prompt {prompts[part.start]!r} cannot be sent as JSON ({error}).")
        sample = f"sample {part.start}" if count == 1 else f"samples {part.start} to {part.stop - 1}"
        sample += f" ({prompts[part.start]!r}{'' if count == 1 else ', ...'})"
        return self.server.ask(wire.PATH, body, wire.KIND, lambda answer: _scores(answer, count), sample)


def batches(prompts: Sequence[str], most: int) -> list[slice]:
    """Whole groups together, as many as have at most `most` images; a larger group by itself."""
    parts: list[slice] = []
    for group in runs(prompts):
        if parts and group.stop - parts[-1].start <= most:
            parts[-1] = slice(parts[-1].start, group.stop)
        else:
            parts.append(group)
    return parts


def _scores(answer: bytes, count: int) -> Tensor:
    try:
        scores = parse_json(answer, "The answer")["scores"]
    except (UserError, LookupError, TypeError):
        raise Refused("did not answer with scores: is it `python -m dgpo_core.rewards.serve`?", again=False) from None
    numbers = isinstance(scores, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in scores)
    if not numbers or len(scores) != count:
        raise Refused(f"did not answer with {count} numbers", again=False)
    return torch.tensor([float(score) for score in scores], dtype=torch.float32)
