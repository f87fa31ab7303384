"""The prompt of a picture is the text that its sampler was given, or the picture says why nobody can tell."""

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dgpo_core.comfy.node_table import RULES
from dgpo_core.comfy.png import NoPrompt, prompt_of
from dgpo_core.common.pixels import Unreadable
from dgpo_core.people.picture_file import read_picture

CASES = Path(__file__).parents[1] / "cases" / "png_prompts"
BOAT = "a green boat on a lake"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def drawn(positive: str = "p", **nodes: dict[str, Any]) -> dict[str, Any]:
    """A graph whose sampler gets `positive`; p encodes the text at t."""
    return {
        "s": node("KSampler", positive=[positive, 0], negative=["n", 0]),
        "p": node("CLIPTextEncode", text=["t", 0]),
        "n": node("CLIPTextEncode", text="ugly"),
        "t": node("PrimitiveString", value=BOAT),
        **nodes,
    }


def told(graph: Any, **chunks: str) -> str:
    """The prompt of a picture with that graph."""
    return prompt_of({"prompt": graph if isinstance(graph, str) else json.dumps(graph), **chunks})


@pytest.mark.parametrize(
    "name", ["string_replace", "string_concatenate", "any_switch", "efficient_loader", "face_detailer", "infotext",
             "two_chunks"]
)  # fmt: skip
def test_the_text_that_was_drawn_is_found(name: str) -> None:
    assert prompt_of(read_picture(CASES / f"{name}.png").chunks()) == BOAT


@pytest.mark.parametrize(
    ("name", "kind"), [("dynamic_prompt", "DPRandomGenerator"), ("llm_enhancer", "OllamaGenerate")]
)
def test_a_text_that_a_node_made_is_not_in_the_file(name: str, kind: str) -> None:
    with pytest.raises(NoPrompt, match=f"has its text from the node {kind}, whose output is not in the file"):
        prompt_of(read_picture(CASES / f"{name}.png").chunks())


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ({"t": node("StringTrim", string=f"  {BOAT} ", mode="Both")}, BOAT),
        ({"t": node("CaseConverter", string="a BOAT", mode="Title Case")}, "A Boat"),
        ({"t": node("StringSubstring", string=BOAT, start=2, end=12)}, "green boat"),
        ({"t": node("StringReplace", string=["u", 0], find="X", replace="boat"),
          "u": node("PrimitiveString", value="X")}, "boat"),
        ({"t": node("ComfySwitchNode", switch=True, on_true=["u", 0], on_false=["v", 0]),
          "u": node("PrimitiveString", value="yes"), "v": node("Wildcards", text="{a|b}")}, "yes"),
        ({"t": node("Any Switch (rgthree)", any_10=["v", 0], any_02=["u", 0]),
          "u": node("PrimitiveString", value="first"), "v": node("PrimitiveString", value="tenth")}, "first"),
        ({"p": node("CLIPTextEncodeSDXL", text_g=BOAT, text_l=f" {BOAT} ")}, BOAT),
        ({"p": node("CLIPTextEncodeSD3", clip_l="", clip_g="", t5xxl=BOAT)}, BOAT),
        ({"p": node("ConditioningCombine", conditioning_1=["q", 0], conditioning_2=["q", 0]),
          "q": node("CLIPTextEncode", text=BOAT)}, BOAT),
        ({"p": node("ConditioningAverage", conditioning_to=["q", 0], conditioning_from=["n", 0],
                    conditioning_to_strength=1.0), "q": node("CLIPTextEncode", text=BOAT)}, BOAT),
        ({"s": node("KSampler (Efficient)", positive=["e", 1]), "z": node("KSampler (Efficient)", positive=["s", 1]),
          "e": node("Efficient Loader", positive=BOAT, negative="ugly")}, BOAT),
        ({"s": node("KSampler", positive=["f", 3]), "f": node("FromBasicPipe", basic_pipe=["b", 0]),
          "b": node("ToBasicPipe", positive=["p", 0], negative=["n", 0])}, BOAT),
    ],
)  # fmt: skip
def test_a_text_goes_through_known_nodes_as_they_change_it(nodes: Mapping[str, Any], text: str) -> None:
    assert told(drawn(**nodes)) == text


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ({"t": node("ImpactWildcardProcessor", wildcard_text="{a|b}", populated_text="a")}, "from the node ImpactWild"),
        ({"t": node("RegexReplace", string=BOAT, regex_pattern="(a+)+$", replace="")}, "from the node RegexReplace"),
        ({"t": node("ShowText|pysssss", text=["u", 0], text_0=BOAT), "u": node("TextGenerate", prompt="Write")},
         "from the node TextGenerate"),
        ({"p": node("\x1b[31mEvil" * 50, text=BOAT)}, r"from the node \\x1b\[31mEvil"),
        ({"t": node("StringTrim", string=BOAT, mode=["u", 0])}, "'mode' of a node is not written down"),
        ({"t": node("CaseConverter", string=BOAT, mode="sPoNgE")}, "may have changed"),
        ({"t": node("Text Multiline", text="# a note\na boat")}, "may have changed"),
        ({"p": node("CLIPTextEncodeSDXL", text_g=BOAT, text_l="a boat")}, "has 2 different texts at one node"),
        ({"p": node("CLIPTextEncodeFlux", clip_l="a long list of words, many", t5xxl=BOAT)}, "has 2 different texts"),
        ({"p": node("ConditioningCombine", conditioning_1=["n", 0], conditioning_2=["q", 0]),
          "q": node("CLIPTextEncode", text=BOAT)}, "has 2 different texts at one node"),
        ({"p": node("ConditioningZeroOut", conditioning=["n", 0])}, "zeroed out"),
        ({"p": node("GLIGENTextBoxApply", conditioning_to=["n", 0], text="x")}, "from the node GLIGENTextBoxApply"),
        ({"p": node("CLIPTextEncode", text=["gone", 0])}, "a node is missing"),
        ({"p": node("CLIPTextEncode", text=5)}, "has no text at its sampler"),
        ({"p": node("CLIPTextEncode", text="  ")}, "has no text at its sampler"),
        ({"z": node("KSampler", positive=["n", 0])}, "was drawn with 2 different positive prompts"),
        ({"z": node("DualCFGGuider", cond1=["p", 0], cond2=["n", 0])}, "was drawn with 2 different positive prompts"),
        ({"z": node("SomebodysSampler", positive=["n", 0])}, "was drawn with 2 different positive prompts"),
        ({"s": node("KSampler (Efficient)", positive=["p", 0], script=["x", 0]), "x": node("XY Plot")}, "node XY Plot"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_left_out_with_the_reason(nodes: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(NoPrompt, match=sentence):
        told(drawn(**nodes))


def test_forty_diamonds_are_walked_once() -> None:
    nodes = {f"d{i}": node("ConditioningCombine", conditioning_1=[f"d{i - 1}", 0], conditioning_2=[f"d{i - 1}", 0])
             for i in range(1, 41)}  # fmt: skip
    assert told(drawn("d40", d0=node("CLIPTextEncode", text=BOAT), **nodes)) == BOAT


@pytest.mark.slow
def test_a_long_way_and_a_circle_end() -> None:
    far = {f"r{i}": node("FluxGuidance", conditioning=[f"r{i - 1}", 0]) for i in range(1, 5000)}
    assert told(drawn("r4999", r0=node("CLIPTextEncode", text=BOAT), **far)) == BOAT
    with pytest.raises(NoPrompt, match="goes round in a circle"):
        told(drawn("a", a=node("FluxGuidance", conditioning=["b", 0]), b=node("Reroute", value=["a", 0])))


@pytest.mark.parametrize("kind", ["StringConcatenate", "StringReplace"])
def test_a_text_that_doubles_at_every_node_is_bounded(kind: str) -> None:
    def grown(i: int) -> dict[str, Any]:
        link = [f"t{i - 1}", 0]
        if kind == "StringConcatenate":
            return node(kind, string_a=link, string_b=link, delimiter="")
        return node(kind, string=link, find="a", replace="aaaa" * 9)

    nodes = {f"t{i}": grown(i) for i in range(1, 60)}
    with pytest.raises(NoPrompt, match="more than 100000 characters|without measure"):
        told(drawn(t=node("PrimitiveString", value=["t59", 0]), t0=node("PrimitiveString", value="aa"), **nodes))


def test_every_rule_answers_or_says_why_for_nodes_without_inputs() -> None:
    for kind in RULES:
        with pytest.raises(NoPrompt):
            told(drawn(p=node(kind)))


@pytest.mark.parametrize(
    "graph",
    ["[" * 100_000, '{"1": {"class_type": 3, "inputs": {}}}', '{"1": null}', "null", '"text"', '{"nodes": 3}', "3",
     '{"nodes": [{"id": 1}], "links": []}', '{"nodes": [], "links": [[1]]}', '{"1": {"class_type": "KSampler"}}',
     '{"s": {"class_type": "KSampler", "inputs": {"positive": "\\ud800"}}}', '{"nodes": [], "links": 5}'],
)  # fmt: skip
def test_a_graph_that_is_none_is_told(graph: str) -> None:
    with pytest.raises(NoPrompt, match="cannot be read|has no text"):
        told(graph)


# --- the graph as it was seen ----------------------------------------------------------------------------------------


def seen(text: str = BOAT, mode: int = 0, **more: Any) -> str:
    """The workflow of a front end: a bypassable guidance between encoder and sampler."""
    return json.dumps({
        "nodes": [
            {"id": 1, "type": "CLIPTextEncode", "inputs": [{"name": "clip", "type": "CLIP", "link": None}],
             "outputs": [{"type": "CONDITIONING"}], "widgets_values": [text]},
            {"id": 2, "type": "SomeGuidance", "mode": mode, "outputs": [{"type": "CONDITIONING"}],
             "inputs": [{"name": "conditioning", "type": "CONDITIONING", "link": 1}], "widgets_values": [3.5]},
            {"id": 3, "type": "KSampler", "widgets_values": [5, "randomize", 20],
             "inputs": [{"name": "positive", "type": "CONDITIONING", "link": 2}]},
        ],
        "links": [[1, 1, 0, 2, 0, "CONDITIONING"], [2, 2, 0, 3, 0, "CONDITIONING"]],
        **more,
    })  # fmt: skip


def test_a_bypassed_node_gives_on_what_it_gets() -> None:
    assert prompt_of({"workflow": seen(mode=4)}) == BOAT
    with pytest.raises(NoPrompt, match="node SomeGuidance"):
        prompt_of({"workflow": seen()})
    with pytest.raises(NoPrompt, match="has no text"):
        prompt_of({"workflow": seen(mode=2)})


def test_a_template_and_a_subgraph_are_not_what_was_run() -> None:
    with pytest.raises(NoPrompt, match="a template of the prompt"):
        prompt_of({"workflow": seen("a {green|white} boat", mode=4)})
    with pytest.raises(NoPrompt, match="subgraphs"):
        prompt_of({"workflow": seen(definitions={"subgraphs": [{"id": "x"}]})})
    assert prompt_of({"prompt": json.dumps(drawn()), "workflow": seen("{a|b}")}) == BOAT  # as run goes before as seen


# --- infotexts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (f"{BOAT}\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a", BOAT),
        (f"{BOAT}, <lora:x:0.8>\nSteps: 20, Sampler: Euler a", BOAT),
        ("a boat\non a lake\nSteps: 20, Sampler: Euler a", "a boat\non a lake"),
        (f"{BOAT}\nSteps: 20, Sampler: Euler, Hires prompt: {BOAT}, Hires steps: 3", BOAT),
    ],
)
def test_an_infotext_gives_its_positive_prompt(text: str, prompt: str) -> None:
    assert prompt_of({"parameters": text}) == prompt


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Negative prompt: ugly\nSteps: 20, Sampler: Euler a", "an infotext without a prompt"),
        ("a {green|white} boat\nSteps: 20, Sampler: Euler a", "wildcards in place of the text"),
        ("a __colour__ boat\nNegative prompt: ugly", "wildcards in place of the text"),
        (f'{BOAT}\nSteps: 20, Sampler: Euler, Hires prompt: "a ship, big", Size: 8x8', "2 different positive prompts"),
        ('{"prompt": "a boat"}', "settings in JSON of a tool that is not read"),
    ],
)
def test_an_infotext_that_does_not_say_is_left_out(text: str, sentence: str) -> None:
    with pytest.raises(NoPrompt, match=sentence):
        prompt_of({"parameters": text})


def test_an_infotext_counts_only_where_the_graph_does_not_hold_the_text() -> None:
    unknown, infotext = drawn(t=node("Dice", seed=4)), f"{BOAT}\nSteps: 20, Sampler: Euler a"
    assert told(unknown, parameters=infotext) == BOAT
    assert told(drawn(t=node("PrimitiveString", value="an owl")), parameters=infotext) == "an owl"
    with pytest.raises(NoPrompt, match="2 different"):
        told(drawn(z=node("KSampler", positive=["n", 0])), parameters=infotext)


def test_other_tools_are_named() -> None:
    with pytest.raises(NoPrompt, match="holds the settings of InvokeAI, which are not read"):
        prompt_of({"invokeai_metadata": "{}"})


# --- files -----------------------------------------------------------------------------------------------------------


def png(path: Path, *chunks: tuple[bytes, bytes], behind: bool = True) -> Path:
    """A small PNG with chunks of one's own, before or behind its pixels."""
    Image.new("RGB", (8, 6)).save(path)
    data, made = path.read_bytes(), b""
    for kind, content in chunks:
        made += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    place = data.index(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    path.write_bytes(data[:place] + made + data[place:])
    return path


GRAPH = json.dumps(drawn())


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize(
    "chunk",
    [
        (b"tEXt", b"prompt\0" + GRAPH.encode()),
        (b"zTXt", b"prompt\0\0" + zlib.compress(GRAPH.encode())),
        (b"iTXt", b"prompt\0\0\0\0\0" + GRAPH.encode()),
        (b"iTXt", b"prompt\0\1\0en\0x\0" + zlib.compress(GRAPH.encode())),
    ],
)
def test_a_pngs_texts_are_read_before_and_behind_the_pixels(
    tmp_path: Path, chunk: tuple[bytes, bytes], behind: bool
) -> None:
    picture = read_picture(png(tmp_path / "a.png", chunk, behind=behind))
    assert prompt_of(picture.chunks()) == BOAT
    assert (picture.height, picture.width) == (6, 8)


@pytest.mark.parametrize("suffix", ["webp", "jpg"])
@pytest.mark.parametrize("tag", [0x010F, 0x0110, 0x010E])
def test_a_graph_in_exif_is_read(tmp_path: Path, suffix: str, tag: int) -> None:
    exif = Image.Exif()
    exif[tag] = f"prompt:{GRAPH}"
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert prompt_of(read_picture(tmp_path / f"a.{suffix}").chunks()) == BOAT


@pytest.mark.parametrize("code", [b"UNICODE\0", b"ASCII\0\0\0", b"\0" * 8])
def test_an_infotext_in_the_comment_of_exif_is_read(tmp_path: Path, code: bytes) -> None:
    text, exif = f"{BOAT}\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a", Image.Exif()
    unicode = code.startswith(b"UNICODE")
    exif.get_ifd(0x8769)[0x9286] = code[:8] + text.encode("utf-16-be" if unicode else "ascii")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert prompt_of(read_picture(tmp_path / "a.jpg").chunks()) == BOAT


def test_two_texts_of_one_name_that_differ_are_told(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", (b"tEXt", b"prompt\0{}"), (b"tEXt", b"prompt\0" + GRAPH.encode()))
    with pytest.raises(NoPrompt, match="two different texts named 'prompt'"):
        read_picture(path).chunks()


def test_bombs_and_broken_files_are_no_pictures(tmp_path: Path) -> None:
    bomb = (b"zTXt", b"prompt\0\0" + zlib.compress(bytes(40 * 2**20)))
    for path in (png(tmp_path / "a.png", bomb), png(tmp_path / "b.png", (b"zTXt", b"prompt\0\0no zlib"))):
        with pytest.raises(Unreadable):
            read_picture(path)
    whole = (tmp_path / "c.jpg").with_suffix(".jpg")
    Image.effect_noise((64, 64), 90).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    huge = bytearray(png(tmp_path / "d.png").read_bytes())
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    (tmp_path / "huge.png").write_bytes(huge)
    for name in ("cut.jpg", "huge.png"):
        with pytest.raises(Unreadable):
            read_picture(tmp_path / name)


def test_a_portrait_on_its_side_has_the_shape_that_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    assert (read_picture(tmp_path / "a.jpg").height, read_picture(tmp_path / "a.jpg").width) == (8, 6)
