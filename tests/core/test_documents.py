"""The pages say what is there: links, anchors, paths, commands and their options, and worked diffs that apply."""

import re
import runpy
import shutil
import subprocess
import sys
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgpo_core.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dgpo_core", "nodes", "tests", "workflows", ".github")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)
COMMAND = re.compile(r"-m (dgpo_core[\w.]*)([^\n`]*)")
PATH = re.compile(r"(?:dgpo_core|nodes|tests|workflows)/[\w./-]*")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", text)


def blocks(text: str, *kinds: str) -> list[str]:
    """The fenced blocks of these languages."""
    return [body for kind, body in FENCE.findall(text) if kind in kinds]


def inline(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings: small letters, no signs, hyphens for spaces."""
    found: list[str] = []
    for heading in HEADING.findall(prose(text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Every `-m dgpo_core...` of a page, its module and the rest of its line."""
    shell = "\n".join(blocks(text, "bash", "sh", "")).replace("\\\n", " ")
    for source in (shell, "\n".join(inline(text))):
        yield from COMMAND.findall(source)


# --- links and paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_link_and_anchor_leads_somewhere(name: str) -> None:
    broken = []
    for link in LINK.findall(prose(text_of(name))):
        target, _, anchor = urllib.parse.unquote(link).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        known = anchors(path.read_text(encoding="utf-8")) if anchor and path.suffix == ".md" and path.is_file() else ()
        if not path.exists() or (anchor and anchor not in known):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_every_path_of_the_repository_that_is_named_exists(name: str) -> None:
    words = [word for part in [*inline(text_of(name)), *blocks(text_of(name), "bash")] for word in part.split()]
    paths = [word.partition(":")[0] for word in words]
    assert [path for path in paths if PATH.fullmatch(path) and not (ROOT / path).exists()] == []


def test_the_readme_is_short_and_its_index_has_every_page() -> None:
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 200
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(prose(readme)) if ":" not in link}
    parts = (".github", "tests")
    missing = [page for page in PAGES if page.resolve() not in linked and page.relative_to(ROOT).parts[0] not in parts]
    assert [page.relative_to(ROOT).as_posix() for page in missing] == ["README.md"]


def test_the_tree_has_every_folder_and_no_file_that_is_gone() -> None:
    tree = blocks(text_of("ARCHITECTURE.md").partition("## The tree")[2], "")[0]
    folders = [path for top in FOLDERS[:3] for path in [ROOT / top, *(ROOT / top).iterdir()] if path.is_dir()]
    names = {path.name for path in folders if not path.name.startswith((".", "__"))}
    assert names - set(re.findall(r"^ *(\w+)/ ", f"{tree}\n".replace("/\n", "/ \n"), re.MULTILINE)) == set()
    files = re.findall(r"\w+\.py", tree)
    assert [file for file in files if not any((ROOT / place / file).exists() for place in (".", *FOLDERS))] == []


def test_the_least_comfyui_is_the_same_everywhere() -> None:
    least = re.search(r"LEAST_COMFYUI = \(([\d, ]+)\)", text_of("__init__.py"))[1].replace(", ", ".")
    assert f'requires-comfyui = ">={least}"' in text_of("pyproject.toml")
    assert f"Needs ComfyUI {least} or newer" in text_of("README.md")


# --- commands --------------------------------------------------------------------------------------------------------


def options_of(module: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The options that `python -m MODULE WORDS --help` prints."""
    before, sys.argv = sys.argv, [module, *words, "--help"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may be imported already
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        assert not stop.code  # noqa: PT017 - the help of some commands ends so
    except UserError as error:
        pytest.fail(f"{module} {' '.join(words)}: {error}")
    finally:
        sys.argv = before
    return set(re.findall(r"--[A-Za-z][\w.-]*", capsys.readouterr().out))


def test_every_command_and_option_that_is_named_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    named: dict[tuple[str, tuple[str, ...]], set[tuple[str, str]]] = {}
    for name in NAMES:
        for module, rest in commands(text_of(name)):
            words = rest.split()
            first = tuple(words[:1]) if module == "dgpo_core.prompts" and words and words[0].isalpha() else ()
            given = [word.partition("=")[0] for word in words if re.match(r"--[A-Za-z]", word)]
            named.setdefault((module, first), set()).update((name, option.rstrip(".,;:)")) for option in given)
    assert ("dgpo_core.train", ()) in named
    unknown = []
    for (module, first), given in named.items():
        known = {"--help", *options_of(module, first, capsys)}
        unknown += [f"{page}: {module} {option}" for page, option in sorted(given) if option not in known]
    assert unknown == []


# --- worked diffs ----------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
def test_the_worked_diffs_of_contributing_still_apply(tmp_path: Path) -> None:
    diffs = blocks(text_of("CONTRIBUTING.md"), "diff")
    assert len(diffs) >= 4
    for place in [*FOLDERS[:2], "tests", "README.md", "__init__.py", "pyproject.toml"]:
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "images", "cases")
        copy = shutil.copytree if (ROOT / place).is_dir() else shutil.copy
        copy(ROOT / place, tmp_path / place, **({"ignore": ignored} if (ROOT / place).is_dir() else {}))
    for diff in diffs:
        done = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, capture_output=True)
        assert not done.stderr
