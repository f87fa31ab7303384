"""`--reward human`: the page, its token, a browser that ranks, and a run that never asks twice."""

import io
import json
import os
import re
import signal
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from comfy_browser import chromium_or_skip
from engine import write_quick
from PIL import Image, ImageStat
from processes import finish, free_port, start, train_together, wait_for

from dgpo_core import train
from dgpo_core.people.gallery import read_gallery

pytestmark = pytest.mark.slow

OPEN = ".dgpo-ranker[open]"
CHANGES: dict[str, Any] = {"reward": "human", "iterations": 2, "evaluation": {"every": 0}}
BEST_FIRST = [{"ranking": [[2], [0, 1], [3]]}, {"ranking": [[1]], "worst": [3]}]


class Run:
    """A training that asks, in a process and a folder of its own."""

    def __init__(self, folder: Path, model: Path, **changes: Any) -> None:
        self.folder = folder
        human = {"port": 0, **changes.pop("human", {})}
        self.argv = write_quick(folder, model, **{**CHANGES, "human": human, **changes})
        self.process: BaseProcess | None = None

    def start(self, *options: str) -> None:
        self.process = start(self.folder, [*self.argv, *options])

    def told(self) -> str:
        path = self.folder / "output-0.txt"
        return path.read_text() if path.exists() else ""

    def url(self) -> str:
        """The address that was printed last, once it is."""
        before = self.asked
        wait_for(lambda: len(self._urls()) > before, self.process)
        urls = self._urls()
        assert len(urls) > before, self.told()
        self.asked = len(urls)
        return urls[-1]

    asked = 0

    def _urls(self) -> list[str]:
        return re.findall(r"Open (http://127\.0\.0\.1:\d+/\?token=\S+)", self.told())

    def answers(self) -> list[dict[str, Any]]:
        path = self.folder / "runs/test/asked/answers.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs/test/metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path, sd3_folder: Path) -> Iterator[Run]:
    made = Run(tmp_path, sd3_folder)
    yield made
    if made.process and made.process.is_alive():
        made.process.kill()
        finish(made.process)


def fetch(url: str, path: str = "", body: bytes | None = None, token: str | None = None) -> tuple[int, bytes]:
    """Status and content of `path` on the page's server, with the page's token or another."""
    parts = urllib.parse.urlsplit(url)
    query = parts.query if token is None else f"token={token}"
    request = urllib.request.Request(f"{parts.scheme}://{parts.netloc}/{path}?{query}", body)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def question(url: str) -> dict[str, Any]:
    """The one that is open, once there is one."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        (*_, found) = [None, *json.loads(fetch(url, "questions")[1])["questions"]]
        if found:
            return found
        time.sleep(0.05)
    raise TimeoutError


def answer(url: str, groups: list[dict[str, Any]] = BEST_FIRST) -> dict[str, Any]:
    """Answers the open question; returns it."""
    asked = question(url)
    status, said = fetch(url, f"questions/{asked['token']}", json.dumps({"groups": groups}).encode())
    assert status == 200, said
    return asked


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_an_answer_trains_and_what_was_asked_is_a_folder_to_train_on(run: Run) -> None:
    run.start()
    url = run.url()
    for _ in range(2):
        asked = answer(url)
    status, image = fetch(url, f"images/{asked['groups'][0]['images'][0]['filename']}")
    assert finish(run.process) == 0, run.told()
    assert [record["informative"] for record in run.records()] == [1.0, 1.0]
    assert all(record["grad_norm"] > 0 for record in run.records())
    assert not any("held_out" in record for record in run.records())  # nobody to measure by
    summary = json.loads((run.folder / "runs/test/summary.json").read_text())
    assert summary.keys() == {"reward", "seconds", "iterations"}
    assert len(list((run.folder / "runs/test/samples").iterdir())) == 2
    gallery = read_gallery(run.folder / "runs/test/asked")
    assert [group.scores for group in gallery.groups] == [(0.0, 0.0, 1.0, -1.0), (0.0, 1.0, 0.0, -1.0)] * 2
    assert gallery.notes == ()
    assert (status, image[:4]) in ((200, b"\x89PNG"), (404, image[:4]))  # the question may be closed by then


@pytest.mark.processes
def test_without_the_token_nothing_is_told(run: Run) -> None:
    run.start()
    url = run.url()
    asked = question(url)
    name = asked["groups"][0]["images"][0]["filename"]
    good = json.dumps({"groups": BEST_FIRST}).encode()
    for token in ("", "wrong", "%C3%A9"):
        for path, body in (("", None), ("questions", None), (f"images/{name}", None), ("questions/x", good)):
            status, said = fetch(url, path, body, token)
            assert status == 403
            assert "token is missing or wrong" in json.loads(said)["error"]
        assert fetch(url, f"questions/{asked['token']}", good, token)[0] == 403
    assert question(url) == {**asked, "seconds_left": None}
    assert run.answers() == []
    status, image = fetch(url, f"images/{name}")
    assert (status, image[:4]) == (200, b"\x89PNG")
    for other in ("images/answers.jsonl", "images/..%2Fconfig.yaml", "config.yaml", "images/"):
        assert fetch(url, other)[0] == 404
    for body in (b"{", b"[]", b'{"groups": []}', b"\xff"):
        status, said = fetch(url, f"questions/{asked['token']}", body)
        assert status == 400
        assert json.loads(said)["error"].endswith(".")
    assert fetch(url, "questions/another", good)[0] == 404
    assert fetch(url, f"questions/{asked['token']}", b" " * (2**20 + 1))[0] == 403


@pytest.mark.processes
def test_an_answer_that_was_given_before_a_kill_is_not_asked_again(run: Run, tmp_path: Path, sd3_folder: Path) -> None:
    """Killed with the second question open; the run that goes on asks only that one, and ends like one undisturbed."""
    run.argv += ["--checkpoint.every", "100"]
    run.start()
    url = run.url()
    first = answer(url)
    wait_for(lambda: len(_files(run, "*.png")) == 16, run.process)
    second = question(url)
    run.process.kill()
    assert finish(run.process) == -signal.SIGKILL
    assert [len(line["images"]) for line in run.answers()] == [4, 4]

    run.start("--resume")
    again = answer(run.url())
    assert again["groups"] == second["groups"] != first["groups"]
    assert finish(run.process) == 0, run.told()
    assert len(run.answers()) == 4

    whole = Run(tmp_path / "whole", sd3_folder)
    whole.argv += ["--checkpoint.every", "100"]
    whole.start()
    url = whole.url()
    for _ in range(2):
        answer(url)
    assert finish(whole.process) == 0, whole.told()
    assert _lora(run) == _lora(whole)


def _files(run: Run, pattern: str) -> list[Path]:
    return [path for path in run.folder.glob(f"runs/test/asked/{pattern}") if not path.name.startswith(".")]


def _lora(run: Run) -> bytes:
    return (run.folder / "runs/test/lora.safetensors").read_bytes()


@pytest.mark.processes
def test_ctrl_c_while_it_waits_ends_at_once_with_a_checkpoint(run: Run) -> None:
    run.start()
    url = run.url()
    answer(url)
    question(url)
    asked = time.monotonic()
    os.kill(run.process.pid, signal.SIGINT)
    assert finish(run.process) == 130, run.told()
    assert time.monotonic() - asked < 20  # the wait ends in 0.2 s; the rest is Python's own end on a busy machine
    assert "Stopped after iteration 1 of 2; --resume goes on from there." in run.told()
    assert [path.name for path in (run.folder / "runs/test/checkpoints").iterdir()] == ["step_000001.safetensors"]


@pytest.mark.processes
def test_when_time_runs_out_nothing_is_learned_and_it_is_not_asked_again(run: Run) -> None:
    run.start("--human.timeout", "0.5")
    assert finish(run.process) == 0, run.told()
    assert [record["informative"] for record in run.records()] == [0.0, 0.0]
    assert [record["grad_norm"] for record in run.records()] == [0.0, 0.0]
    assert [line["skip"] for line in run.answers()] == [True] * 4


def test_a_port_that_is_taken_is_told(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from dgpo_core.people.questions import Questions
    from dgpo_core.people.server import AskingServer

    monkeypatch.chdir(run.folder)
    server = AskingServer(Questions(lambda event, data: None), run.folder, 0)
    try:
        port = server.server_address[1]
        assert train.main([*run.argv, "--human.port", str(port)]) == 2
    finally:
        server.close()
    told = capsys.readouterr().err
    assert f"error: Cannot listen on port {port} of 127.0.0.1" in told
    assert "--human.port" in told


@pytest.mark.processes
def test_pairs_are_asked_one_after_the_other_and_train(run: Run) -> None:
    run.start("--human.mode", "pairs", "--human.pairs", "4", "--iterations", "1")
    url = run.url()
    asked = question(url)
    assert [group["pairs"] for group in asked["groups"]] == [4, 4]
    address, groups = f"questions/{asked['token']}", []
    for group in range(2):
        pairs: list[list[Any]] = []
        while pair := _next(url, address, group, pairs)["pair"]:
            pairs.append([min(pair), ">", max(pair)])
        groups.append({"pairs": pairs})
    scores = _next(url, address, 1, groups[1]["pairs"])["scores"]
    for wrong in ([], {"group": 2, "pairs": []}, {"group": 0}, {"group": 0, "pairs": [[0, ">", 4]]}):
        status, said = fetch(url, f"{address}/next", json.dumps(wrong).encode())
        assert status == 400
        assert json.loads(said)["error"].endswith(".")
    assert fetch(url, "questions/another/next", b"{}")[0] == 404
    assert fetch(url, f"{address}/next", b"{}", "wrong")[0] == 403
    answer(url, groups)
    assert finish(run.process) == 0, run.told()
    assert [line["pairs"] for line in run.answers()] == [group["pairs"] for group in groups]
    assert all(len(group["pairs"]) == 4 for group in groups)
    assert run.records()[0]["informative"] == 1
    assert read_gallery(run.folder / "runs/test/asked").groups[1].scores == tuple(scores)


def _next(url: str, address: str, group: int, pairs: list[list[Any]]) -> dict[str, Any]:
    status, said = fetch(url, f"{address}/next", json.dumps({"group": group, "pairs": pairs}).encode())
    assert status == 200, said
    return json.loads(said)


@pytest.mark.processes
def test_with_a_taste_you_are_asked_less_and_the_watch_goes_on(run: Run) -> None:
    """Somebody likes it bright; after 8 answers nobody is asked any more."""
    watched = ("--evaluation.every", "4", "--evaluation.images", "4", "--evaluation.reward", "brightness")
    run.start("--human.taste", "--human.answers", "8", "--iterations", "8", *watched)
    url, asked = run.url(), 0
    while asked < 8:
        for open_ in json.loads(fetch(url, "questions")[1])["questions"]:
            answer(url, [_brightest_first(url, group["images"]) for group in open_["groups"]])
            asked += len(open_["groups"])
        time.sleep(0.05)
    assert finish(run.process) == 0, run.told()
    by = [line.get("by", "") for line in run.answers()]
    assert (by.count(""), by.count("taste")) == (8, 8)
    assert "You have answered your 8 groups; the taste goes on alone" in run.told()
    assert (run.folder / "runs/test/asked/taste.safetensors").exists()
    looks = [record["iteration"] for record in run.records() if "watch/entropy" in record]
    assert looks == [0, 4, 8]


def _brightest_first(url: str, images: list[dict[str, str]]) -> dict[str, Any]:
    means = [ImageStat.Stat(Image.open(io.BytesIO(fetch(url, f"images/{i['filename']}")[1]))).sum for i in images]
    order = sorted(range(len(images)), key=lambda i: -sum(means[i]))
    return {"ranking": [[i] for i in order]}


@pytest.mark.processes
def test_several_processes_are_refused(run: Run) -> None:
    assert train_together(run.folder, run.argv, 2) == [2, 2]
    assert "error: The reward human asks one person about all images: start the training as one process." in run.told()


def test_people_measure_nothing(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(run.folder)
    assert train.main([*run.argv, "--evaluation.reward", "human"]) == 2
    assert "evaluation.reward is human: name one that can score images by itself." in capsys.readouterr().err


def test_it_listens_on_this_machine_alone(tmp_path: Path) -> None:
    from dgpo_core.people.questions import Questions
    from dgpo_core.people.server import AskingServer

    port = free_port()
    server = AskingServer(Questions(lambda event, data: None), tmp_path, port)
    try:
        assert server.server_address == ("127.0.0.1", port)
        assert server.url.startswith(f"http://127.0.0.1:{port}/?token=")
        assert len(server.token) >= 20
    finally:
        server.close()


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A Chromium of this test's own, or a skip that says why there is none."""
    with chromium_or_skip() as browser:
        yield browser


def picture(page: Any, name: str) -> None:
    """With DGPO_SCREENSHOTS, a folder: what is seen."""
    folder = os.environ.get("DGPO_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(300)
        page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.mark.processes
def test_keys_rank_in_a_browser_and_the_training_goes_on(run: Run, chromium: Any) -> None:
    run.start()
    url = run.url()
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    wrong: list[str] = []
    page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    for n in range(2):
        page.wait_for_selector(OPEN)
        for key in ("3", "1", "t", "2", "4"):
            page.keyboard.press(key)
        assert page.locator(f"{OPEN} .dgpo-badge").all_inner_texts() == ["2", "2", "1", "3"]
        picture(page, f"headless_rank_{n}")
        page.keyboard.press("Enter")
        assert page.get_by_text("Group 2 of 2").is_visible()
        page.keyboard.press("s")
        page.wait_for_selector(OPEN, state="detached")
        picture(page, f"headless_wait_{n}")
    assert finish(run.process) == 0, run.told()
    assert [{k: line.get(k) for k in ("ranking", "skip")} for line in run.answers()] == [
        {"ranking": [[2], [0, 1], [3]], "skip": None},
        {"ranking": None, "skip": True},
    ] * 2
    assert [record["informative"] for record in run.records()] == [0.5, 0.5]
    page.get_by_text("The training has ended, or cannot be reached.").wait_for()
    assert [text for text in wrong if "ERR_CONNECTION" not in text] == []  # the server goes with the run


@pytest.mark.processes
def test_a_touch_marks_on_a_phone_and_a_wrong_token_shows_nothing(run: Run, chromium: Any) -> None:
    run.start("--human.mode", "thumbs", "--iterations", "1")
    url = run.url()
    phone = chromium.new_page(viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)
    assert phone.goto(url[:-3]).status == 403
    phone.goto(url)
    phone.wait_for_selector(OPEN)
    images = phone.locator(f"{OPEN} .dgpo-pick")
    images.nth(3).tap()
    phone.get_by_role("button", name="Image 1 is bad").tap()
    picture(phone, "headless_phone")
    phone.get_by_role("button", name="Confirm").tap()
    phone.get_by_text("Group 2 of 2").wait_for()
    phone.get_by_role("button", name="Skip group").tap()
    assert finish(run.process) == 0, run.told()
    assert run.answers()[0]["thumbs"] == [-1, 0, 0, 1]
