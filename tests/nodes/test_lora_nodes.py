"""What the LoRA nodes know without ComfyUI: the names in LoRA files, what fits, and names of files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.lora import keys as lora_keys
from dgpo_core.policy.lora import report as lora_report

REPO = Path(__file__).resolve().parents[2]
QKV = "diffusion_model.blocks.0.qkv.weight"
KEY_MAP = {
    "lora_unet_blocks_0_attn_to_q": "diffusion_model.in.0.q.weight",
    "transformer.blocks.0.attn.to_k": (QKV, (0, 8, 8)),
    "transformer.norm": ("diffusion_model.norm.weight", None, abs),
    "diffusion_model.last": "diffusion_model.last.weight",
}
SHAPES = {
    "diffusion_model.in.0.q.weight": torch.Size((8, 8)),
    QKV: torch.Size((24, 8)),
    "diffusion_model.norm.weight": torch.Size((8, 8)),
}


@pytest.fixture(scope="module")
def lora_model() -> ModuleType:
    """`nodes/common/lora_model.py`, without the package, which needs ComfyUI."""
    spec = importlib.util.spec_from_file_location("dgpo_lora_model", REPO / "nodes" / "common" / "lora_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(module: str, rows: int = 8, columns: int = 8, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": torch.ones(rank, columns),
        f"{module}.lora_B.weight": torch.ones(rows, rank),
    }


@pytest.mark.parametrize(
    "keys",
    [
        ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"),
        ("lora_A.weight", "lora_B.weight", "lora_B.bias"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_A", "lora_B"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
        ("oft_blocks", "rescale"),
        ("diff", "diff_b"),
        ("w_norm", "b_norm"),
        ("something.unknown",),
    ],
)
def test_tensors_of_every_known_form_belong_to_one_module(keys: tuple[str, ...]) -> None:
    module = "unet.down_blocks.0.attn1.to_out.0"
    if keys == ("something.unknown",):
        module, keys = module + ".something", ("unknown",)
    state = {f"{module}.{key}": torch.ones(1) for key in keys}
    assert lora_keys.modules(state) == {module: state}


def test_old_diffusers_names_lose_their_suffix() -> None:
    state = {f"unet.x.attn1.processor.to_q_lora.{way}.weight": torch.ones(1) for way in ("up", "down")}
    assert list(lora_keys.modules(state)) == ["unet.x.attn1.processor.to_q"]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("unet.blocks.0.attn.to_q", "diffusion_model.in.0.q.weight"),
        ("unet.blocks.0.attn.processor.to_q", "diffusion_model.in.0.q.weight"),
        ("base_model.model.blocks.0.attn.to_q", "diffusion_model.in.0.q.weight"),
        ("unet.base_model.model.blocks.0.attn.to_q", "diffusion_model.in.0.q.weight"),
        ("lora_unet_blocks_0_attn_to_q", "diffusion_model.in.0.q.weight"),
        ("transformer.blocks.0.attn.to_k", (QKV, (0, 8, 8))),
        ("blocks.0.attn.to_k", (QKV, (0, 8, 8))),
        ("last", "diffusion_model.last.weight"),
    ],
)
def test_a_module_is_found_under_the_names_of_other_trainers(name: str, target: Any) -> None:
    assert lora_keys.match(pair(name), KEY_MAP, SHAPES).targets == {name: target}


def test_modules_that_do_not_fit_are_told_apart() -> None:
    state = {
        **pair("unet.blocks.0.attn.to_q"),
        **pair("transformer.blocks.0.attn.to_k", rows=24),  # the target is a third of the fused weight
        **pair("transformer.blocks.7.attn.to_k"),
        **pair("transformer.norm"),
    }
    found = lora_keys.match(state, KEY_MAP, SHAPES)
    assert list(found.targets) == ["unet.blocks.0.attn.to_q", "transformer.norm"]
    assert found.misfits == ("transformer.blocks.0.attn.to_k",)
    assert found.missing == ("transformer.blocks.7.attn.to_k",)
    assert found.total == 4
    assert set(lora_keys.without(state, found.misfits)) == {k for k in state if "blocks.0.attn.to_k" not in k}


def test_shapes_are_asked_only_of_plain_products_on_known_weights() -> None:
    padded = {**pair("unet.blocks.0.attn.to_q", rows=9), "unet.blocks.0.attn.to_q.reshape_weight": torch.tensor([9, 8])}
    packed = pair("last", rows=77)  # no shape is known
    for state in (padded, packed):
        assert not lora_keys.match(state, KEY_MAP, SHAPES).misfits


def hadamard(rows: int, columns: int, rank: int = 2) -> dict[str, tuple[int, ...]]:
    return {f"hada_w{i}_{ab}": (rows, rank) if ab == "a" else (rank, columns) for i in (1, 2) for ab in "ab"}


@pytest.mark.parametrize(
    ("parts", "fits"),
    [
        (hadamard(8, 8), True),
        (hadamard(8, 9), False),
        ({"lokr_w1": (2, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 2)}, True),
        ({"lokr_w1": (2, 4), "lokr_w2": (4, 4)}, False),
        ({"diff": (8, 8)}, True),
        ({"diff": (8,)}, False),
        ({"lora_A.weight": (2, 8), "lora_B.weight": (8, 3)}, False),
        ({"lora_A.weight": (8,), "lora_B.weight": (8, 1)}, False),
        ({"lora_A.weight": (2, 8), "lora_B.weight": (8, 2), "dora_scale": (8, 1)}, True),
        ({"lora_A.weight": (2, 8), "lora_B.weight": (8, 2), "dora_scale": (3, 1)}, False),
    ],
)
def test_a_change_of_another_size_than_the_weight_is_told_in_every_form(
    parts: dict[str, tuple[int, ...]], fits: bool
) -> None:
    module = "unet.blocks.0.attn.to_q"
    state = {f"{module}.{end}": torch.ones(shape) for end, shape in parts.items()}
    found = lora_keys.match(state, KEY_MAP, SHAPES)
    assert (list(found.targets), list(found.misfits)) == (([module], []) if fits else ([], [module]))


@pytest.mark.parametrize(
    "ends",
    [("lora_A.weight",), ("lora_up.weight", "alpha"), ("hada_w1_a", "hada_w1_b", "hada_w2_a"), ("lokr_w1", "lokr_w2_a"),
     ("a1.weight", "a2.weight"), ("dora_scale",), ("alpha",), (*hadamard(8, 8), "hada_t1"),
     ("lora_magnitude_vector", "alpha")],
)  # fmt: skip
def test_a_module_of_which_a_tensor_is_missing_is_told(ends: tuple[str, ...]) -> None:
    module = "unet.blocks.0.attn.to_q"
    found = lora_keys.match({f"{module}.{end}": torch.ones(8, 8) for end in ends}, KEY_MAP, SHAPES)
    assert found.incomplete == (module,)


def test_a_weight_that_two_names_change_is_told() -> None:
    first, second = "unet.blocks.0.attn.to_q", "lora_unet_blocks_0_attn_to_q"
    found = lora_keys.match({**pair(first), **pair(second)}, KEY_MAP, SHAPES)
    assert (list(found.targets), found.twice) == ([first], (second,))


def test_convolutions_count_all_their_numbers() -> None:
    state = {"c.lora_down.weight": torch.ones(2, 4, 3, 3), "c.lora_up.weight": torch.ones(8, 2, 1, 1)}
    fits = lora_keys.match(state, {"c": "w"}, {"w": torch.Size((8, 4, 3, 3))})
    other = lora_keys.match(state, {"c": "w"}, {"w": torch.Size((8, 4, 1, 1))})
    assert (len(fits.targets), len(other.misfits)) == (1, 1)


METADATA = {
    "dgpo.step": "60", "dgpo.rewards": "shapes_graded=1", "dgpo.base": "embedded", "ss_network_dim": "4",
    "modelspec.architecture": "stable-diffusion-3/lora",
}  # fmt: skip


@pytest.mark.parametrize("names", [("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")])
def test_a_plain_product_is_read_at_scale_one(names: tuple[str, str]) -> None:
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    parts = {f"m.{names[0]}": a, f"m.{names[1]}": b}
    assert all(map(torch.equal, lora_keys.low_rank(parts), (a, b)))
    halved = lora_keys.low_rank({**parts, "m.alpha": torch.tensor(1.0)})
    assert all(map(torch.equal, halved, (a, b / 2)))
    convolution = {f"m.{names[0]}": a[:, :, None, None].half(), f"m.{names[1]}": b[:, :, None, None].half()}
    assert all(map(torch.equal, lora_keys.low_rank(convolution), (a.half().float(), b.half().float())))


@pytest.mark.parametrize(
    "more",
    [{"m.dora_scale": (6,)}, {"m.lora_mid.weight": (2, 2)}, {"m.lora_up.weight": (6, 3)}, {"m.lora_up.bias": (6,)}],
)
def test_what_is_no_plain_product_is_not_read(more: dict[str, tuple[int, ...]]) -> None:
    parts = {"m.lora_down.weight": torch.ones(2, 8), "m.lora_up.weight": torch.ones(6, 2)}
    assert lora_keys.low_rank({**parts, **{key: torch.ones(shape) for key, shape in more.items()}}) is None


def test_the_header_in_one_line() -> None:
    own = "DGPO step 60, rewards shapes_graded=1, base embedded, made for stable-diffusion-3, rank 4"
    assert lora_report.summary(METADATA) == own
    assert lora_report.summary({"ss_base_model_version": "sdxl_base_v1-0"}) == "made for sdxl_base_v1-0"
    assert lora_report.summary({}) == ""


def test_the_report_says_what_became_of_every_module() -> None:
    targets = {"a": "1", "b": "2", "c": "3", "d": "4"}
    found = lora_keys.Matches(targets, ("lora_te1_x", "gone"), ("wide",), ("half",), ("again",))
    unread = {"b": "b.lora_B.bias", "c": "c.lora_magnitude_vector", "d": "d.on_input"}
    assert lora_report.report(found, 1, unread, {}, with_clip=False) == (
        "1 of 9 modules applied; 1 of the text encoder left out: no CLIP is connected; 1 not in this model, such as "
        "gone; 1 of other shapes than this model's, such as wide; 1 incomplete, such as half; 1 given twice under two "
        "names, such as again; 1 in a form that ComfyUI does not know (LoRA with a bias), such as b; 1 in a form that "
        "ComfyUI does not know (DoRA), such as c; 1 in a form that ComfyUI does not know (IA3), such as d"
    )
    assert "2 not in this model" in lora_report.report(found, 2, {}, {}, with_clip=True)
    whole = lora_keys.Matches({"a": "1"})
    told = lora_report.report(whole, 1, {}, {"ss_network_dim": "4"}, with_clip=False)
    assert told == "1 of 1 modules applied; rank 4"


def test_what_a_header_says_is_shown_in_one_line_without_control_codes() -> None:
    told = lora_report.summary({"dgpo.base": "\x1b[2Jx\ny" + "z" * 500, "ss_network_dim": "\u202e4"})
    assert told.isprintable()
    assert len(told) < 300


@pytest.mark.parametrize(
    ("found", "unread", "with_clip", "sentence"),
    [
        (lora_keys.Matches({}, ("gone",)), {}, True, "has no layer of this model: it was made for stable-diffusion-3"),
        (lora_keys.Matches({}, ("text_encoder.x",)), {}, False, "changes only the text encoder: connect a CLIP"),
        (lora_keys.Matches({}, ("text_encoder.x",)), {}, True, "has no layer of this model"),
        (lora_keys.Matches({"a": "1"}), {"a": "a.on_input"}, True, "does not know (IA3, in a): convert it"),
        (lora_keys.Matches({}, (), ("a",)), {}, True, "a has other shapes than this model's"),
        (lora_keys.Matches({}, (), (), ("a",)), {}, True, "a has tensors that do not belong together"),
    ],
)
def test_the_sentence_where_nothing_fits(
    found: lora_keys.Matches, unread: dict[str, str], with_clip: bool, sentence: str
) -> None:
    assert sentence in lora_report.nothing_fits("x", found, unread, METADATA, with_clip)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_lora_keeps_its_tensors_and_metadata_through_a_file(lora_model: ModuleType, tmp_path: Path) -> None:
    shared = torch.arange(12.0).view(3, 4)
    lora = lora_model.LoraModel({"a.lora_A": shared[:, :2], "a.lora_B": shared.t().half()}, {"dgpo.step": 60})
    lora_model.write(tmp_path / "x.safetensors", lora, {"note": "n"})
    again = lora_model.read(tmp_path / "x.safetensors")
    assert again.metadata == {"dgpo.step": "60", "note": "n", "format": "pt"}
    assert all(torch.equal(again[key], lora[key]) and again[key].dtype == lora[key].dtype for key in lora)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_plain_dict_is_a_lora_too(lora_model: ModuleType, tmp_path: Path) -> None:
    lora_model.write(tmp_path / "x.safetensors", {"unet.a.lora_A.weight": torch.ones(1, 2)}, {})
    assert lora_model.read(tmp_path / "x.safetensors").metadata == {"format": "pt"}
    with pytest.raises(UserError, match="empty, so there is nothing to save"):
        lora_model.write(tmp_path / "y.safetensors", {}, {})


def test_files_that_are_no_lora_are_refused(lora_model: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    for name, sentence in (
        ("old.ckpt", "not a .safetensors file, and no other kind is read"),
        ("broken.safetensors", "not a readable .safetensors file"),
        ("gone.safetensors", "There is no LoRA file"),
    ):
        with pytest.raises(UserError, match=sentence):
            lora_model.read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "clean"),
    [("lora", "lora"), (" dgpo/a b_%year% ", "dgpo/a b_%year%"), ("x\\y.safetensors", "x/y"), ("v1.5/ä", "v1.5/ä")],
)
def test_names_within_the_folder(lora_model: ModuleType, name: str, clean: str) -> None:
    assert lora_model.check_name(name) == clean


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../x", "a/../../x", "..\\x", "/x", "\\x", "\\\\host\\x", "C:x", "C:\\x", "a/", "a//b", "a/ ",
     "a\0b", "a\nb", "x*", "x.", "...", ".safetensors"],
)  # fmt: skip
def test_names_that_would_lead_outside(lora_model: ModuleType, name: str) -> None:
    with pytest.raises(UserError, match="is no name for a LoRA"):
        lora_model.check_name(name)


def test_metadata_lines(lora_model: ModuleType) -> None:
    assert lora_model.parse_metadata("a = 1\n\n b=c=d ") == {"a": "1", "b": "c=d"}
    for text in ("a", "=b"):
        with pytest.raises(UserError, match="not of the form key=value"):
            lora_model.parse_metadata(text)


def test_numbers_count_up_over_all_folders(lora_model: ModuleType, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert lora_model.next_name([here, there], "x") == "x_00001.safetensors"
    for file in (here / "x_00001.safetensors", here / "x_y_00009.safetensors", there / "X_00041.pt"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert lora_model.next_name([here, there], "x") == "x_00042.safetensors"


def test_the_engines_own_file_is_matched(lora_model: ModuleType, tmp_path: Path) -> None:
    import tiny

    tiny.shared("sd15").save_lora(tmp_path / "x.safetensors")
    lora = lora_model.read(tmp_path / "x.safetensors")
    names = lora_file.read(tmp_path / "x.safetensors").modules
    flat = [name.removeprefix("unet.").replace(".", "_") for name in names]
    key_map = {f"lora_unet_{name}": f"diffusion_model.{i}.weight" for i, name in enumerate(flat)}
    found = lora_keys.match(lora, key_map, {})
    assert len(found.targets) == found.total == len(names) > 0
    assert lora_report.made_for(lora.metadata) == "sd_v1"
