"""Run by `test_lora.py` in ComfyUI's folder and interpreter: prints what the LoRA nodes did there, as JSON.

For each family, a small random network is put into ComfyUI's own class, a LoRA of the engine is loaded into it by the
node, and the predictions are compared with diffusers'.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(Path.cwd()), str(REPO / "tests" / "helpers"), str(REPO / "tests" / "comfy" / "packs")]
sys.path.append(str(REPO))  # last: `nodes` is ComfyUI's own
sys.modules["pack"] = types.ModuleType("pack")  # the pack's nodes, without the other files that its __init__ imports
sys.modules["pack"].__path__ = [str(REPO / "nodes")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import comfy.utils  # noqa: E402
import diffusers  # noqa: E402
import folder_paths  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dgpo_core.common.errors import UserError  # noqa: E402
from dgpo_core.policy import load_policy  # noqa: E402
from dgpo_core.policy.pipeline import DiffusersPolicy  # noqa: E402

lora = importlib.import_module("pack.lora")
lora_model = importlib.import_module("pack.common.lora_model")
CPU = torch.device("cpu")
DEMO = REPO / "dgpo_core" / "demo" / "model"
UNET = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
    "norm_num_groups": 32, "attention_head_dim": 4,
}  # fmt: skip
SD3 = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 64, "caption_projection_dim": 128,
    "pooled_projection_dim": 64, "pos_embed_max_size": 16,
}  # fmt: skip


@dataclass
class Native:
    """A network in ComfyUI's classes, and how it is called for a policy's prediction."""

    model: Any
    call: Callable[[Any, Tensor, Tensor, Any], Tensor]

    def patcher(self) -> Any:
        return comfy.model_patcher.ModelPatcher(self.model, load_device=CPU, offload_device=CPU)

    def predict(self, patcher: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        comfy.model_management.load_models_gpu([patcher])
        with torch.no_grad():
            return self.call(patcher.model.diffusion_model, x, t, cond.tensors)


def unet(sdxl: bool) -> diffusers.UNet2DConditionModel:
    """With attention on the way down, in the middle and on the way up, as the published ones have it."""
    if not sdxl:
        kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32}
        return diffusers.UNet2DConditionModel(**UNET, **kinds, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    return diffusers.UNet2DConditionModel(
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )


def native_unet(network: Any, sdxl: bool) -> Native:
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "use_spatial_transformer": True, "legacy": False, "num_heads": 4,
        "num_head_channels": -1, "context_dim": network.config.cross_attention_dim, "adm_in_channels": None,
        "transformer_depth": [1, 0], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 0, 0],
        "use_linear_in_transformer": sdxl, "use_temporal_attention": False, "use_temporal_resblock": False,
    }  # fmt: skip
    if sdxl:
        depths = {"transformer_depth": [0, 2], "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 2, 2]}
        config.update(
            depths, num_classes="sequential", adm_in_channels=network.config.projection_class_embeddings_input_dim
        )
    settings = (supported.SDXL if sdxl else supported.SD15)(config)
    settings.unet_config.update(num_heads=4, num_head_channels=-1)
    names = comfy.utils.unet_to_diffusers(settings.unet_config)
    state = {names[key]: value for key, value in network.state_dict().items()}

    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        y = None
        if sdxl:
            sizes = torch.tensor([tiny.SIZE, tiny.SIZE, 0, 0, tiny.SIZE, tiny.SIZE]).float()
            y = torch.cat([cond["pooled"], network.add_time_proj(sizes).reshape(1, -1)], 1)
        return model(x, t, context=cond["tokens"], y=y)

    return _native(settings, state, call)


def native_sd3(network: Any, dtype: torch.dtype = torch.float32) -> Native:
    """dtype: of the weights; they are cast to float32 where they are used."""
    state = comfy.model_detection.convert_diffusers_mmdit(_copy(network), "")
    settings = supported.SD3(comfy.model_detection.detect_unet_config(state, ""))
    return _native(settings, state, lambda model, x, t, cond: model(x, t, context=cond["tokens"],
                                                                   y=cond["pooled"]), dtype)  # fmt: skip


def native_flux(network: Any) -> Native:
    state = comfy.model_detection.convert_diffusers_mmdit(_copy(network), "")
    config = {  # what ComfyUI takes as given in all models of the family
        "in_channels": 4, "out_channels": 4, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2,
        "axes_dim": [4, 4, 8],
    }  # fmt: skip
    config = {**comfy.model_detection.detect_unet_config(state, ""), **config}

    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        guidance = torch.full((len(x),), 3.5)
        return model(x, t / 1000, cond["tokens"], y=cond["pooled"], guidance=guidance)

    return _native(supported.Flux(config), state, call)


def _native(
    settings: Any, state: dict[str, Tensor], call: Callable[..., Tensor], dtype: torch.dtype = torch.float32
) -> Native:
    settings.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    model = settings.get_model({})
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing, f"not converted: {missing}"
    assert not unexpected, f"not known: {unexpected}"
    return Native(model.eval(), call)


def _copy(network: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


FAMILIES: dict[str, tuple[Callable[[], Any] | None, Callable[[Any], Native]]] = {
    "sd15": (lambda: unet(sdxl=False), lambda network: native_unet(network, sdxl=False)),
    "sdxl": (lambda: unet(sdxl=True), lambda network: native_unet(network, sdxl=True)),
    "sd3": (lambda: diffusers.SD3Transformer2DModel(**SD3), native_sd3),
    "sd3.5": (
        lambda: diffusers.SD3Transformer2DModel(**SD3, qk_norm="rms_norm", dual_attention_layers=(0,)),
        native_sd3,
    ),
    "flux": (None, native_flux),
    "embedded": (None, native_sd3),
}
"""How the diffusers network is made (None: as it is) and put into ComfyUI's class."""


def model_folder(family: str, root: Path) -> Path:
    """A pipeline of the family with the network of FAMILIES, in diffusers format."""
    if family == "embedded":
        return DEMO
    base = family.removesuffix(".5")
    pipe = tiny.BUILDERS[base](root)
    make = FAMILIES[family][0]
    if make is not None:
        torch.manual_seed(1)
        name = "transformer" if base == "sd3" else "unet"
        pipe.register_modules(**{name: make()})
    pipe.save_pretrained(root / family)
    return root / family


def randomise(policy: DiffusersPolicy) -> None:
    """A LoRA that does something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def both(family: str, root: Path) -> tuple[Native, DiffusersPolicy]:
    """The same weights in ComfyUI's class and in a policy."""
    folder = model_folder(family, root)
    policy = load_policy(folder, rank=4, alpha=8.0, dtype="float32")
    network = type(policy.network).from_pretrained(folder, subfolder=policy.network_name, torch_dtype=torch.float32)
    return FAMILIES[family][1](network), policy


def apply(model: Any, name: str, clip: Any = None, state: Any = None) -> tuple[Any, Any, str]:
    """What the node gives out, run as ComfyUI runs it."""
    with torch.inference_mode():
        return lora.LoRALoader.execute(model, name, 1.0, 1.0, clip=clip, lora=state).result


def core_count(native: Native, state: dict[str, Tensor]) -> int:
    """How many modules ComfyUI's own LoRA loader applies."""
    patcher, _ = comfy.sd.load_lora_for_models(native.patcher(), None, state, 1.0, 1.0)
    return sum(len(patches) for patches in patcher.patches.values())


def kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's LoRA by the names that kohya's trainer gives it."""
    renamed = {}
    for key, value in state.items():
        module, _, part = key.removeprefix("unet.").rpartition(".lora_")
        renamed[f"lora_unet_{module.replace('.', '_')}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = value
    return renamed


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def compare(family: str, root: Path) -> tuple[Native, dict[str, Any]]:
    """Base and LoRA predictions of both sides, and what the loaders matched."""
    native, policy = both(family, root)
    randomise(policy)
    path = root / "loras" / f"{family}.safetensors"
    policy.save_lora(path, {"dgpo.step": "60", "dgpo.rewards": "shapes_graded=1", "dgpo.base": family})
    cond = policy.encode(["red"])[0]
    x = torch.randn(1, *policy.latent_shape(*policy.default_size), generator=torch.Generator().manual_seed(3))
    t = torch.tensor([300.0])
    with torch.no_grad():
        ours = policy.predict(x, t, cond)
        with policy.using(None):
            base = policy.predict(x, t, cond)
    model, state = native.patcher(), dict(lora_model.read(path))
    before = native.predict(model, x, t, cond)
    patched, clip, info = apply(model, path.name)
    after = native.predict(patched, x, t, cond)
    is_unet = all(key.startswith("unet.") for key in state)
    return native, {
        "info": info,
        "clip": clip,
        "base": difference(before, base),
        "lora": difference(after, ours),
        "effect": difference(ours, base),
        "restored": bool(torch.equal(native.predict(model, x, t, cond), before)),
        "untouched": not model.patches,
        "modules": len(policy.trainable()) // 2,
        "core": core_count(native, state),
        "core_kohya": core_count(native, kohya(state)) if is_unet else None,
    }


def text_encoder() -> Any:
    """A CLIP of ComfyUI's of which only one weight is there."""
    name = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    module = torch.nn.Module()
    for part in reversed(name.split(".")[1:]):
        inner, module = module, torch.nn.Module()
        module.add_module(part, inner if part != "q_proj" else torch.nn.Linear(8, 8, bias=False))
    whole = torch.nn.Module()
    whole.add_module("clip_l", module)
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model, clip.patcher = whole, comfy.model_patcher.ModelPatcher(whole, CPU, CPU)
    clip.tokenizer, clip.layer_idx, clip.tokenizer_options = None, None, {}
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    return clip


def error(function: Callable[[], Any]) -> str:
    """The sentence of the UserError that it raises; fails where it raises none."""
    try:
        function()
    except UserError as problem:
        return str(problem)
    raise AssertionError("no error")


def loader_cases(natives: dict[str, Native], root: Path) -> dict[str, Any]:
    """The loader on files that fit in part or not at all, on a connected LoRA, and with text encoders."""
    sd3 = natives["sd3"].patcher()
    state = lora_model.read(root / "loras" / "sd3.safetensors")
    pair = {".lora_A.weight": torch.ones(4, 8), ".lora_B.weight": torch.ones(8, 4)}
    strange = {f"transformer.transformer_blocks.9.attn.to_q{key}": value for key, value in pair.items()}
    misfit = {**state, "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 99)}
    text = {f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj{key}": value for key, value in pair.items()}
    first = "joint_blocks.0.x_block.attn.proj"
    native = {f"diffusion_model.{first}.lora_{way}.weight": torch.ones(shape) for way, shape in
              (("up", (128, 4)), ("down", (4, 128)))}  # fmt: skip
    _, clip, with_clip = apply(sd3, "none", text_encoder(), {**state, **text})
    return {
        "foreign": error(lambda: apply(natives["flux"].patcher(), "sd3.safetensors")),
        "unnamed": error(lambda: apply(natives["flux"].patcher(), "none", state=dict(state))),
        "only_text": error(lambda: apply(sd3, "none", state=text)),
        "partial": apply(sd3, "none", state={**state, **strange})[2],
        "misfit": apply(sd3, "none", state=misfit)[2],
        "connected": apply(sd3, "none", state=state)[2],
        "native": apply(sd3, "none", state=native)[2],
        "without_clip": apply(sd3, "none", state={**state, **text})[2],
        "with_clip": with_clip,
        "clip_patches": len(clip.patcher.patches),
        "untouched": not sd3.patches,
    }


def file_cases(root: Path) -> dict[str, Any]:
    """What the loader says of names, before and while it runs."""
    (root / "loras" / "old.pt").write_bytes(b"x")
    (root / "loras" / "broken.safetensors").write_bytes(b"x")
    (root / "outside.safetensors").write_bytes(b"x")
    check = lora.LoRALoader.validate_inputs
    return {
        "none": check(lora_name="none"),
        "linked": check(lora_name="none", lora=None),
        "there": check(lora_name="sd3.safetensors"),
        "absent": check(lora_name="gone.safetensors"),
        "outside": check(lora_name="../outside.safetensors"),
        "pickle": check(lora_name="old.pt"),
        "pickle_run": error(lambda: apply(None, "old.pt")),
        "broken": error(lambda: apply(None, "broken.safetensors")),
        "fingerprint": lora.LoRALoader.fingerprint_inputs(lora_name="sd3.safetensors", model=None),
    }


def save_cases(natives: dict[str, Native], root: Path) -> dict[str, Any]:
    """Saving twice, listing at once, loading what was saved, and names that are refused."""
    folder_paths.set_output_directory(str(root / "output"))
    folder_paths.get_filename_list("loras")  # cached from before
    state = lora_model.read(root / "loras" / "sd3.safetensors")
    first, second = (lora.SaveLoRA.execute(state, "dgpo/new", "note=a test") for _ in range(2))
    saved = first.result[0]
    again = lora_model.read(root / "output" / "loras" / saved)
    check = lora.SaveLoRA.validate_inputs
    names = ["", "../up", "/root/x", "C:\\x", "a//b", "a/..", "dgpo/lora"]
    return {
        "saved": [first.result[0], second.result[0]],
        "ui": first.ui.as_dict(),
        "listed": [name for name in folder_paths.get_filename_list("loras") if name.startswith("dgpo")],
        "offered": saved in lora.LoRALoader.INPUT_TYPES()["required"]["lora_name"][1]["options"],
        "same": all(torch.equal(again[key], state[key]) for key in state) and set(again) == set(state),
        "metadata": {**again.metadata, "own": set(state.metadata) <= set(again.metadata)},
        "info": apply(natives["sd3"].patcher(), saved)[2],
        "names": {name: check(name=name) for name in names},
        "linked": check(name=None, metadata="a=b"),
        "bad_metadata": check(name="x", metadata="no pair"),
        "left": sorted(p.name for p in (root / "output" / "loras" / "dgpo").iterdir()),
    }


def lacking_tooltips() -> list[str]:
    """Inputs and outputs that do not say what they are."""
    schemas = [node.GET_SCHEMA() for node in lora.NODES]
    return [f"{s.node_id}.{part.id}" for s in schemas for part in [*s.inputs, *s.outputs] if not part.tooltip]


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "loras").mkdir()
        folder_paths.add_model_folder_path("loras", str(root / "loras"))
        compared = {family: compare(family, root) for family in FAMILIES}
        natives = {family: native for family, (native, _) in compared.items()}
        result = {
            "families": {family: found for family, (_, found) in compared.items()},
            "loader": loader_cases(natives, root),
            "files": file_cases(root),
            "save": save_cases(natives, root),
            "lacking_tooltips": lacking_tooltips(),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
