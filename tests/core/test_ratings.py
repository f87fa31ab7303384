"""Ratings in the forms of other programs, what is foreign in a folder of pictures, and pictures of another shape."""

import errno
import json
import os
from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image
from rated_folder import comfy_chunks, comfy_graph, groups, paint

from dgpo_core.common.errors import UserError
from dgpo_core.people import picture_file
from dgpo_core.people.gallery import read_gallery

FOXES = [("a fox", ["a.png", "b.png", "c.png"], [4.0, 2.0, 3.5])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the pictures are."""
    (tmp_path / "art").mkdir()
    return tmp_path / "art"


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        b"file;rating;prompt\na.png;4,0;a fox\nb.png;2;a fox\nc.png;3,5;a fox\n",
        b"\xef\xbb\xbfsep=;\r\nFile;Rating;Prompt\r\na.png;4;a fox\r\nb.png;2;a fox\r\nc.png;3,5;a fox\r\n",
        b"file\trating\tprompt\na.png\t4\ta fox\nb.png\t2\ta fox\nc.png\t3.5\ta fox\n",
        "file\trating\tprompt\na.png\t4\ta fox\nb.png\t2\ta fox\nc.png\t3.5\ta fox\n".encode("utf-16"),
        b"file;rating;prompt\ra.png;4,0;a fox\rb.png;2;a fox\rc.png;3,5;a fox\r",  # Excel's CSV (Macintosh)
        b"file,rating,prompt,,\na.png,4,a fox,,\nb.png,2,a fox,,\nc.png,3.5,a fox,,,\n",
    ],
)
def test_tables_of_spreadsheets_are_read(folder: Path, table: bytes) -> None:
    for name in "abc":
        paint(folder / f"{name}.png")
    (folder / "mine.csv").write_bytes(table)
    assert groups(folder) == FOXES


def test_a_table_in_another_encoding_is_told_and_a_foreign_one_left_out(folder: Path) -> None:
    (folder / "x.csv").write_bytes("file;rating;prompt\na.png;4;ein grüner Fuchs\n".encode("cp1252"))
    with pytest.raises(UserError, match="x.csv cannot be read: it is not UTF-8 text; save it as CSV UTF-8"):
        read_gallery(folder)
    (folder / "x.csv").write_bytes("Straße;Größe\n".encode("cp1252"))
    with pytest.raises(UserError, match="There is nothing to learn from in .*x.csv is no table of ratings"):
        read_gallery(folder)


@pytest.mark.parametrize("name", [".trash", "$RECYCLE.BIN", "@eaDir", "__MACOSX", "Thumbs", "sub/.Trash-1000/files"])
def test_bins_are_left_out_also_where_a_table_names_them(folder: Path, name: str) -> None:
    for path in ("a.png", "b.png", f"{name}/c.png"):
        paint(folder / path, "a fox")
    (folder / "all.csv").write_text(f"file,rating\na.png,4\nb.png,2\n{name}/c.png,1\n")
    assert groups(folder) == [("a fox", ["a.png", "b.png"], [4.0, 2.0])]
    notes = read_gallery(folder).notes
    assert notes[0].startswith("Left out: 1 image in hidden folders and bins (")
    assert notes[1].endswith("c.png is in a hidden folder or bin.")


def test_a_hidden_folder_that_is_asked_for_is_read(tmp_path: Path) -> None:
    folder = tmp_path / ".art"
    for name, rating in (("a", 4), ("b", 2)):
        paint(folder / f"{name}.png", "a fox")
        (folder / f"{name}.json").write_text(json.dumps({"rating": rating}))
    assert groups(folder) == [("a fox", ["a.png", "b.png"], [4.0, 2.0])]


def test_ratings_that_contradict_each_other_are_told(folder: Path) -> None:
    for name in "abcd":
        paint(folder / f"{name}.png", "a fox")
    (folder / "one.csv").write_text("file,rating\na.png,1\nb.png,2\nc.png,3\nc.png,3\nd.png,4\n")
    (folder / "two.csv").write_text("file,rating\na.png,5\nb.png,2\n")
    (folder / "d.json").write_text('{"rating": 1}')
    assert groups(folder) == [("a fox", ["b.png", "c.png", "d.png"], [2.0, 3.0, 1.0])]
    told = "\n".join(read_gallery(folder).notes)
    assert f"Left out: {folder / 'a.png'} is rated 1 in {folder / 'one.csv'}:2 and 5 in {folder / 'two.csv'}:2." in told
    assert (
        f"{folder / 'd.png'} is rated 1 in {folder / 'd.json'}, which counts, and 4 in {folder / 'one.csv'}:6." in told
    )


STARS = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description {} /></x:xmpmeta>'


def test_stars_are_read_from_sidecars_and_from_the_pictures(folder: Path) -> None:
    for name in "abcdef":
        paint(folder / f"{name}.png", "a fox")
    (folder / "a.xmp").write_text(STARS.format("xmp:Rating='3'"))
    (folder / "b.png.xmp").write_text("<xmp:Rating>5</xmp:Rating>")
    (folder / "c.png.xmp").write_text(STARS.format('xmp:Rating="-1"'))  # rejected
    (folder / "d.png.xmp").write_text(STARS.format('xmp:Rating="0"'))  # not rated
    chunks = comfy_chunks("a fox")
    chunks.add_itxt("XML:com.adobe.xmp", STARS.format('xmp:Rating="2"'))
    Image.new("RGB", (8, 8)).save(folder / "e.png", pnginfo=chunks)
    exif = Image.Exif()
    exif[0x4746], exif[0x0110] = 4, f"prompt:{json.dumps(comfy_graph('a fox'))}"
    Image.new("RGB", (8, 8)).save(folder / "g.jpg", exif=exif)
    assert groups(folder) == [
        ("a fox", ["a.png", "b.png", "c.png", "e.png", "g.jpg"], [3.0, 5.0, -1.0, 2.0, 4.0]),
    ]
    (folder / "a.json").write_text('{"rating": 1}')  # what was written for this program goes before stars
    assert groups(folder)[0][2][0] == 1.0


def test_stars_of_eagle_are_read(folder: Path) -> None:
    for name, said in (("a", {"star": 5}), ("b", {"star": 2}), ("c", {}), ("d", {"star": 4, "isDeleted": True})):
        item = folder / "images" / f"{name}.info"
        paint(item / f"{name}.png", "a fox")
        paint(item / f"{name}_thumbnail.png")
        (item / "metadata.json").write_text(json.dumps({"id": name, "name": name, "ext": "png", **said}))
    assert groups(folder) == [("a fox", ["a.png", "b.png"], [5.0, 2.0])]
    assert read_gallery(folder).notes == ("Left out: 1 image has no rating.",)


def test_ratings_that_are_not_read_are_named(folder: Path) -> None:
    for name, rating in (("a", 4), ("b", 2)):
        paint(folder / f"{name}.png", "a fox")
        (folder / f"{name}.json").write_text(json.dumps({"rating": rating}))
    paint(folder / "c.png", "a fox")
    (folder / "c.json").write_text('{"rating": "safe"}')  # a downloader's
    (folder / "a.png.pp3").write_text("[General]\nRank=3\n")
    told = "\n".join(read_gallery(folder).notes)
    assert "1 .pp3 file (RawTherapee) not read: write ratings as XMP or CSV." in told
    assert "c.json: the rating must be a number, not 'safe'; it is at most 1,000,000 either way." in told


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{'rating': 3}", " is not valid JSON"),
        ('{"rating": 1' + 400 * "0" + "}", " cannot be read: it holds a whole number of 401 digits"),
        ('{"rating": "R-18"}', ": the rating must be a number, not 'R-18'"),
        ('{"rating": "4"}', ": the rating must be a number, not '4'"),
        ('{"rating": false}', ": the rating must be a number, not False"),
        ('{"rating": {"average": 4}}', ": the rating must be a number, not {'average': 4}"),
        ('{"rating": NaN}', ": the rating must be a number, not nan"),
        ('{"rating": 1e30}', ": the rating must be a number, not 1e+30; it is at most 1,000,000 either way"),
        ('{"rating": 4, "prompt": 3}', ": the prompt must be a text"),
        ('{"rating": 4, "source": ["x"]}', ': "source" must be the path of a picture'),
        (
            '{"rating": 4, "source": "https://a.example/1.png"}',
            ': "source" must be the path of a picture, not \'https:',
        ),
        ('{"rating": 4, "source": "../1.png"}', ": the picture ../1.png must be beside the ratings"),
    ],
)
def test_a_file_of_another_program_beside_a_picture_costs_only_itself(
    folder: Path, content: str, sentence: str
) -> None:
    for name in "abc":
        paint(folder / f"{name}.png", "a fox")
    (folder / "all.csv").write_text("file,rating\na.png,4\nb.png,2\n")
    (folder / "c.json").write_text(content)
    assert groups(folder) == [("a fox", ["a.png", "b.png"], [4.0, 2.0])]
    assert read_gallery(folder).notes[0].startswith(f"Left out: {folder / 'c.json'}{sentence}")


@pytest.mark.parametrize("nothing", ['""', "null"])
def test_an_empty_rating_is_none_and_an_empty_prompt_is_the_pictures_own(folder: Path, nothing: str) -> None:
    for name in "abc":
        paint(folder / f"{name}.png", "a fox")
    (folder / "ratings.json").write_text(
        f'{{"a.png": {{"rating": 4, "prompt": {nothing}, "source": {nothing}}}, "b.png": 2}}'
    )
    (folder / "c.json").write_text(f'{{"rating": {nothing}, "source": "https://a.example/1.png"}}')
    assert groups(folder) == [("a fox", ["a.png", "b.png"], [4.0, 2.0])]
    assert read_gallery(folder).notes == ("Left out: 1 image has no rating.",)


@pytest.mark.parametrize("blank", [",,", " , , ", '"",,', ",,,,"])
def test_rows_of_a_spreadsheet_that_hold_nothing_are_passed_over(folder: Path, blank: str) -> None:
    for name in "abc":
        paint(folder / f"{name}.png", "a fox")
    for delimiter in (",", ";"):
        rows = ["file,rating,prompt", "a.png,4,", blank, "b.png,2,", "c.png,3.5,", blank, blank]
        (folder / "mine.csv").write_text("\n".join(rows).replace(",", delimiter))
        assert groups(folder) == FOXES


def test_a_picture_that_may_not_be_opened_costs_only_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        paint(folder / f"{name}.png", "a fox")
    (folder / "all.csv").write_text("file,rating\na.png,4\nb.png,2\n")

    def denied(path: Path, mode: str) -> BinaryIO:
        if path.name == "c.png":  # not by its mode: tests may run as a user who may read everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return path.open(mode)

    monkeypatch.setattr(picture_file, "open", denied, raising=False)
    assert groups(folder) == [("a fox", ["a.png", "b.png"], [4.0, 2.0])]
    assert read_gallery(folder).notes[0] == f"Left out: {folder / 'c.png'} cannot be opened (permission denied)."


@pytest.mark.parametrize(
    "line", ['{"file_name": "a.png", "text": "a fox"}', '{"images": ["a.png"], "messages": []}', "no JSON", "[[[", "3"]
)
def test_a_foreign_jsonl_is_left_out_with_a_note(folder: Path, line: str) -> None:
    for name, rating in (("a", 4), ("b", 2)):
        paint(folder / f"{name}.png", "a fox")
        (folder / f"{name}.json").write_text(json.dumps({"rating": rating}))
    (folder / "metadata.jsonl").write_text(f"{line}\n")
    assert groups(folder) == [("a fox", ["a.png", "b.png"], [4.0, 2.0])]
    assert read_gallery(folder).notes[0].endswith("metadata.jsonl is no preference file: no line says which images are"
                                                  " better.")  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    for name in "ab":
        paint(folder / f"{name}.png", "a fox")
    os.mkfifo(folder / "c.png")
    (folder / "all.csv").write_text("file,rating\na.png,4\nb.png,2\nc.png,1\n")
    assert groups(folder) == [("a fox", ["a.png", "b.png"], [4.0, 2.0])]
    assert "c.png is no image that can be read (" in read_gallery(folder).notes[-1]


def test_pictures_of_another_shape_are_left_out_not_cropped(folder: Path) -> None:
    shapes = {"a": (8, 8), "b": (16, 16), "c": (32, 34), "d": (832, 1216), "e": (832, 1216)}
    for name, shape in shapes.items():
        Image.new("RGB", shape).save(folder / f"{name}.png", pnginfo=comfy_chunks("a fox"))
    (folder / "all.csv").write_text("file,rating\n" + "".join(f"{name}.png,{i}\n" for i, name in enumerate(shapes)))
    square = read_gallery(folder).fitting((16, 16))
    assert [path.name for path in square.groups[0].files] == ["a.png", "b.png", "c.png"]
    assert square.groups[0].scores == (0.0, 1.0, 2.0)
    left, cut, small = square.notes
    assert left.startswith("Left out: 2 images of another shape than the training's 16 x 16 pixels, such as ")
    assert "d.png with 832 x 1216: a crop would show something else" in left
    assert cut == "1 image cropped at the centre, by 6% at most."
    assert small == "1 image smaller than 16 x 16 pixels and so enlarged."
    tall = read_gallery(folder).fitting((1216, 832))
    assert [path.name for path in tall.groups[0].files] == ["d.png", "e.png"]
    with pytest.raises(UserError, match="no group has two pictures of that shape"):
        read_gallery(folder).fitting((100, 1000))
