"""What is distributed: the engine with its data and nothing else, and it runs where the repository is not."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import dgpo_core

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "dgpo_core", "nodes", "tests/helpers")
TRAINING = "--preset quickstart --iterations 1 --data.groups_per_iteration 1 --rollout.group_size 2 --name first"
FEW = "--evaluation.images 2 --evaluation.final_images 2 --output runs"


def test_the_distribution_holds_the_engine_alone() -> None:
    project = pytest.importorskip("tomllib", reason="Python 3.11").loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["version"] == dgpo_core.__version__
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["dgpo_core*"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": "requirements.txt"}


def test_no_requirement_is_pinned() -> None:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", line) for line in requirements)
    assert not any(line.startswith("torchaudio") for line in requirements)


def run(*arguments: str, folder: Path, path: str = "") -> str:
    """What Python prints with these arguments in a folder; it finds nothing but `path` and what is installed."""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes of a copy, with the build tools that are here."""
    if importlib.util.find_spec("build") is None or int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("The package build or setuptools 77 is missing: pip install -e '.[test]' 'setuptools>=77'.")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        there, here = ROOT / name, source / name
        here.parent.mkdir(exist_ok=True)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(there, here, ignore=ignore) if there.is_dir() else shutil.copy(there, here)
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), folder=source)
    (made,) = out.glob("*.whl")
    return made


@pytest.mark.slow
@pytest.mark.processes
def test_the_wheel_holds_the_engine_with_its_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dgpo_core"}
    folders = ("settings/presets", "people/web", "demo/model")
    data = [path for folder in folders for path in (ROOT / "dgpo_core" / folder).rglob("*") if path.is_file()]
    data += [ROOT / "dgpo_core" / "py.typed", *(ROOT / "dgpo_core" / "demo").glob("*.jsonl")]
    data = [path for path in data if "__pycache__" not in path.parts]
    data += (ROOT / "dgpo_core").rglob("*.py")
    assert {path.relative_to(ROOT).as_posix() for path in data} <= names


@pytest.mark.slow
@pytest.mark.processes
def test_the_installed_wheel_trains_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    target, folder = tmp_path / "target", tmp_path / "folder"
    folder.mkdir()
    install = ("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target), str(wheel))
    run(*install, folder=folder)
    where = run("-c", "import dgpo_core; print(dgpo_core.__file__)", folder=folder, path=str(target))
    assert Path(where.strip()).is_relative_to(target)
    run("-m", "dgpo_core.train", *TRAINING.split(), *FEW.split(), folder=folder, path=str(target))
    assert (folder / "runs" / "first" / "lora.safetensors").is_file()
