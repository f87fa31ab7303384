"""Where rewards look for their weights, and that what is missing is told before anything is drawn."""

import http.server
import shutil
import threading
from pathlib import Path

import pytest
import tiny_clip
import torch
from engine import write_quick

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import REWARDS, make_reward, require_reward, reward_class
from dgpo_core.rewards import weight_files as module
from dgpo_core.rewards.weight_files import Weights, find, look_in, require
from dgpo_core.train import main

FILE = Weights("owner/repo", "3 GB", file="model.pt", also=("other_name.pth",))
MODEL = Weights("owner/some-clip", "1 GB")


@pytest.fixture(autouse=True)
def _no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_folders", [])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder like ComfyUI's models/reward_models."""
    folder = tmp_path / "reward_models"
    folder.mkdir()
    look_in([tmp_path / "not there", folder])
    return folder


def test_the_option_goes_before_the_folder_and_the_folder_before_the_hub(models: Path) -> None:
    assert find(FILE) == "owner/repo"
    assert find(MODEL) == "owner/some-clip"
    (models / "other_name.pth").touch()
    assert find(FILE) == str(models / "other_name.pth")
    (models / "model.pt").touch()
    assert find(FILE) == str(models / "model.pt")
    (models / "some-clip").mkdir()
    assert find(MODEL) == str(models / "some-clip")
    assert find(MODEL, "/elsewhere") == "/elsewhere"


def test_a_model_in_the_folder_is_the_one_that_scores(models: Path) -> None:
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    folder = tiny_clip.save(models / "clip-vit-large-patch14")
    found = make_reward("clip_score").score(images, ["red", "blue"], [{}] * 2)
    shutil.move(folder, models / "moved")
    expected = make_reward("clip_score", {"path": str(models / "moved")}).score(images, ["red", "blue"], [{}] * 2)
    assert torch.equal(found, expected)


def test_what_is_missing_is_one_sentence_with_size_command_and_place(models: Path) -> None:
    look_in([models])
    with pytest.raises(UserError) as error:
        require(FILE, "", "mine")
    said = str(error.value)
    assert "Reward 'mine' needs owner/repo/model.pt (3 GB)" in said
    assert "`hf download owner/repo model.pt`" in said
    assert f"put it into {models} as model.pt" in said
    assert "option path" in said
    assert said.count(". ") == 0
    assert "\n" not in said


def test_what_is_here_is_not_asked_for(models: Path, tmp_path: Path) -> None:
    (models / "model.pt").touch()
    require(FILE, "", "mine")
    (tmp_path / "mine.pt").touch()
    require(FILE, str(tmp_path / "mine.pt"), "mine")
    with pytest.raises(UserError, match="there is no file"):
        require(FILE, str(tmp_path / "gone.pt"), "mine")
    with pytest.raises(UserError, match="there is no folder"):
        require(MODEL, str(tmp_path / "gone"), "mine")


def test_the_cache_counts_as_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of huggingface_hub's cache."""
    snapshot = tmp_path / "models--owner--repo" / "snapshots" / "a" / "model.pt"
    snapshot.parent.mkdir(parents=True)
    snapshot.touch()
    refs = tmp_path / "models--owner--repo" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a")
    real = module.try_to_load_from_cache
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda repo, file: real(repo, file, cache_dir=tmp_path))
    require(FILE, "", "mine")
    with pytest.raises(UserError, match=r"owner/some-clip \(1 GB\)"):
        require(MODEL, "", "mine")


class Hub(http.server.BaseHTTPRequestHandler):
    """Has owner/repo/model.pt and nothing else."""

    def do_HEAD(self) -> None:
        found = self.path.startswith("/owner/repo/") and self.path.endswith("/model.pt")
        self.send_response(200 if found else 404)
        for name, value in (("ETag", '"abc"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", "3")):
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.mark.slow
def test_what_the_hub_has_is_not_complained_of_and_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(module, "hf_hub_url", lambda repo, file: f"{address}/{repo}/resolve/main/{file}")
        require(FILE, "", "mine")  # a GET would be answered with 501
        with pytest.raises(UserError, match=r"needs owner/some-clip \(1 GB\).*404"):
            require(MODEL, "", "mine")
        server.shutdown()
    with pytest.raises(UserError, match=r"needs owner/repo/model.pt .* could not be downloaded \(.*refused"):
        require(FILE, "", "mine")


@pytest.mark.parametrize("name", [n for n in REWARDS if reward_class(n).weights])
def test_every_reward_with_weights_can_be_asked_before_it_is_loaded(name: str, models: Path) -> None:
    first = reward_class(name).weights[0]
    if reward_class(name).packages:
        pytest.importorskip(next(iter(reward_class(name).packages)))
    with pytest.raises(UserError, match=rf"'{name}' needs {first} \({first.size}\)"):
        require_reward(name)
    for weights in reward_class(name).weights:
        target = models / weights.names[0]
        target.touch() if weights.file else target.mkdir()
    require_reward(name)


def test_a_pickscore_folder_with_its_own_tokenizer_needs_no_other(models: Path, tmp_path: Path) -> None:
    folder = tiny_clip.save(tmp_path / "pick")
    require_reward("pickscore", {"path": str(folder)})
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        require_reward("pickscore", {"path": str(folder)})


def test_without_a_package_or_with_a_wrong_option_it_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match="pip install rapidocr onnxruntime"):
        require_reward("ocr")
    with pytest.raises(UserError, match="does not take these options"):
        require_reward("clip_score", {"pat": "x"})


# --- before the first groups -----------------------------------------------------------------------------------------


def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    import dgpo_core.method.rollout

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(dgpo_core.method.rollout, "noise", refuse)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("pickscore", r"needs yuvalkirstain/PickScore_v1 \(3.9 GB\)"),
        ("hpsv2", r"needs xswu/HPSv2/HPS_v2.1_compressed.pt"),
        ("ocr", r"'ocr' does not know what text to read for the prompt 'red'"),
        ("shapes", r'need "include" in the metadata of every prompt, .*; \'red\' has none'),
    ],
)
def test_a_training_tells_what_its_reward_lacks_before_anything_is_drawn(
    reward: str,
    says: str,
    sd3_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    if packages := reward_class(reward).packages:
        pytest.importorskip(next(iter(packages)))
    nothing_drawn(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(write_quick(tmp_path, sd3_folder, reward=reward)) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_held_out_prompts_are_checked_as_well(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rapidocr")
    nothing_drawn(monkeypatch)
    monkeypatch.chdir(tmp_path)
    arguments = write_quick(tmp_path, sd3_folder, reward="bright_ocr", evaluation={"reward": "ocr"})
    monkeypatch.setitem(REWARDS, "bright_ocr", "bright:Bright")
    assert main(arguments) == 2
    assert "does not know what text to read for the prompt 'blue red'" in capsys.readouterr().err
