"""A vision-language model as the judge, on any server that speaks OpenAI's chat completions."""

import base64
import functools
import io
import json
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import regex
import torch
from torch import Tensor

from dgpo_core.common import patience
from dgpo_core.common.errors import Exhausted, UserError
from dgpo_core.common.pictures import to_pil
from dgpo_core.common.reading import parse_json, shown
from dgpo_core.rewards.network.web import Refused, Server, ServerReward, whole

TEMPLATE = """This image was made for the following prompt:
{prompt}

How well does the image show what the prompt asks for, and how well is it made? Say in one sentence what is right and \
what is wrong. Then write the score alone, on a last line of its own: a number from 0 (nothing is right) to 10 \
(perfect)."""

EDIT_TEMPLATE = """The last image was made from what comes before it by the following instruction:
{prompt}

Judge two things. Was the instruction followed, all of it? And is everything that the instruction does not speak of as \
it was before: people and their faces, objects, places, colours, style, framing? Say in one sentence what is right and \
what is wrong. Rate each from 0 (not at all) to 10 (perfectly). Then write the lower of the two numbers alone, on a \
last line of its own."""

PATTERN = (
    r"(?<![\w.,])(-?\d+(?:[.,]\d+)?)"
    r"(?:[\s*_`)}\]]*(?:points?)?[\s*_`({\[]*(?:/|out\s+of|of|max\.?|on\s+a\s+scale\s+(?:of|from)\s+[01]\s*(?:to|-|–))"
    r"[\s*_`({\[\\]*10(?:\.0+)?\b)?"
)
"""A number, which may be followed by "/10", "out of 10" or the like, with marks as in Markdown: the 7 of "**7**/10"."""

MOST_PATTERN = 1000  # characters
PATTERN_S = 1.0
"""Seconds that a pattern may take over one answer: some take longer than the universe has."""


class VlmJudge(ServerReward):
    """The score that a vision-language model writes, from `low` to `high`, scaled to [0, 1].

    endpoint: the name of the server in the file of endpoints (see `rewards.network.endpoints`). Instead of it, from the
    machine's own user alone: url, the server's address up to and without "/chat/completions", such as
    http://127.0.0.1:8000/v1, and key_env, the name of the environment variable that holds the API key, never the key.
    model: its name there; an endpoint that names one is for that one alone. template: the question; {prompt} in it
    becomes the prompt. edit_template: the question about an image that was made from sources, which are shown before
    it; the default asks for following and preservation, of which the lower counts. pattern: the regular expression
    whose last match in the answer is the score; its first group where it has one. It, too, is for the machine's own
    user to set. low, high: what that number must be between.
    jpeg_quality: images are sent as JPEG of this quality (1 to 95), or as PNG for 0. request: further fields of the
    request, from the machine's own user alone; those of the endpoint, or else {"temperature": 0}, unless given.
    concurrency: requests at once. timeout, retries, backoff: see `web.Server`; an answer without a score in the range,
    or one that was cut off, is asked for again as well. max_calls: the cap on the cost: requests, further tries
    included, that this process may send before the run stops with a checkpoint, 0 for no limit. Each process of several
    counts its own, and a resumed run counts from 0 again: resuming is how one agrees to pay for as many once more.

    Raises UserError for unusable options, for a sample without a score, and when `max_calls` is reached, where that can
    be known before the first request of a call that would pass it.
    Source: https://platform.openai.com/docs/api-reference/chat; vLLM, SGLang, llama.cpp and Ollama speak it as well.
    """

    name = "vlm_judge"
    range = (0.0, 1.0)
    shareable = (
        *(*ServerReward.shareable, "model", "template", "edit_template", "low", "high"),
        *("jpeg_quality", "concurrency", "max_calls"),
    )

    def __init__(
        self,
        device: str = "cpu",
        endpoint: str = "",
        url: str = "",
        model: str = "",
        key_env: str = "",
        template: str = TEMPLATE,
        pattern: str = PATTERN,
        low: float = 0.0,
        high: float = 10.0,
        jpeg_quality: int = 0,
        request: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        max_calls: int = 0,
        edit_template: str = EDIT_TEMPLATE,
    ) -> None:
        super().__init__(device)
        place = self.place({"endpoint": endpoint, "url": url, "key_env": key_env})
        self.server = Server(self.name, place, timeout, retries, backoff)
        if place.model and model not in ("", place.model):
            self.server.fail(f"the endpoint {endpoint!r} is for the model {place.model}: leave the option model out.")
        self.model, self.template = self._text("model", model or place.model), self._text("template", template)
        self.edit_template = self._text("edit_template", edit_template)
        self.pattern, self.low, self.high = self._pattern(pattern), *self._bounds(low, high)
        self.jpeg_quality = whole(self.name, "jpeg_quality", jpeg_quality)
        if jpeg_quality > 95:
            self.server.fail(f"jpeg_quality must be 0 to 95, not {jpeg_quality}.")
        self.request = self._fields((place.request or {"temperature": 0}) if request is None else request)
        self.concurrency = whole(self.name, "concurrency", concurrency, least=1, most=256)
        self.max_calls, self.calls, self.lock = whole(self.name, "max_calls", max_calls), 0, threading.Lock()

    def overlaps(self, device: torch.device, group_size: int) -> bool:
        return group_size >= self.concurrency  # a smaller group alone would leave connections unused

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.score_edits(images, prompts, metadata, [()] * len(prompts))

    def score_edits(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        self._afford(len(images))
        stop, pool = threading.Event(), ThreadPoolExecutor(self.concurrency)
        try:
            together = [[*before, image] for before, image in zip(sources, images, strict=True)]
            samples = enumerate(zip(together, prompts, strict=True))
            jobs = [pool.submit(self._judge, i, pictures, prompt, stop) for i, (pictures, prompt) in samples]
            waiting = set(jobs)
            while waiting:
                done = patience.first(waiting)
                waiting -= done
                for job in done:
                    job.result()
        finally:
            stop.set()  # and what is under way ends
            pool.shutdown(wait=False, cancel_futures=True)
        return torch.tensor([job.result() for job in jobs], dtype=torch.float32)

    def read(self, answer: bytes) -> float:
        """The score in [0, 1] of a chat completion. Raises Refused where there is none."""
        try:
            choice = parse_json(answer, "The answer")["choices"][0]
            text = choice["message"]["content"]
        except (UserError, LookupError, TypeError):
            raise Refused("did not answer with a chat completion") from None
        if choice.get("finish_reason") == "length":
            raise Refused("cut its answer off: ask for more max_tokens in the option request")
        if not isinstance(text, str):
            raise Refused("answered without a text")
        value = self._number(text)
        if not self.low <= value <= self.high:
            raise Refused(f"gave the score {value:g}, which is not from {self.low:g} to {self.high:g}")
        return (value - self.low) / (self.high - self.low)

    def _judge(self, i: int, pictures: Sequence[Tensor], prompt: str, stop: threading.Event) -> float:
        body = json.dumps(self._question(pictures, prompt)).encode()
        sample, count = f"sample {i} ({prompt!r})", functools.partial(self._afford, 1, spend=True)
        with patience.until(stop):
            return self.server.ask("/chat/completions", body, "application/json", self.read, sample, count)

    def _question(self, pictures: Sequence[Tensor], prompt: str) -> dict[str, Any]:
        """pictures: the sources, if any, and last the image to judge."""
        template = self.edit_template if len(pictures) > 1 else self.template
        images = [{"type": "image_url", "image_url": {"url": self._data_url(picture)}} for picture in pictures]
        content = [{"type": "text", "text": template.replace("{prompt}", prompt)}, *images]
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **self.request}

    def _data_url(self, image: Tensor) -> str:
        buffer = io.BytesIO()
        kind, options = ("jpeg", {"quality": self.jpeg_quality}) if self.jpeg_quality else ("png", {})
        to_pil(image).save(buffer, kind, **options)
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def _number(self, text: str) -> float:
        said = f"'{self.server.quoted(text, 60)}'"
        try:
            matches = list(self.pattern.finditer(text, timeout=PATTERN_S))
        except TimeoutError:
            raise Refused(f"wrote what the pattern takes more than {PATTERN_S:g} s to search: {said}") from None
        if not matches:
            raise Refused(f"wrote no score that the pattern finds: {said}")
        found = matches[-1].group(1 if self.pattern.groups else 0)
        try:
            value = float(found.replace(",", "."))  # as much of the world writes it
        except (AttributeError, ValueError):  # a group that takes no part is None
            value = math.nan
        if not math.isfinite(value):
            found = f"'{self.server.quoted(str(found), 60)}'"
            raise Refused(f"wrote {found} where the pattern finds the score, which is no number: {said}")
        return value

    def _afford(self, calls: int, spend: bool = False) -> None:
        """Raises Exhausted where so many more requests are more than `max_calls`; else counts them, if so told."""
        with self.lock:
            if self.max_calls and self.calls + calls > self.max_calls:
                raise Exhausted(
                    f"The reward {self.name!r}: {self.calls} of at most {self.max_calls} requests to {self.server.url}"
                    f" are used and {calls} more are needed: raise max_calls, or set it to 0 for no limit."
                )
            self.calls += calls if spend else 0

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self.server.fail(f"its option {name} must be a text, not {shown(repr(value))}.")
        return value

    def _fields(self, request: Any) -> dict[str, Any]:
        try:
            return json.loads(json.dumps(dict(request)))
        except (TypeError, ValueError):
            given = shown(repr(request))
            self.server.fail(f"its option request must be fields and their values, as in JSON, not {given}.")

    def _pattern(self, pattern: Any) -> regex.Pattern[str]:
        if len(self._text("pattern", pattern)) > MOST_PATTERN:
            self.server.fail(f"its pattern is longer than {MOST_PATTERN} characters.")
        try:
            return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            why = shown(str(error))
            self.server.fail(f"its pattern {shown(pattern, 60)!r} is not a regular expression ({why}).")

    def _bounds(self, low: Any, high: Any) -> tuple[float, float]:
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in (low, high))
        if not numbers or low >= high:
            self.server.fail(f"low must be a number below high, not {low!r} and {high!r}.")
        return float(low), float(high)
