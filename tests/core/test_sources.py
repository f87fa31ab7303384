"""Pictures that prompts bring: how they are read, what is wrong with them, and where they are shown."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.pictures import grid
from dgpo_core.common.prompts import Prompt, load_prompts
from dgpo_core.common.source import Source
from dgpo_core.people.ask import ask
from dgpo_core.people.gallery import read_gallery
from dgpo_core.people.picture_file import read_picture
from dgpo_core.people.questions import OPENED, Questions
from dgpo_core.rewards import Reward, guard, make_reward, score_groups

RED = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8).contiguous()


def written(folder: Path, *lines: dict[str, object]) -> Path:
    """A prompt file, and beside it a picture in a folder: 6 pixels wide, 4 high, blue."""
    (folder / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (6, 4), (0, 0, 255)).save(folder / "pictures" / "blue.png")
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_line_brings_its_picture_by_a_path_from_the_prompt_file(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "image": "pictures/blue.png", "more": 1}, {"prompt": "b", "images": ["pictures/blue.png"]}]
    one, other = load_prompts(written(tmp_path, *lines, {"prompt": "c"}, {"prompt": "d", "image": None}))[:2]
    assert one.metadata == {"more": 1}
    assert one.sources == other.sources
    (source,) = one.sources
    assert source.size == (4, 6)
    assert torch.equal(source.image(), torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, 4, 6))


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "turned.tif"])
def test_a_picture_is_read_the_right_way_up(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (6, 4)).save(tmp_path / name, exif=exif)
    source = Source.of_file(tmp_path / name, "p.jsonl:1")
    assert source.size == tuple(source.image().shape[-2:]) == (6, 4)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("xmp", [False, True])
def test_a_png_is_turned_wherever_it_says_so(tmp_path: Path, xmp: bool, behind: bool) -> None:
    exif, texts = Image.Exif(), PngInfo()
    if xmp:
        texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    else:
        exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png", exif=exif, pnginfo=texts)
    if behind:
        (tmp_path / "a.png").write_bytes(pixels_first((tmp_path / "a.png").read_bytes()))
    source = Source.of_file(tmp_path / "a.png", "p.jsonl:1")
    assert source.size == tuple(source.image().shape[-2:]) == (6, 4)
    told = read_picture(tmp_path / "a.png")
    assert (told.height, told.width) == (6, 4)


def pixels_first(png: bytes) -> bytes:
    """With the chunks before the pixels moved behind them, but for the head."""
    place, chunks = 8, []
    while place < len(png):
        length = 12 + int.from_bytes(png[place : place + 4], "big")
        chunks.append(png[place : place + length])
        place += length
    order = {b"IHDR": 0, b"IDAT": 1, b"IEND": 3}
    return png[:8] + b"".join(sorted(chunks, key=lambda chunk: order.get(chunk[4:8], 2)))


def test_a_grey_picture_of_16_bits_keeps_its_greys(tmp_path: Path) -> None:
    ramp = np.linspace(0, 2**16 - 1, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    grey = Source.of_file(tmp_path / "depth.png", "p.jsonl:1").image()
    assert torch.equal(grey[0], torch.from_numpy(ramp >> 8).float() / 255)
    assert torch.equal(grey[0], grey[2])


def test_a_picture_whose_numbers_have_no_white_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "depth.tif")
    source = Source.of_file(tmp_path / "depth.tif", "p.jsonl:1")
    with pytest.raises(UserError, match=r"depth\.tif cannot be read \(its brightness is in numbers that have no white"):
        source.image()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "gone.png"}, r"edits\.jsonl:1: there is no picture .*gone\.png: paths are relative to"),
        ({"image": "edits.jsonl"}, r"edits\.jsonl:1: the picture .* cannot be read \("),
        ({"image": "pictures"}, r"edits\.jsonl:1: the picture .*pictures cannot be read"),
        ({"image": "../x.png"}, r"edits\.jsonl:1: the picture \.\./x\.png must be beside the prompt file"),
        ({"image": "/etc/x.png"}, r"edits\.jsonl:1: the picture /etc/x\.png must be beside the prompt file"),
        ({"image": "C:\\x.png"}, r"edits\.jsonl:1: the picture C:\\x\.png must be beside"),
        ({"image": 3}, r'edits\.jsonl:1: "image" must be the path of a picture'),
        ({"images": ["pictures/blue.png", ""]}, r'edits\.jsonl:1: "image" must be the path of a picture'),
        ({"image": "a.png", "images": ["b.png"]}, r'edits\.jsonl:1: has both "image" and "images"'),
    ],
)
def test_a_source_that_is_none_is_told_with_file_and_line(
    tmp_path: Path, line: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(written(tmp_path, {"prompt": "a", **line}))


def test_a_picture_that_was_cut_short_is_told_with_file_and_line_when_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a", "image": "cut.png"})
    noisy = (torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    Image.fromarray(noisy.numpy()).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:4000])
    (prompt,) = load_prompts(path)
    with pytest.raises(UserError, match=r"edits\.jsonl:1: the picture .*cut\.png cannot be read"):
        prompt.sources[0].image()


# --- rewards ---------------------------------------------------------------------------------------------------------


def group(sources: tuple[Source, ...], images: torch.Tensor) -> Group:
    n = len(images)
    return Group(Prompt("make it red", {}, "p.jsonl:2", sources), tuple(range(n)), torch.zeros(n, 1, 1, 1), images)


class Looks(Reward):
    """The mean of the first source."""

    def score(self, images: torch.Tensor, prompts: object, metadata: object) -> torch.Tensor:
        raise AssertionError("not where sources are looked at")

    def score_edits(self, images: torch.Tensor, prompts: object, metadata: object, sources: object) -> torch.Tensor:
        return torch.tensor([float(of[0].mean()) if of else -1.0 for of in sources])


class Old(Reward):
    """As rewards were before there were sources."""

    def score(self, images: torch.Tensor, prompts: object, metadata: object) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


def test_a_reward_sees_the_sources_of_each_image_and_one_without_that_method_scores_as_before() -> None:
    groups = [group((Source.of_pixels(RED),), torch.ones(2, 3, 8, 8)), group((), torch.zeros(1, 3, 8, 8))]
    scored = score_groups(groups, {"looks": Looks(), "old": Old()})
    assert torch.cat([g.scores["looks"] for g in scored]).tolist() == pytest.approx([1 / 3, 1 / 3, -1.0])
    assert torch.cat([g.scores["old"] for g in scored]).tolist() == [1.0, 1.0, 0.0]


def test_a_reward_that_needs_a_source_refuses_a_prompt_without_one_before_anything_is_drawn() -> None:
    bare = Prompt("make it red", {}, "p.jsonl:2")
    with pytest.raises(UserError, match=r"^p\.jsonl:2: the reward 'similarity' compares with a source picture, and"):
        guard.check_prompts({"similarity": make_reward("similarity")}, [bare])
    guard.check_prompts({"similarity": make_reward("similarity")}, [replace(bare, sources=(Source.of_pixels(RED),))])


def test_similarity_is_one_for_the_source_and_less_for_other_structure_and_other_colours() -> None:
    source = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(source[None], 9, 1, 4)[0]
    tinted = (source * torch.tensor([1.0, 1.0, 0.5])[:, None, None]).clamp(0, 1)
    images = torch.stack([source, tinted, blurred, 1 - source])
    (scored,) = score_groups([group((Source.of_pixels(source),), images)], {"s": make_reward("similarity")})
    same, tint, blur, negative = scored.scores["s"].tolist()
    assert same == pytest.approx(1.0, abs=1e-5)
    assert 1 - 1e-3 > tint > blur > negative
    colors_alone = make_reward("similarity", {"structure": 0.0})
    black = group((Source.of_pixels(torch.zeros(3, 8, 8)),), torch.ones(1, 3, 8, 8))
    (by_color,) = score_groups([black], {"s": colors_alone})
    assert by_color.scores["s"].tolist() == pytest.approx([0.0], abs=1e-6)  # black and white are farthest apart


def test_similarity_takes_a_source_of_another_size() -> None:
    large = torch.nn.functional.interpolate(RED[None], scale_factor=4)[0]
    (scored,) = score_groups([group((Source.of_pixels(large),), RED[None])], {"s": make_reward("similarity")})
    assert scored.scores["s"].tolist() == pytest.approx([1.0], abs=1e-5)


# --- where they are shown --------------------------------------------------------------------------------------------


def test_the_sheet_of_pictures_shows_the_source_before_its_group() -> None:
    plain = grid([group((), torch.zeros(2, 3, 8, 8))], "t")
    sheet = grid([group((Source.of_pixels(RED),), torch.zeros(2, 3, 8, 8))], "t")
    tile = (sheet.width - plain.width) - 6
    assert sheet.getpixel((6 + tile // 2, sheet.height // 2)) == (255, 0, 0)
    assert sheet.getpixel((6 + tile + 6 + tile // 2, sheet.height // 2)) == (0, 0, 0)


def test_what_people_say_of_edits_is_a_folder_to_train_on(tmp_path: Path) -> None:
    made = group((Source.of_pixels(RED),), torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]))
    answering: list[Questions] = []

    def notify(event: str, data: Mapping[str, Any]) -> None:
        if event == OPENED:
            answering[0].answer(data["token"], {"groups": [{"ranking": [[1]]}]})

    answering.append(Questions(notify))
    ask(answering[0], [made], ["k"], tmp_path, {}, mode="rank", pairs=0, timeout_s=0, check=lambda: None)
    (found,) = read_gallery(tmp_path).groups
    assert [path.name for path in found.files] == ["k-0.png", "k-1.png"]
    assert torch.equal(found.sources[0].image(), RED)


def test_the_person_who_ranks_is_shown_the_source(tmp_path: Path) -> None:
    told: list[dict[str, object]] = []

    def notify(event: str, data: dict[str, object]) -> None:
        told.append(data)

    def stop() -> None:
        raise KeyboardInterrupt

    made = group((Source.of_pixels(RED),), torch.zeros(2, 3, 8, 8))
    with pytest.raises(KeyboardInterrupt):
        ask(Questions(notify), [made], ["k"], tmp_path, {}, mode="rank", pairs=0, timeout_s=0, check=stop)
    (shown,) = told[0]["groups"]
    assert [one["filename"] for one in shown["sources"]] == ["k-source-0.png"]
    assert [one["filename"] for one in shown["images"]] == ["k-0.png", "k-1.png"]
    with Image.open(tmp_path / "k-source-0.png") as saved:
        assert saved.getpixel((0, 0)) == (255, 0, 0)
