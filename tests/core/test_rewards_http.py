"""The judge over HTTP, on loopback, with a server that misbehaves."""

import base64
import io
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from judge_server import Script, judges, says
from PIL import Image
from processes import free_port

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import make_reward

KEY = "sk-test-1234"
Start = Callable[..., Script]


@pytest.fixture
def judge() -> Iterator[Start]:
    with judges() as start:
        yield start


def test_the_judge_is_asked_as_openai_says(judge: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    script, images = judge(says("Fine.\nScore: 7")), torch.rand(1, 3, 6, 9)
    prompt = 'a {red} "cat", 100 %'
    assert script.score(images, [prompt], key_env="JUDGE_KEY", request={"max_tokens": 9}) == pytest.approx([0.7])
    (asked,), (sent,) = script.asked, script.sent
    assert (asked["path"], asked["model"], asked["max_tokens"]) == ("/v1/chat/completions", "m", 9)
    assert sent["Authorization"] == f"Bearer {KEY}"
    text, image = asked["messages"][0]["content"]
    assert prompt in text["text"]
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(found, (images[0] * 255).round().byte().permute(1, 2, 0).numpy())


def test_of_an_edit_the_judge_sees_the_source_and_then_the_image_and_is_asked_about_both(judge: Start) -> None:
    script, source, image = judge(says("Kept.\n6")), torch.zeros(3, 4, 4), torch.ones(1, 3, 6, 9)
    reward = make_reward("vlm_judge", {"url": script.url, "model": "m"})
    assert reward.score_edits(image, ["make it white"], [{}], [[source]]).tolist() == pytest.approx([0.6])
    text, before, after = script.asked[0]["messages"][0]["content"]
    assert "make it white" in text["text"]
    assert "as it was before" in " ".join(text["text"].split())
    pictures = [Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].split(",")[1]))) for p in (before, after)]
    assert [picture.size for picture in pictures] == [(4, 4), (9, 6)]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(0, 0, 0), (255, 255, 255)]


def test_jpeg_and_no_key(judge: Start) -> None:
    script = judge(says("3"))
    assert script.score(jpeg_quality=90, template="Rate {prompt}!") == pytest.approx([0.3])
    text, image = script.asked[0]["messages"][0]["content"]
    assert text["text"] == "Rate a cat!"
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert "Authorization" not in script.sent[0]
    assert script.asked[0]["temperature"] == 0


@pytest.mark.parametrize(
    ("text", "options", "score"),
    [
        ("7", {}, 0.7),
        ("I see 3 cats of 4.\n**Score: 8.5/10**", {}, 0.85),
        ("Score: 6 out of 10.", {}, 0.6),
        ("SD1.5 made 12 of them: Score-9.", {}, 0.9),
        ("<think>maybe 2</think>10/10", {}, 1.0),
        ("0", {}, 0.0),
        ("Score: **2**/10", {}, 0.2),
        ("Score: **2**/**10**", {}, 0.2),
        ("Final score: 3 (out of 10)", {}, 0.3),
        ("Score: 4 of 10", {}, 0.4),
        ("3 points out of 10", {}, 0.3),
        ("I rate it 2 on a scale from 0 to 10.", {}, 0.2),
        ("$\\boxed{3}/10$", {}, 0.3),
        ("Bewertung: 7,5", {}, 0.75),
        ("First 10, then 4", {}, 0.4),
        ("[[4]] of 5, 99 % sure", {"pattern": r"\[\[(\d)\]\]", "low": 1, "high": 5}, 0.75),
        ("yes 1", {"pattern": r"[01]", "high": 1}, 1.0),
        ("-1", {"low": -2, "high": 2}, 0.25),
    ],
)
def test_the_score_is_the_last_match(judge: Start, text: str, options: dict[str, Any], score: float) -> None:
    assert judge(says(text)).score(**options) == pytest.approx([score])


def test_every_image_gets_its_own_score_and_some_are_asked_at_once(judge: Start) -> None:
    script = judge(says("5"), delay=0.05)
    script.score(torch.rand(12, 3, 8, 8), ["a"] * 12, concurrency=4)
    assert 2 <= script.most <= 4
    assert len(script.asked) == 12
    script = judge(*[says(str(i)) for i in range(6)])
    assert script.score(torch.rand(6, 3, 8, 8), list("abcdef"), concurrency=1) == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    )
    assert script.score(torch.zeros(0, 3, 8, 8), []) == []


@pytest.mark.parametrize(
    "trouble",
    [(500, b"<html>"), (503, {}), (429, {}), (408, {}), (0, b""), says("no idea"), (200, b"{"), says("11"), says(None)],
)
def test_what_passes_is_waited_for(judge: Start, trouble: tuple[int, Any]) -> None:
    script = judge(trouble, trouble, says("4"))
    assert script.score() == pytest.approx([0.4])
    assert len(script.asked) == 3


@pytest.mark.parametrize(
    ("trouble", "says_", "tries"),
    [
        ((500, {"error": {"message": "CUDA\n out of memory."}}), r"answered 500 \(CUDA out of memory\)\.", 3),
        ((429, {"error": "slow down"}), r"answered 429 \(slow down\)\.", 3),
        ((401, {"error": {"message": f"bad key {KEY}"}}), r"answered 401 \(bad key \*\*\*\)\.", 1),
        ((404, b""), r"answered 404\.", 1),
        ((302, b""), r"answered 302\.", 1),
        ((0, b""), r"cannot be reached \(.+\)\.", 3),
        (says("no idea"), "wrote no score that the pattern finds: 'no idea'", 3),
        (says("Score: 11"), "gave the score 11, which is not from 0 to 10", 3),
        (says("7", finish_reason="length"), "cut its answer off", 3),
        (says(None), "answered without a text", 3),
        (says([{"text": "7"}]), "answered without a text", 3),
        ((200, b"<html>hello"), "did not answer with a chat completion", 3),
        ((200, [1]), "did not answer with a chat completion", 3),
        ((200, {"choices": []}), "did not answer with a chat completion", 3),
        ((200, {"choices": ["7"]}), "did not answer with a chat completion", 3),
        ((200, b" " * (17 << 20)), "sent more than 16 MB", 1),
    ],
)
def test_what_does_not_pass_is_told(
    judge: Start, monkeypatch: pytest.MonkeyPatch, trouble: tuple[int, Any], says_: str, tries: int
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    script = judge(trouble)
    told = script.complaint(key_env="JUDGE_KEY")
    counted = f" in {tries} tries" if tries > 1 else ""
    start = f"The reward 'vlm_judge': no score for sample 0 ('a cat'){counted}: the server {script.url} "
    assert told.startswith(start)
    assert re.search(says_, told.removeprefix(start))
    assert told.endswith(".")
    assert KEY not in told
    assert len(script.asked) == tries


def test_a_custom_pattern_that_finds_no_number(judge: Start) -> None:
    for text, pattern in (("good", "good"), ("x", "x(1)?"), ("nan", "nan")):
        assert "is no number" in judge(says(text)).complaint(pattern=pattern)


def test_the_sample_that_failed_is_named_and_the_others_stop(judge: Start) -> None:
    script = judge(says("5"), says("5"), (400, {"error": "no"}), says("5"))
    told = script.complaint(prompts=[f"p{i}" for i in range(9)], images=torch.rand(9, 3, 8, 8), concurrency=1)
    assert "sample 2 ('p2')" in told
    assert len(script.asked) <= 4


def test_a_slow_server(judge: Start) -> None:
    script = judge(says("5"), delay=5)
    start = time.monotonic()
    assert "in 2 tries: the server" in (told := script.complaint(timeout=0.1, retries=1))
    assert told.endswith("did not answer within 0.1 s.")
    assert time.monotonic() - start < 4


def test_an_answer_that_never_ends(judge: Start) -> None:
    start = time.monotonic()
    assert "did not answer within 0.2 s" in judge(says("5"), drip=0.1).complaint(timeout=0.2, retries=0)
    assert time.monotonic() - start < 4  # it would take 8 s


def test_a_proxy_is_not_for_this_machine(judge: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert judge(says("5")).score() == [0.5]
    assert "cannot be reached" in Script([], url="http://judge.invalid").complaint(retries=0)


def test_nobody_listens() -> None:
    script = Script([], url=f"http://127.0.0.1:{free_port()}")
    assert script.complaint().endswith("cannot be reached (connection refused).")


@pytest.mark.slow
def test_the_wait_grows_and_the_server_may_ask_for_a_longer_one(judge: Start) -> None:
    start = time.monotonic()
    judge((500, b""), (500, b""), says("5")).score(backoff=0.1)
    assert time.monotonic() - start > 0.2  # 0.1 + 0.2, a quarter less or more
    start = time.monotonic()
    judge((429, b""), says("5"), headers={"Retry-After": "1"}).score()
    assert time.monotonic() - start >= 1


def test_the_cap_counts_every_request(judge: Start) -> None:
    script = judge((500, b""), says("5"))
    options = {"url": script.url, "model": "m", "backoff": 0.01, "max_calls": 5, "concurrency": 1}
    reward = make_reward("vlm_judge", options)
    images = torch.rand(3, 3, 8, 8)
    assert reward.score(images, ["a"] * 3, [{}] * 3).tolist() == pytest.approx([0.5] * 3)  # 4 requests
    with pytest.raises(
        UserError, match=r"4 of at most 5 requests to http\S+ are used and 3 more are needed: raise max_"
    ):
        reward.score(images, ["a"] * 3, [{}] * 3)
    assert len(script.asked) == 4
    assert "2 of at most 2 requests" in judge((500, b"")).complaint(max_calls=2)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"url": ""}, "needs a server: name it in its options"),
        ({"endpoint": "x"}, "give either endpoint"),
        ({"timeout": 1e18}, "timeout must be a number above 0 and at most 86400"),
        ({"concurrency": 10**18}, "concurrency must be a whole number of at least 1 and at most 256"),
        ({"retries": 10**18}, "retries must be a whole number of at least 0 and at most 1000"),
        ({"pattern": "a" * 2000}, "longer than 1000 characters"),
        ({"pattern": "(" * 900}, "not a regular expression"),
        ({"url": "ftp://x"}, "url must be"),
        ({"url": "http://me:geheim@x"}, "url must be"),
        ({"url": "http://x:99999"}, "url must be"),
        ({"model": ""}, "model must be a text"),
        ({"key_env": "sk-geheim"}, "environment variable"),
        ({"pattern": "("}, "not a regular expression"),
        ({"low": 5, "high": 5}, "low must be a number below high"),
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1"),
        ({"retries": 1.5}, "retries must be a whole"),
        ({"timeout": 0}, "timeout must be a number above 0"),
        ({"backoff": float("nan")}, "backoff must be"),
        ({"max_calls": -1}, "max_calls must be"),
        ({"jpeg_quality": 100}, "jpeg_quality must be 0 to 95"),
        ({"request": 3}, "request must be fields"),
        ({"key": "x"}, "does not take these options"),
    ],
)
def test_wrong_options(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        make_reward("vlm_judge", {"url": "http://127.0.0.1:1", "model": "m", **options})
    assert "'vlm_judge'" in str(error.value)
    assert "geheim" not in str(error.value)
