"""`--lora.init` reads LoRAs of other trainers at their own scale, and says of the others what they are."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.policy import FAMILIES, load_policy
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.lora import names as lora_names

CASES = Path(__file__).parents[1] / "cases" / "loras"
RANK = 2


def write(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path, dict(metadata or {}))
    return path


def pair(out: int, into: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A [2, in] and B [out, 2]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, into, generator=g), torch.randn(out, RANK, generator=g)


def kohya(name: str, a: Tensor, b: Tensor, alpha: float = 1.0) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(alpha)}


def resolved(family: str, path: Path) -> Mapping[str, tuple[Tensor, Tensor]]:
    """The file under the names of the tiny network of a family."""
    policy = tiny.shared(family)
    return lora_names.resolve(lora_file.read(path), policy.network, policy.makers_names).weights


# --- names -----------------------------------------------------------------------------------------------------------

FUSED = {  # name of the makers: the modules whose rows lie in it, and their number
    ("sd3", "joint_blocks.0.x_block.attn.qkv"): {f"transformer_blocks.0.attn.to_{c}": 16 for c in "qkv"},
    ("sd3", "joint_blocks.1.context_block.attn.qkv"): {f"transformer_blocks.1.attn.add_{c}_proj": 16 for c in "qkv"},
    ("flux", "double_blocks.0.img_attn.qkv"): {f"transformer_blocks.0.attn.to_{c}": 32 for c in "qkv"},
    ("flux", "double_blocks.0.txt_attn.qkv"): {f"transformer_blocks.0.attn.add_{c}_proj": 32 for c in "qkv"},
    ("flux", "single_blocks.0.linear1"): {
        **{f"single_transformer_blocks.0.attn.to_{c}": 32 for c in "qkv"},
        "single_transformer_blocks.0.proj_mlp": 128,
    },
    ("chroma", "double_blocks.0.txt_attn.qkv"): {f"transformer_blocks.0.attn.add_{c}_proj": 32 for c in "qkv"},
    ("flux2", "double_blocks.0.img_attn.qkv"): {f"transformer_blocks.0.attn.to_{c}": 32 for c in "qkv"},
    ("flux2", "double_blocks.0.txt_attn.qkv"): {f"transformer_blocks.0.attn.add_{c}_proj": 32 for c in "qkv"},
    ("zimage", "layers.1.attention.qkv"): {f"layers.1.attention.to_{c}": 32 for c in "qkv"},
    ("zimage", "noise_refiner.0.attention.qkv"): {f"noise_refiner.0.attention.to_{c}": 32 for c in "qkv"},
    ("sana", "blocks.1.attn.qkv"): {f"transformer_blocks.1.attn1.to_{c}": 32 for c in "qkv"},
    ("sana", "blocks.0.cross_attn.kv_linear"): {f"transformer_blocks.0.attn2.to_{c}": 32 for c in "kv"},
}


@pytest.mark.slow
@pytest.mark.parametrize("style", ["kohya", "generic"])
@pytest.mark.parametrize(("family", "name"), list(FUSED))
def test_a_fused_layer_is_taken_apart_by_rows_at_its_scale(family: str, name: str, style: str, tmp_path: Path) -> None:
    rows = FUSED[family, name]
    a, b = pair(sum(rows.values()), 16 if family == "sd3" else 32)
    key = f"lora_unet_{name.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{name}"
    found = resolved(family, write(tmp_path / "x.safetensors", kohya(key, a, b)))
    assert list(found) == list(rows)
    parts = b.split(list(rows.values()))
    for (module, (own_a, own_b)), part in zip(found.items(), parts, strict=True):
        assert torch.equal(own_a, a)
        assert torch.equal(own_b, part / 2), module  # alpha 1 of rank 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "module"),
    [
        ("sdxl", "lora_unet_input_blocks_3_0_in_layers_2", "down_blocks.1.resnets.0.conv1"),
        ("sdxl", "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k",
         "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
        ("sdxl", "lora_unet_down_blocks_1_attentions_0_proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("sd15", "lora_unet_mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
        ("sd15", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
         "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ("sd3", "transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        ("sd3", "base_model.model.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        ("sd3", "lora_transformer_transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"),
        ("sd3", "lora_unet_joint_blocks_0_x_block_mlp_fc1", "transformer_blocks.0.ff.net.0.proj"),
        ("flux", "lycoris_transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"),
        ("flux", "transformer.single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_mlp"),
        ("chroma", "lora_unet_distilled_guidance_layer_layers_0_in_layer",
         "distilled_guidance_layer.layers.0.linear_1"),
        ("flux2", "lora_unet_single_blocks_1_linear1", "single_transformer_blocks.1.attn.to_qkv_mlp_proj"),
        ("flux2", "diffusion_model.single_blocks.0.linear2", "single_transformer_blocks.0.attn.to_out"),
        ("qwenimage", "lora_unet_transformer_blocks_0_img_mod_1", "transformer_blocks.0.img_mod.1"),
        ("qwenimage", "diffusion_model.transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_out.0"),
        ("zimage", "diffusion_model.layers.0.attention.to_q", "layers.0.attention.to_q"),
        ("zimage", "lora_unet_context_refiner_0_attention_out", "context_refiner.0.attention.to_out.0"),
        ("zimage", "diffusion_model.layers.0.feed_forward.w1", "layers.0.feed_forward.w1"),
        ("sana", "lora_unet_blocks_1_cross_attn_proj", "transformer_blocks.1.attn2.to_out.0"),
        ("sana", "lora_unet_blocks_0_mlp_point_conv_conv", "transformer_blocks.0.ff.conv_point"),
        ("wan", "diffusion_model.blocks.1.cross_attn.o", "blocks.1.attn2.to_out.0"),
        ("wan", "lora_unet_blocks_0_self_attn_q", "blocks.0.attn1.to_q"),
        ("wan", "diffusion_model.blocks.0.ffn.2", "blocks.0.ffn.net.2"),
        ("wan", "transformer.blocks.0.attn2.to_k", "blocks.0.attn2.to_k"),
        ("wan", "lora_unet_time_projection_1", "condition_embedder.time_proj"),
        ("wan", "diffusion_model.head.head", "proj_out"),
        ("hidream", "lora_unet_double_stream_blocks_1_block_attn1_to_out_t",
         "double_stream_blocks.1.block.attn1.to_out_t"),
        ("hidream", "lycoris_single_stream_blocks_0_block_attn1_to_q", "single_stream_blocks.0.block.attn1.to_q"),
        ("hidream", "diffusion_model.double_stream_blocks.0.block.ff_i.experts.3.w2",
         "double_stream_blocks.0.block.ff_i.experts.3.w2"),
    ],
)  # fmt: skip
def test_names_of_other_trainers_mean_the_networks_own_modules(
    family: str, name: str, module: str, tmp_path: Path
) -> None:
    layer = tiny.shared(family).network.get_submodule(module)
    out, into, *kernel = layer.weight.shape
    a, b = torch.randn(RANK, into, *kernel), torch.randn(out, RANK, *[1] * len(kernel))
    found = resolved(family, write(tmp_path / "x.safetensors", kohya(name, a, b, alpha=4.0)))
    assert list(found) == [module]
    assert torch.equal(found[module][1], 2 * b.flatten(1))


@pytest.mark.slow
def test_a_convolution_is_continued_from(tmp_path: Path) -> None:
    module = "down_blocks.1.resnets.0.conv1"
    out, into, *kernel = tiny.shared("sdxl").network.get_submodule(module).weight.shape
    a, b = torch.randn(RANK, into, *kernel), torch.randn(out, RANK, 1, 1)
    name = "lora_unet_input_blocks_3_0_in_layers_2"
    policy = load_policy(tiny.folder("sdxl"), init_lora=write(tmp_path / "x.safetensors", kohya(name, a, b, alpha=2.0)))
    state = policy.adapter_state("current")
    assert torch.equal(state[f"{module}.lora_A.weight"], a)
    assert torch.equal(state[f"{module}.lora_B.weight"], b)
    policy.save_lora(tmp_path / "y.safetensors")
    again = load_policy(tiny.folder("sdxl"), init_lora=tmp_path / "y.safetensors").adapter_state("current")
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_a_layer_that_is_changed_under_two_names_is_told(tmp_path: Path) -> None:
    a, b = pair(16, 16)
    state = {**kohya("transformer.transformer_blocks.0.attn.to_q", a, b)}
    state |= kohya("lora_unet_joint_blocks_0_x_block_attn_qkv", a, pair(48, 16)[1])
    with pytest.raises(UserError, match=r"changes transformer_blocks\.0\.attn\.to_q twice"):
        resolved("sd3", write(tmp_path / "x.safetensors", state))


def test_a_fused_layer_of_another_size_is_told(tmp_path: Path) -> None:
    state = kohya("lora_unet_joint_blocks_0_x_block_attn_qkv", *pair(99, 16))
    with pytest.raises(UserError, match="48 rows in the model and 99 in the file"):
        resolved("sd3", write(tmp_path / "x.safetensors", state))


def test_kohyas_names_of_sdxl_are_read(tmp_path: Path) -> None:
    """The file is of a model with two resnets per stage, as the published ones have them."""
    network = tiny.unet(sdxl=True, layers_per_block=2)
    file = lora_file.read(CASES / "sdxl_kohya_sgm_names.safetensors")
    found = lora_names.resolve(file, network, FAMILIES["sdxl"].makers_names).weights
    assert list(found) == ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]


# --- scale -----------------------------------------------------------------------------------------------------------

TO_Q = "transformer.transformer_blocks.0.attn.to_q"
HEADERS: dict[str, tuple[dict[str, Any], float]] = {
    "alpha": ({"r": 2, "lora_alpha": 8}, 4.0),
    "of another rank": ({"r": 32, "lora_alpha": 8, "rank_pattern": {"to_q": 2}}, 4.0),
    "pattern": ({"lora_alpha": 8, "alpha_pattern": {"attn.to_q": 3}}, 1.5),
    "pattern of another": ({"lora_alpha": 8, "alpha_pattern": {"n.to_q": 3}}, 4.0),
    "rank-stabilised": ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
    "no alpha": ({"r": 2}, 1.0),
    "a later version's": ({"lora_alpha": 2, "quantum": {"a": [1]}}, 1.0),
}


@pytest.mark.parametrize("where", ["header", "beside"])
@pytest.mark.parametrize("name", list(HEADERS))
def test_alpha_beside_the_weights_counts_as_peft_counts_it(name: str, where: str, tmp_path: Path) -> None:
    settings, scale = HEADERS[name]
    a, b = pair(16, 16)
    prefix = "transformer" if where == "header" else "base_model.model"
    module = TO_Q.replace("transformer", prefix, 1)
    state = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    path = write(tmp_path / "x.safetensors", state, header if where == "header" else None)
    found = lora_file.read(path).weights[module][1]
    torch.testing.assert_close(found, scale * b, rtol=1e-6, atol=0)  # one rounding of float32


def test_a_module_of_its_own_alpha_counts_before_the_header(tmp_path: Path) -> None:
    a, b = pair(16, 16)
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 100})}
    path = write(tmp_path / "x.safetensors", kohya(TO_Q, a, b, alpha=2.0), header)
    assert torch.equal(lora_file.read(path).weights[TO_Q][1], b)


def test_the_case_of_alpha_in_the_header() -> None:
    (b,) = (b for _, b in lora_file.read(CASES / "header_alpha.safetensors").weights.values())
    (plain,) = (t for key, t in load_file(CASES / "header_alpha.safetensors").items() if "lora_B" in key)
    assert torch.equal(b, 4 * plain)


# --- what is refused, each by its name -------------------------------------------------------------------------------

A, B = torch.ones(2, 16), torch.ones(16, 2)
PLAIN = {"lora_A.weight": A, "lora_B.weight": B}
MODULES: dict[str, tuple[dict[str, Tensor], str]] = {
    "DoRA of peft": ({**PLAIN, "lora_magnitude_vector": torch.ones(16)}, "to_q is of the form DoRA"),
    "DoRA of LyCORIS": ({**PLAIN, "dora_scale": torch.ones(16, 1)}, "of the form DoRA"),
    "bias": ({**PLAIN, "lora_B.bias": torch.ones(16)}, "of the form LoRA with a bias"),
    "middle": ({"lora_down.weight": A, "lora_up.weight": B, "lora_mid.weight": torch.ones(2, 2)}, "with a middle"),
    "LoHa": ({f"hada_w{i}_{ab}": A for i in (1, 2) for ab in "ab"}, "LoHa; apply it in ComfyUI with DGPO LoRA Loader"),
    "LoKr": ({"lokr_w1": A, "lokr_w2": B}, "LoKr"),
    "OFT": ({"oft_blocks": torch.ones(2, 2, 2)}, "OFT"),
    "peft's OFT": ({"oft_R.default.weight": A}, "OFT"),
    "GLoRA": ({f"{x}{i}.weight": A for x in "ab" for i in (1, 2)}, "GLoRA"),
    "IA3": ({"weight": torch.ones(16), "on_input": torch.zeros(1)}, "IA3"),
    "peft's IA3": ({"ia3_l": torch.ones(16)}, "IA3"),
    "VeRA": ({"vera_lambda_b": torch.ones(16)}, "VeRA"),
    "full": ({"diff": torch.ones(16, 16)}, "full difference"),
    "a norm": ({"w_norm": torch.ones(16), "b_norm": torch.ones(16)}, "full difference"),
    "XLabs": ({"processor.qkv_lora1.down.weight": A, "processor.qkv_lora1.up.weight": B}, "XLabs' LoRA"),
    "half": ({"lora_A.weight": A}, "A and B of .*to_q do not belong together"),
    "other rank": ({"lora_A.weight": A, "lora_B.weight": torch.ones(16, 3)}, "do not belong together"),
    "one dimension": ({"lora_A.weight": torch.ones(2), "lora_B.weight": B}, "do not belong together"),
    "no dimension": ({"lora_A.weight": torch.tensor(1.0), "lora_B.weight": B}, "do not belong together"),
    "alpha alone": ({**PLAIN, "x.alpha": torch.tensor(1.0)}, "do not belong together"),
    "alpha of three": ({**PLAIN, "alpha": torch.ones(3)}, "to_q has an alpha of 3 numbers"),
    "alpha of NaN": ({**PLAIN, "alpha": torch.tensor(torch.nan)}, "not finite"),
    "NaN": ({"lora_A.weight": A, "lora_B.weight": B * torch.nan}, "to_q holds numbers that are not finite"),
    "infinite": ({"lora_A.weight": A / 0, "lora_B.weight": B}, "to_q holds numbers that are not finite"),
    "half precision": ({"lora_A.weight": (A / 0).to(torch.float8_e5m2), "lora_B.weight": B}, "not finite"),
    "whole numbers": ({"lora_A.weight": A.int(), "lora_B.weight": B}, "of the type int32"),
    "no rank": ({"lora_A.weight": A[:0], "lora_B.weight": B[:, :0]}, "has an empty tensor"),
    "a million": ({"lora_A.weight": torch.ones(10**6, 1), "lora_B.weight": torch.ones(1, 10**6)}, "rank 1000000"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MODULES))
def test_what_is_no_plain_lora_is_named_with_the_module(name: str, tmp_path: Path) -> None:
    parts, says = MODULES[name]
    path = write(tmp_path / "x.safetensors", {f"{TO_Q}.{end}": tensor for end, tensor in parts.items()})
    with pytest.raises(UserError, match=says):
        lora_file.read(path)


def test_whole_and_flat_alphas_are_numbers_too(tmp_path: Path) -> None:
    for alpha in (torch.tensor(4), torch.tensor([4.0]), torch.tensor([[4]])):
        state = {f"{TO_Q}.{end}": tensor for end, tensor in {**PLAIN, "alpha": alpha}.items()}
        assert torch.equal(lora_file.read(write(tmp_path / "x.safetensors", state)).weights[TO_Q][1], 2 * B)


@pytest.mark.parametrize(
    "key", ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.x.q_proj", "text_encoder_2.x", "lora_te3_x"]
)
def test_text_encoders_are_told(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="also changes the text encoder, which DGPO does not train"):
        lora_file.read(write(tmp_path / "x.safetensors", {**kohya(TO_Q, A, B), **kohya(key, A, B)}))


HEADER_TEXTS = {
    "text": ("hello", "is not valid JSON"),
    "list": ("[1]", "must be an object of settings"),
    "number": ("3", "must be an object of settings"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "digits": ('{"transformer.lora_alpha": ' + "9" * 5000 + "}", "is not valid JSON|digits"),
    "text for a number": ('{"transformer.lora_alpha": "8"}', "lora_alpha must be a number, not 8"),
    "list for a number": ('{"transformer.lora_alpha": [8]}', "lora_alpha must be a number"),
    "yes for a number": ('{"transformer.lora_alpha": true}', "lora_alpha must be a number"),
    "NaN": ('{"transformer.lora_alpha": NaN}', "lora_alpha must be a number|not valid JSON"),
    "beyond": ('{"transformer.lora_alpha": 1e999}', "lora_alpha must be a number"),
    "patterns": ('{"transformer.lora_alpha": 8, "transformer.alpha_pattern": 3}', "alpha_pattern must be an object"),
    "pattern": ('{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"q": "x"}}', "pattern must be a number"),
    "expression": ('{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"(a+)+$": 1}}', "no name of modules"),
    "DoRA": ('{"transformer.use_dora": true, "transformer.lora_alpha": 8}', "says that it is a DoRA"),
    "PiSSA": ('{"transformer.init_lora_weights": "pissa_niter_4"}', "changes the base model too"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HEADER_TEXTS))
def test_a_header_that_cannot_be_is_one_sentence(name: str, tmp_path: Path) -> None:
    text, says = HEADER_TEXTS[name]
    path = write(tmp_path / "x.safetensors", kohya(TO_Q, A, B), {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=says):
        lora_file.read(path)


def whole(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


KEY = f'"{TO_Q}.lora_A.weight"'
BYTES = {
    "nothing": b"",
    "cut": whole(b'{"a"', 100),
    "endless": whole(b"{}", 10**18),
    "no JSON": whole(b"hello"),
    "no object": whole(b"[1]"),
    "deep": whole(b'{"a":' + b"[" * 100_000),
    "numbers in the metadata": whole(b'{"__metadata__": {"dgpo.step": 3}}'),
    "size": whole(f'{{{KEY}: {{"dtype": "F32", "shape": [2, 16], "data_offsets": [0, 8]}}}}'.encode(), data=bytes(8)),
    "beyond": whole(f'{{{KEY}: {{"dtype": "F32", "shape": [{10**18}, 16], "data_offsets": [0, 8]}}}}'.encode()),
    "type": whole(f'{{{KEY}: {{"dtype": "F77", "shape": [2], "data_offsets": [0, 8]}}}}'.encode(), data=bytes(8)),
    "rare type": whole(f'{{{KEY}: {{"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}}}'.encode(), data=bytes(8)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BYTES))
def test_a_damaged_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BYTES[name])
    with pytest.raises(UserError, match=r"is not a readable \.safetensors file|has no tensors|cannot be used"):
        lora_file.read(path)


def test_what_is_no_file_is_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path, says in (
        (tmp_path / "gone.safetensors", "There is no LoRA file"),
        (tmp_path, "no ordinary file"),
        (tmp_path / "pipe.safetensors", "no ordinary file"),
        (tmp_path / ("x" * 5000), "not a readable"),
        (tmp_path / "a\0b", "not a readable"),
    ):
        with pytest.raises(UserError, match=says):
            lora_file.read(path)


def test_a_whole_model_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)})
    with pytest.raises(UserError, match="is a whole model"):
        lora_file.read(path)


def test_the_case_with_a_nan_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(UserError, match=r"lora_unet_down_blocks_1\w+ holds numbers that are not finite"):
        load_policy("there/is-none", init_lora=CASES / "NaN_inside.safetensors")
