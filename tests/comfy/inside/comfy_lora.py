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
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from comfy_networks import CPU, FAMILIES, Native  # noqa: E402
from torch import Tensor  # noqa: E402

from dgpo_core.common.errors import UserError  # noqa: E402
from dgpo_core.policy import load_policy  # noqa: E402
from dgpo_core.policy.pipeline import DiffusersPolicy  # noqa: E402

lora = importlib.import_module("pack.lora")
lora_model = importlib.import_module("pack.common.lora_model")
DEMO = REPO / "dgpo_core" / "demo" / "model"


def model_folder(family: str, root: Path) -> Path:
    """A pipeline of the family with the network of FAMILIES, in diffusers format."""
    if family == "embedded":
        return DEMO
    base = family.removesuffix(".5")
    pipe = tiny.BUILDERS[base](root)
    make = FAMILIES[family][0]
    if make is not None:
        torch.manual_seed(1)
        name = "unet" if base.startswith("sd") and base != "sd3" else "transformer"
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


def small_size(policy: DiffusersPolicy) -> tuple[int, int]:
    """As its pictures are, but small."""
    return tuple(min(side, 2 * tiny.SIZE) for side in policy.default_size)


def compare(family: str, root: Path) -> tuple[Native, dict[str, Any]]:
    """Base and LoRA predictions of both sides, and what the loaders matched."""
    native, policy = both(family, root)
    randomise(policy)
    path = root / "loras" / f"{family}.safetensors"
    policy.save_lora(path, {"dgpo.step": "60", "dgpo.rewards": "shapes_graded=1", "dgpo.base": family})
    cond = policy.encode(["red"])[0]
    x = torch.randn(1, *policy.latent_shape(*small_size(policy)), generator=torch.Generator().manual_seed(3))
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
