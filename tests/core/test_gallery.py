"""A folder of rated images becomes groups: every form of rating, prompts in ComfyUI's PNGs, and what is left out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer
from PIL import Image
from rated_folder import comfy_graph, groups, paint

from dgpo_core.comfy.png import NoPrompt, prompt_of
from dgpo_core.common.errors import UserError
from dgpo_core.people.gallery import RatedGroup, read_gallery


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the pictures are."""
    (tmp_path / "art").mkdir()
    return tmp_path / "art"


# --- the forms -------------------------------------------------------------------------------------------------------

FOXES = [("a fox", ["a.png", "b.png", "c.png"], [4.0, 2.0, 3.5])]


def test_ratings_beside_the_images(folder: Path) -> None:
    for name, rating in (("a.png", 4), ("b.png", 2), ("c.png", 3.5)):
        paint(folder / name)
        sidecar = folder / (f"{name}.json" if name == "c.png" else name.replace(".png", ".json"))
        sidecar.write_text(json.dumps({"rating": rating, "prompt": "a fox", "artist": "me"}))
    assert groups(folder) == FOXES


def test_ratings_in_one_json(folder: Path) -> None:
    for name in "abc":
        paint(folder / f"{name}.png", "a fox" if name != "c" else "")
    said = {"a.png": 4, "b.png": {"rating": 2}, "c.png": {"rating": 3.5, "prompt": "a fox"}}
    (folder / "ratings.json").write_text(json.dumps(said), encoding="utf-8-sig")
    assert groups(folder) == FOXES


@pytest.mark.parametrize(
    "table",
    [
        "file,rating,prompt\na.png,4,a fox\nb.png,2,a fox\nc.png,3.5,a fox\n",
        '\ufeffrating,prompt,file\r\n4,"a fox",a.png\r\n2, a fox ,b.png\r\n3.5,a fox,c.png',
        "file, rating\na.png, 4\nb.png, 2\n\nc.png, 3.5\nd.png,\n",
    ],
)
def test_ratings_in_a_table(folder: Path, table: str) -> None:
    for name in "abcd":
        paint(folder / f"{name}.png", "a fox" if "prompt" not in table else "")
    (folder / "mine.csv").write_text(table, encoding="utf-8")
    assert groups(folder) == FOXES


def test_a_preference_file_makes_groups_of_its_own(folder: Path) -> None:
    for name in "abcde":
        paint(folder / f"{name}.png", "a fox")
    lines = [
        {"prompt": "a red fox", "images": ["a.png", "b.png", "c.png"], "ranking": [[2], [0, 1]]},
        {"images": ["d.png", "e.png"], "ratings": [1, 5]},
        {"images": ["a.png", "e.png"], "thumbs": [1, -1]},
        {"images": ["a.png", "b.png"], "skip": True},
    ]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert groups(folder) == [
        ("a red fox", ["a.png", "b.png", "c.png"], [-0.5, -0.5, 1.0]),
        ("a fox", ["d.png", "e.png"], [1.0, 5.0]),
        ("a fox", ["a.png", "e.png"], [1.0, -1.0]),
    ]
    assert read_gallery(folder).notes == ("Left out: 1 group was skipped or has no better and worse.",)


def test_subfolders_count_and_prompts_part_the_groups(folder: Path) -> None:
    names = ["2024/a.png", "2024/b.png", "2025/a.png", "2025/b.jpg"]
    for name, prompt in zip(names, ["a fox", "an owl", "an owl", ""], strict=True):
        paint(folder / name, prompt)
    (folder / "all.csv").write_text("file,rating\n2024/a.png,1\n2024/b.png,2\n2025/a.png,3\n")
    (folder / "2025" / "b.json").write_text('{"rating": 4, "prompt": "a fox"}')
    assert groups(folder) == [("a fox", ["a.png", "b.jpg"], [1.0, 4.0]), ("an owl", ["b.png", "a.png"], [2.0, 3.0])]
    assert [prompt.text for prompt in read_gallery(folder).prompts] == ["a fox", "an owl"]


def test_a_file_beside_the_image_goes_before_one_for_the_folder(folder: Path) -> None:
    for name in "ab":
        paint(folder / f"{name}.png", "a fox")
    (folder / "all.csv").write_text("file,rating,prompt\na.png,1,an owl\nb.png,2,\n")
    (folder / "a.json").write_text('{"rating": 5}')
    assert groups(folder) == [("a fox", ["a.png", "b.png"], [5.0, 2.0])]


# --- edits -----------------------------------------------------------------------------------------------------------

EDITS = [("make it red", "day.png", ["a.png", "b.png"]), ("make it red", "night.png", ["c.png", "d.png"])]


def edited(folder: Path) -> list[tuple[str, str, list[str]]]:
    """Prompt, source and file names of each group."""
    found = read_gallery(folder).groups
    return [(g.prompt, g.sources[0].file.name, [path.name for path in g.files]) for g in found if g.sources[0].file]


def before(folder: Path) -> None:
    """Two sources, and four pictures made of them."""
    for name, colour in (("day", "white"), ("night", "black"), *((name, "red") for name in "abcd")):
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")


def test_edits_of_one_source_are_a_group_in_every_form(folder: Path) -> None:
    before(folder)
    rows = [(f"{name}.png", i, "make it red", "day.png" if name in "ab" else "night.png")
            for i, name in enumerate("abcd")]  # fmt: skip
    table = folder / "all.csv"
    table.write_text("file,rating,prompt,source\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    assert edited(folder) == EDITS
    assert read_gallery(folder).notes == ()  # the sources are no pictures without a rating
    table.unlink()
    said = {name: {"rating": rating, "prompt": prompt, "source": source} for name, rating, prompt, source in rows}
    (folder / "ratings.json").write_text(json.dumps(said))
    assert edited(folder) == EDITS
    (folder / "ratings.json").unlink()
    for name, record in said.items():
        (folder / name).with_suffix(".json").write_text(json.dumps(record))
    assert edited(folder) == EDITS
    assert len(read_gallery(folder).prompts) == 2


def test_the_answers_about_edits_name_their_sources(folder: Path) -> None:
    before(folder)
    line = {"prompt": "make it red", "images": ["a.png", "b.png"], "ranking": [[1]], "version": 2}
    (folder / "p.jsonl").write_text(json.dumps({**line, "sources": ["day.png"]}))
    assert edited(folder) == EDITS[:1]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("gone.png", r"all\.csv:2: there is no picture .*gone\.png: paths are relative to the file that names it"),
        ("../x.png", r"all\.csv:2: the picture \.\./x\.png must be beside the ratings or in a folder below"),
        ("all.csv", r"all\.csv:2: the picture .*all\.csv cannot be read"),
    ],
)
def test_a_source_that_cannot_be_used_is_told_with_its_line(folder: Path, source: str, sentence: str) -> None:
    before(folder)
    (folder / "all.csv").write_text(f"file,rating,prompt,source\na.png,1,make it red,{source}\nb.png,2,red,\n")
    with pytest.raises(UserError, match=sentence):
        read_gallery(folder)


# --- what is left out ------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted_and_named(folder: Path) -> None:
    for name in "abcdefghi":
        paint(folder / f"{name}.png", "a fox" if name in "ab" else "an owl" if name in "cd" else "")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "a workflow.json").write_text("no JSON, and none of ours")
    (folder / "c.json").write_text('{"nodes": []}')  # a workflow beside a picture
    table = "a.png,1,\nb.png,2,\nc.png,3,\nd.png,3,\ne.png,1,alone\nf.png,1,\nbroken.png,1,a fox\ngone.png,1,a fox\n"
    (folder / "all.csv").write_text("file,rating,prompt\n" + table)
    gallery = read_gallery(folder)
    assert [group.prompt for group in gallery.groups] == ["a fox"]
    notes = "\n".join(gallery.notes)
    assert "Left out: 1 rated image is the only one of its prompt." in notes
    assert "Left out: 1 group has equal ratings." in notes
    assert "Left out: 3 images have no rating." in notes
    assert f"Left out: {folder / 'broken.png'} is no image that can be read (" in notes
    assert f"Left out: {folder / 'gone.png'} is not there." in notes
    assert f"Left out: {folder / 'f.png'} holds no prompt of ComfyUI's and no infotext of A1111's." in notes


def test_many_useless_images_are_not_all_named(folder: Path) -> None:
    for i in range(12):
        paint(folder / f"{i:02d}.png", "a fox" if i < 2 else "")
    rows = "".join(f"{i:02d}.png,{i}\n" for i in range(12))
    (folder / "all.csv").write_text("file,rating\n" + rows)
    notes = read_gallery(folder).notes
    assert len(notes) == 6
    assert notes[-1] == "Left out: 5 more like these."


def test_an_image_that_cannot_be_used_leaves_its_group(folder: Path) -> None:
    for name in "abc":
        paint(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"no picture")
    line = {"prompt": "a fox", "images": ["a.png", "b.png", "c.png"], "ranking": [[0], [1], [2]]}
    (folder / "p.jsonl").write_text(json.dumps(line))
    assert groups(folder) == [("a fox", ["a.png", "c.png"], [1.0, -1.0])]


# --- the cases -------------------------------------------------------------------------------------------------------

CASES = Path(__file__).parents[1] / "cases" / "rated"
BOATS = [("a green boat on a lake", ["0.png", "1.png"], [5.0, 1.0])]


@pytest.mark.parametrize(
    ("case", "note"),
    [
        (
            "unrelated_tables",
            "log.csv is no table of ratings: its first line does not name the columns file and rating.",
        ),
        ("own_metrics", "metrics.jsonl is no preference file: no line says which images are better."),
        ("hidden_trash", "Left out: 1 image in hidden folders and bins (.dtrash)."),
        ("xmp", ""),
    ],
)
def test_what_is_foreign_to_a_rated_folder_is_left_out_with_a_note(case: str, note: str) -> None:
    assert groups(CASES / case) == BOATS
    notes = read_gallery(CASES / case).notes
    assert len(notes) == bool(note)
    assert all(told.endswith(note) for told in notes)


def test_a_prompt_in_the_exif_of_a_webp_is_read() -> None:
    assert groups(CASES / "webp") == [("a green boat on a lake", ["0.webp", "1.webp"], [5.0, 1.0])]


def test_prompts_with_commas_and_no_quotes_are_never_cut() -> None:
    with pytest.raises(UserError, match=r"r\.csv:2: there are more columns than the first line names"):
        read_gallery(CASES / "commas")


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.csv", "file,rating\na.png,good\n", "x.csv:2: the rating must be a number, not 'good'"),
        ("x.csv", "file,rating\na.png,nan\n", "x.csv:2: the rating must be a number"),
        ("x.csv", "file,rating\n,3\n", "x.csv:2: there is no file's name"),
        ("x.csv", b"file,rating\n\xff,3\n", "x.csv cannot be read"),
        ("x.csv", "file,rating,rating\na.png,1,2\n", "x.csv:1: there are two columns rating"),
        ("x.csv", "file,rating\na.png,1e400\n", "x.csv:2: the rating must be a number"),
        ("x.csv", 'file,rating\na.png,"5, 5"\n', "x.csv:2: the rating must be a number, not '5, 5'"),
        ("x.csv", "file,rating\na.png,★★★\n", "x.csv:2: the rating must be a number, not '★★★'"),
        ("x.csv", "file,rating\na.png,80%\n", "x.csv:2: the rating must be a number, not '80%'"),
        ("x.csv", "file,rating,prompt\na.png,1,a boat, on a lake\n", "x.csv:2: there are more columns than the first"),
        ("x.csv", "sep=;\nfile;rating;prompt\na.png;1;a boat; a lake\n", "x.csv:3: there are more columns than"),
        ("ratings.json", '{"a.png": "4"}', "ratings.json: a.png: the rating must be a number, not '4'"),
        ("ratings.json", '{"a.png": {"rating": 4, "prompt": 3}}', "ratings.json: a.png: the prompt must be a text"),
        ("ratings.json", "[1, 2]", "ratings.json must be an object"),
        ("ratings.json", '{"a.png": true}', "ratings.json: a.png: the rating must be a number, not True"),
        ("x.jsonl", '{"images": ["a.png"], "ratings": [1, 2]}', "x.jsonl:1: Ratings must be a list"),
        ("x.jsonl", '{"images": "a.png", "ratings": [1, 2]}', 'x.jsonl:1: "images" must be a list'),
    ],
)
def test_a_file_of_ratings_that_is_wrong_is_named(folder: Path, name: str, content: str | bytes, sentence: str) -> None:
    paint(folder / "a.png", "a fox")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_gallery(folder)
    assert sentence in str(error.value)
    assert str(folder / name) in str(error.value)
    assert str(error.value).endswith(".")


def test_a_folder_with_nothing_to_learn_from_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is nothing to learn from in .*art: give two or more images"):
        read_gallery(folder)
    paint(folder / "a.png", "a fox")
    (folder / "a.json").write_text('{"rating": 4}')
    with pytest.raises(UserError, match=r"\(Left out: 1 rated image is the only one of its prompt\.\)"):
        read_gallery(folder)
    with pytest.raises(UserError, match="There is no folder .*none: --groups takes a folder"):
        read_gallery(tmp_path / "none")


# --- prompts in PNGs -------------------------------------------------------------------------------------------------


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def changed(**nodes: dict[str, Any]) -> dict[str, Any]:
    """The default workflow with nodes added or in place of others: n6=... is node 6, the positive text."""
    return {**comfy_graph("a fox"), **{key.removeprefix("n"): value for key, value in nodes.items()}}


FLUX = {  # guidance and a guider between text and sampler, and an encoder for two texts, of which one is given
    "1": node("CLIPTextEncodeFlux", clip_l="", t5xxl="a fox in the snow", guidance=3.5, clip=["9", 0]),
    "2": node("FluxGuidance", conditioning=["1", 0], guidance=3.5),
    "3": node("BasicGuider", model=["8", 0], conditioning=["2", 0]),
    "4": node("SamplerCustomAdvanced", guider=["3", 0], sampler=["7", 0]),
}
KSAMPLER = comfy_graph("a fox")["3"]["inputs"]


@pytest.mark.parametrize(
    ("graph", "prompt"),
    [
        (comfy_graph(" a fox\n"), "a fox"),
        (FLUX, "a fox in the snow"),
        (changed(n6=node("CLIPTextEncodeSDXL", text_g="an owl", text_l="an owl", clip=["4", 1])), "an owl"),
        (
            changed(
                n3=node("KSampler", **{**KSAMPLER, "positive": ["20", 0], "negative": ["20", 1]}),
                n20=node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], strength=1.0),
            ),
            "a fox",
        ),
        (
            changed(
                n6=node("CLIPTextEncode", text=["21", 0], clip=["4", 1]),
                n21=node("PrimitiveStringMultiline", value="an owl"),
            ),
            "an owl",
        ),
        (changed(n30=node("KSampler", **{**KSAMPLER, "latent_image": ["3", 0]})), "a fox"),  # drawn again, larger
        (
            {"1": node("DGPO_Prompts", source="the text below", text="# mine\na fox\n", per_iteration=1)},
            "a fox",
        ),
    ],
)
def test_the_positive_prompt_is_found_through_the_graph(graph: Mapping[str, Any], prompt: str) -> None:
    assert prompt_of({"prompt": json.dumps(graph)}) == prompt


@pytest.mark.parametrize(
    ("chunks", "sentence"),
    [
        ({}, "holds no prompt of ComfyUI's"),
        ({"parameters": "a fox"}, "holds no prompt of ComfyUI's"),
        ({"prompt": "{"}, "holds a workflow that cannot be read"),
        ({"prompt": "[1, 2]"}, "holds a workflow that cannot be read"),
        ({"prompt": '{"1": {"class_type": "Magic", "inputs": {}}}'}, "has no text at its sampler"),
        ({"prompt": json.dumps(changed(n6=node("Wildcards", seed=["6", 0])))}, "has its text from the node Wildcards"),
        ({"prompt": json.dumps(changed(n6=node("CLIPTextEncode", text=["6", 0])))}, "goes round in a circle"),
        (
            {
                "prompt": json.dumps(
                    changed(
                        n40=node("CLIPTextEncode", text="an owl", clip=["4", 1]),
                        n41=node("KSampler", **{**KSAMPLER, "positive": ["40", 0]}),
                    )
                )
            },
            "was drawn with 2 different positive prompts",
        ),
    ],
)
def test_a_graph_that_does_not_say_is_told(chunks: dict[str, str], sentence: str) -> None:
    with pytest.raises(NoPrompt, match=sentence):
        prompt_of(chunks)


def test_comfyuis_own_saveimage_writes_what_is_read(comfy: ComfyServer) -> None:
    """Nodes that lead nowhere are not run, but they are written: so the default graph needs no checkpoint here."""
    graph = comfy_graph("an otter, painted", "rated/otter")
    graph["10"] = node("EmptyImage", width=64, height=64, batch_size=2, color=255)
    graph["9"]["inputs"]["images"] = ["10", 0]
    comfy.run(graph, 60)
    folder = comfy.base / "output/rated"
    first, second = sorted(folder.glob("*.png"))
    (folder / "ratings.csv").write_text(f"file,rating\n{first.name},5\n{second.name},1\n")
    assert read_gallery(folder).groups == (RatedGroup("an otter, painted", (first, second), (5.0, 1.0)),)
