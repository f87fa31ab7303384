"""Run by `test_native.py` in ComfyUI's folder and interpreter: prints what the native policy did there, as JSON.

For each family, a small random network is put into ComfyUI's own class with weights as its loaders make them (inference
tensors), and a policy on it is compared with plain autograd on a second copy of the same weights.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfy_native_case import Case, native_policy, randomise, worst  # first: it finds ComfyUI
from comfy_native_models import NATIVES, SIDE, network

# isort: split
import comfy.latent_formats
import comfy.model_sampling
import comfy.ops
import comfy.sd
import comfy.utils
import comfy_extras.nodes_model_advanced as nodes_model_advanced
import comfy_lora
import comfy_native_node
import comfy_networks
import folder_paths
import torch
from bright import Bright, register
from comfy_lora import difference
from torch import nn
from torch.nn.attention import SDPBackend

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import Cond
from dgpo_core.settings.config import Config, DataConfig, RewardTerm, RolloutConfig, TrainingConfig

native_hooks = importlib.import_module("pack.on_model.hooks")
native_texts = importlib.import_module("pack.on_model.texts")
FAMILIES = os.environ.get("FAMILIES", " ".join(NATIVES)).split()


def training(case: Case) -> dict[str, Any]:
    """Gradients against plain autograd, with and without checkpointing."""
    policy = case.policy()
    x, t, _ = case.inputs()
    cond = policy.encode(["red"])[0].expand(3)
    with torch.no_grad(), policy.using(None):
        base = difference(policy.predict(x, t, cond), case.reference())
    randomise(policy)
    expected, grads = case.plain_gradients(policy)
    found, ours, saved = case.gradients(policy)
    policy.to("cpu")
    policy.enable_gradient_checkpointing()
    found_again, ours_again, _ = case.gradients(policy)
    blocks = len(native_hooks._blocks(case.native.model.diffusion_model))
    others = [
        *case.native.model.parameters(),
        *policy.adapter_state("old").values(),
        *policy.adapter_state("ema").values(),
    ]
    policy.to("cpu")
    return {
        "base": base,
        "prediction": difference(found, expected),
        "effect": difference(found, case.reference()),
        "gradient": worst(ours, grads),
        "checkpointed": [difference(found_again, found), worst(ours_again, ours)],
        "blocks": blocks,
        "saved": saved,
        "targets": len(ours) // 2,
        "reached": sum(bool(g.abs().max() > 0) for g in ours.values()),
        "others": sum(p.grad is not None for p in others),
    }


def rows(case: Case) -> dict[str, float]:
    """A batch of several texts is the same as its rows alone."""
    policy = case.policy()
    randomise(policy)
    x, t, _ = case.inputs()
    conds = policy.encode(["red", "blue", "red"])
    with torch.no_grad():
        whole = policy.predict(x, t, Cond.cat(conds))
        alone = torch.cat([policy.predict(x[i : i + 1], t[i : i + 1], conds[i]) for i in range(3)])
        policy.to("cpu")
    return {"rows": difference(whole, alone), "texts": difference(whole[1:2], whole[2:3])}


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What ComfyUI logs of LoRA keys that it does not know."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger().removeHandler(handler)


def saving(case: Case, root: Path) -> dict[str, Any]:
    """The file, applied by ComfyUI's own loader, does what the trained model does; on a MODEL with a LoRA, too."""
    policy = case.policy()
    randomise(policy)
    path = root / f"{case.family}.safetensors"
    policy.save_lora(path, {"dgpo.step": "1"})
    state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    with warnings() as told, torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(case.model, None, state, 1.0, 0)[0]
    x, t, _ = case.inputs()
    cond = policy.encode(["red"])[0].expand(3)
    with torch.no_grad():
        trained = policy.predict(x, t, cond)
        loaded = case.native.predict(patched, x, t, case.clip.tensors("red").expand(3))
        on_top = case.policy(patched, seed=9)
        with on_top.using(None):
            again = on_top.predict(x, t, on_top.encode(["red"])[0].expand(3))
        on_top.to("cpu")
        after = case.native.predict(patched, x, t, case.clip.tensors("red").expand(3))
    return {
        "keys": len(state),
        "patched": len(patched.patches),
        "not_loaded": [line for line in told if "not loaded" in line],
        "loaded": difference(loaded, trained),
        "on_top": difference(again, trained),
        "still_there": bool(torch.equal(after, loaded)),
        "metadata": metadata,
    }


def restoring(case: Case) -> dict[str, bool]:
    """KSampler draws the same before and after a training, also one that an error has cut short."""
    before, keys = case.drawn(), set(case.native.model.state_dict())
    policy = case.policy()
    randomise(policy)
    case.gradients(policy)
    kept = set(case.native.model.state_dict()) == keys
    after = case.drawn()
    policy.patcher.model_options["model_function_wrapper"] = lambda *_: 1 / 0
    failed = False
    try:
        case.gradients(policy)
    except ZeroDivisionError:
        failed = True
    return {
        "after": bool(torch.equal(before, after)),
        "after_error": failed and bool(torch.equal(before, case.drawn())),
        "keys": kept,
        "clean": not any("forward" in vars(m) for m in case.native.model.modules()),
        "inference": all(p.is_inference() for p in case.native.model.diffusion_model.parameters()),
    }


def iterating(case: Case, checkpointing: bool) -> dict[str, Any]:
    """Two iterations of the engine's trainer."""
    before = case.drawn()
    policy = case.policy()
    if checkpointing:
        policy.enable_gradient_checkpointing()
    config = Config(
        reward=(RewardTerm("bright"),),
        data=DataConfig(held_out="", groups_per_iteration=2),
        rollout=RolloutConfig(group_size=4, steps=4, solver="euler", cfg=2.0),
        training=TrainingConfig(timesteps=2, t_min=0.0, lr=1e-2, micro_batch=8),
    )
    size = (8 * SIDE, 8 * SIDE)
    trainer = Trainer(policy, [Prompt("red"), Prompt("blue")], {"bright": Bright()}, config, size=size)
    done = [trainer.iterate() for _ in range(2)]
    policy.to("cpu")
    pixels = done[0].groups[0].images
    return {
        "metrics": [dict(iteration.metrics) for iteration in done],
        "images": [list(pixels.shape), float(pixels.min()), float(pixels.max())],
        "spread": float(pixels.std(0).max()),
        "moved": max(float(p.detach().abs().max()) for key, p in policy.trainable().items() if "lora_B" in key),
        "finite": all(bool(p.isfinite().all()) for p in policy.trainable().values()),
        "restored": bool(torch.equal(case.drawn(), before)),
    }


def pictures(case: Case) -> dict[str, Any]:
    """Latents and pictures, by the VAE."""
    policy = case.policy()
    decoded = policy.decode(case.inputs()[0])
    encoded = policy.encode_images(decoded)
    alone = torch.cat([policy.encode_images(picture) for picture in decoded.split(1)])
    return {
        "latents": list(policy.latent_shape(8 * SIDE, 8 * SIDE)),
        "decoded": list(decoded.shape),
        "encoded": list(encoded.shape),
        "alone": difference(encoded, alone),
    }


def kinds(case: Case) -> dict[str, Any]:
    """The MODEL's own noise schedule counts, also one that a node has put on it."""
    v_sampling = type("V", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION), {})
    v_model = case.model.clone()
    v_model.add_object_patch("model_sampling", v_sampling(case.native.model.model_config, zsnr=True))
    policy = case.policy(v_model)
    x, t, _ = case.inputs()
    with torch.no_grad(), policy.using(None):
        found = policy.predict(x, t, policy.encode(["red"])[0].expand(3))
    by_hand = case.policy(prediction="v")
    with torch.no_grad(), by_hand.using(None):
        decided = by_hand.predict(x, t, by_hand.encode(["red"])[0].expand(3))
    by_hand.to("cpu")
    with torch.no_grad(), policy.using(None):
        last = policy.predict(x[:1], torch.tensor([999.0]), policy.encode(["red"])[0])
    policy.to("cpu")
    alpha, _ = policy.prediction.coefficients(torch.tensor([999.0]))
    return {
        "kinds": [case.policy().prediction.name, policy.prediction.name, by_hand.prediction.name],
        "v": difference(found, case.reference()),
        "by_hand": difference(decided, case.reference()),
        "own": case.policy(prediction="epsilon").patcher.object_patches == {},
        "terminal": float(alpha),
        "finite": bool(last.isfinite().all()),
    }


def sampling_nodes(case: Case) -> dict[str, str]:
    """What ComfyUI's own node puts on a MODEL: which prediction it is then, or why it is refused."""
    found = {}
    for sampling in ("eps", "v_prediction", "lcm", "x0"):
        for zsnr in (False, True):
            (patched,) = nodes_model_advanced.ModelSamplingDiscrete().patch(case.model, sampling, zsnr)
            try:
                found[f"{sampling} {zsnr}"] = case.policy(patched).prediction.name
            except UserError as error:
                found[f"{sampling} {zsnr}"] = str(error)
    (edm,) = nodes_model_advanced.ModelSamplingContinuousEDM().patch(case.model, "v_prediction", 120.0, 0.002)
    found["edm"] = comfy_lora.error(lambda: case.policy(edm))
    (flow,) = nodes_model_advanced.ModelSamplingSD3().patch(case.model, 3.0)
    found["flow"] = case.policy(flow).prediction.name
    return found


def cast(dtype: torch.dtype) -> dict[str, float]:
    """Gradients on weights that are kept in another type and cast where they are used."""
    case = Case("sd3")
    with torch.inference_mode():
        case.native = comfy_networks.native_sd3(network("sd3"), dtype)
    case.native.model.latent_format = comfy.latent_formats.SD15()
    case.model = case.native.patcher()
    rounded = {key: value.float() for key, value in case.native.model.diffusion_model.state_dict().items()}
    case.plain.model.diffusion_model.load_state_dict(rounded)
    policy = case.policy()
    randomise(policy)
    expected, grads = case.plain_gradients(policy)
    found, ours, _ = case.gradients(policy)
    policy.to("cpu")
    return {"prediction": difference(found, expected), "gradient": worst(ours, grads)}


def refused(case: Case) -> dict[str, str]:
    """MODELs that cannot be trained on."""
    other = case.model.clone()
    other.add_object_patch("model_sampling", comfy.model_sampling.ModelSamplingContinuousEDM())
    found = {
        "schedule": comfy_lora.error(lambda: case.policy(other)),
        "targets": comfy_lora.error(lambda: case.policy(targets=("nowhere",))),
        "size": comfy_lora.error(lambda: case.policy().latent_shape(100, 128)),
    }
    layer = next(m for m in case.native.model.diffusion_model.modules() if isinstance(m, nn.Linear))
    weight, layer.weight = layer.weight, nn.Parameter(torch.ones(8, dtype=torch.uint8), requires_grad=False)  # bytes
    found["quantised"] = comfy_lora.error(lambda: case.policy())
    layer.weight = weight
    case.native.model.latent_format = comfy.latent_formats.StableAudio1()
    found["sound"] = comfy_lora.error(lambda: case.policy())
    case.native.model.latent_format = comfy.latent_formats.SD15()
    return found


def hooks_of_others(case: Case) -> dict[str, bool]:
    """Another's forward on a layer is run, and is there afterwards."""
    layer = next(m for m in case.native.model.diffusion_model.modules() if isinstance(m, nn.Linear))
    theirs = functools.partial(lambda original, x: original(x) * 1.5, layer.forward)
    layer.forward = theirs
    policy = case.policy()
    x, t, _ = case.inputs()
    with torch.no_grad(), policy.using(None):
        found = policy.predict(x, t, policy.encode(["red"])[0].expand(3))
        policy.to("cpu")
        there = layer.forward is theirs
        plain = case.native.predict(case.model, x, t, case.clip.tensors("red").expand(3))
    del layer.forward
    return {"run": difference(found, plain) < 1e-5, "there": there}


def texts(case: Case) -> dict[str, Any]:
    """A text is encoded once, and again only after very many others."""
    encoded = []
    policy = case.policy()
    encode, kept, most = policy._encode, native_policy._KEPT, native_policy._KEPT_BYTES
    policy._encode = lambda text, *others: encoded.append(text) or encode(text, *others)
    native_policy._KEPT = 2
    first = policy.encode(["red"])[0]
    policy.encode(["red", "blue", "red"])
    known = policy.is_encoded(["red", "blue"]), policy.is_encoded(["green"])
    policy.encode(["green", "white"])
    dropped = not policy.is_encoded(["red"])
    x, t, _ = case.inputs()
    with torch.no_grad():
        policy.predict(x[:1], t[:1], first)
    policy.to("cpu")
    native_policy._KEPT, native_policy._KEPT_BYTES = kept, 2 * native_texts.size(policy._conditioning(0))
    policy.encode(["black", "grey", "black"])
    by_size = [policy.is_encoded([text]) for text in ("white", "red", "grey", "black")]
    native_policy._KEPT_BYTES = most
    return {"encoded": encoded, "known": known, "dropped": dropped, "by_size": by_size}


def kernels(case: Case) -> dict[str, list[str]]:
    """The attention kernels that ComfyUI may choose while the policy predicts, where it has an order of its own."""
    policy, seen = case.policy(), []
    x, t, _ = case.inputs()
    first = policy.encode(["red"])[0]
    attend = comfy.ops.scaled_dot_product_attention
    comfy.ops.SDPA_BACKEND_PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.extend(kernel.name for kernel in comfy.ops.SDPA_BACKEND_PRIORITY)
        seen.extend(["CUDNN_BY_TORCH"] * torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    comfy.ops.scaled_dot_product_attention = watched
    try:
        with torch.no_grad():
            policy.predict(x[:1], t[:1], first)
        left = [kernel.name for kernel in comfy.ops.SDPA_BACKEND_PRIORITY]
    finally:
        comfy.ops.scaled_dot_product_attention = attend
        del comfy.ops.SDPA_BACKEND_PRIORITY
        policy.to("cpu")
    return {"used": sorted(set(seen)), "left": left}


def look(family: str, root: Path) -> dict[str, Any]:
    case = Case(family)
    found = {
        "training": training(case),
        "rows": rows(case),
        "saving": saving(case, root),
        "restoring": restoring(case),
        "pictures": pictures(case),
        "iterating": iterating(case, checkpointing=family != "sd15"),
    }
    if family == "sd15":
        found["sampling_nodes"] = sampling_nodes(case)
        more = {"kinds": kinds(case), "texts": texts(case), "others": hooks_of_others(case), "refused": refused(case)}
        found.update(more, kernels=kernels(case))
    if family == "sd3":
        types = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
        found.update({name: cast(dtype) for name, dtype in types.items()}, node=comfy_native_node.look(case, root))
    return found


def main() -> None:
    torch.set_num_threads(1)
    register()
    with tempfile.TemporaryDirectory() as name:
        folder_paths.set_output_directory(name)
        found = {family: look(family, Path(name)) for family in FAMILIES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
