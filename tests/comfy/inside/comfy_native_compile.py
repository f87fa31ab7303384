"""Run by `test_native_compile.py` in ComfyUI's folder and interpreter: native training under torch.compile, as JSON.

The backend is aot_eager: torch traces, splits and guards graphs as for any backend, and no machine code is made of
them, which would take minutes here. Where graphs alone are counted it is eager, which does not split them either.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from comfy_native_case import Case, randomise, worst  # first: it finds ComfyUI

# isort: split
import comfy_lora
import comfy_native_node
import folder_paths
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_lora import difference
from torch._dynamo.utils import counters

FAMILIES = os.environ.get("FAMILIES", "sd15 flux").split()
BACKEND = os.environ.get("BACKEND", "aot_eager")
BATCHES = (3, 1, 2, 4, 5, 2, 3, 1)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def compiled(case: Case, backend: str = BACKEND, **settings: Any) -> Any:
    """A policy whose blocks are compiled anew, from no graphs."""
    torch._dynamo.reset()
    counters.clear()
    policy = case.policy(**settings)
    policy.compile(backend)
    randomise(policy)
    return policy


def training(case: Case) -> dict[str, Any]:
    """Gradients, predictions and pictures beside those of the same policy as it is."""
    plain = case.policy()
    randomise(plain)
    expected, grads, _ = case.gradients(plain)
    picture = case.drawn(plain.patcher)
    plain.to("cpu")
    policy = compiled(case)
    found, ours, saved = case.gradients(policy)
    at_first = graphs()
    drawn = case.drawn(policy.patcher)
    policy.to("cpu")
    policy.enable_gradient_checkpointing()
    again, ours_again, _ = case.gradients(policy)
    policy.to("cpu")
    return {
        "prediction": difference(found, expected),
        "gradient": worst(ours, grads),
        "checkpointed": [difference(again, expected), worst(ours_again, grads)],
        "picture": difference(drawn, picture),
        "saved": saved,
        "graphs": at_first,
        "breaks": sum(counters["graph_break"].values()),
    }


def sizes(case: Case) -> dict[str, Any]:
    """Graphs after a batch of each size, and after all of them with the other adapters and without gradients."""
    policy = compiled(case, "eager")
    x, t, _ = case.inputs()
    x, t = x[[0, 1, 2, 0, 1]], t[[0, 1, 2, 0, 1]]
    cond = policy.encode(["red"])[0]
    counts = []
    for rows in BATCHES:
        policy.predict(x[:rows], t[:rows], cond.expand(rows)).sum().backward()
        counts.append(graphs())
    for _ in range(2):
        for name in ("current", "old", None):
            for rows in BATCHES[:4]:
                with torch.no_grad(), policy.using(name):
                    policy.predict(x[:rows], t[:rows], cond.expand(rows))
        case.drawn(policy.patcher)
        counts.append(graphs())
    policy.to("cpu")
    return {"graphs": counts, "breaks": sum(counters["graph_break"].values())}


def dropping(case: Case) -> float:
    """The gradient under dropout, whose masks belong to the sample."""
    found = []
    for make in (case.policy, lambda **settings: compiled(case, **settings)):
        policy = make(dropout=0.5)
        randomise(policy)
        with policy.dropping([1, 2, 3]):
            found.append(case.gradients(policy)[1])
        policy.to("cpu")
    return worst(found[1], found[0])


def restoring(case: Case) -> dict[str, Any]:
    """The network after a compiled training, and a policy that is not compiled."""
    before = case.drawn()
    plain = case.policy()
    randomise(plain)
    _, grads, _ = case.gradients(plain)
    plain.to("cpu")
    policy = compiled(case)
    case.gradients(policy)
    policy.to("cpu")
    left = [name for name, module in case.native.model.named_modules() if "forward" in vars(module)]
    seen = graphs()
    anew = case.policy()
    randomise(anew)
    _, ours, _ = case.gradients(anew)
    anew.to("cpu")
    return {
        "left": left,
        "same": all(torch.equal(ours[key], grads[key]) for key in grads),
        "graphs": graphs() - seen,
        "pictures": bool(torch.equal(case.drawn(), before)),
    }


def patched(case: Case) -> dict[str, Any]:
    """A MODEL with a patch in its blocks, which may look at whatever these are told."""
    model = case.model.clone()
    model.set_model_attn2_patch(lambda n, k, v, told: (n * len(told["block"]), k, v))
    found = []
    for make in (case.policy, lambda model: compiled(case, model=model)):
        policy = make(model=model)
        randomise(policy)
        found.append(case.gradients(policy)[1])
        policy.to("cpu")
    return {"gradient": worst(found[1], found[0]), "graphs": graphs()}


def comfyuis_own(case: Case) -> dict[str, Any]:
    """A MODEL from the node TorchCompileModel, and one whose network a node has put a compiled one in the place of."""
    plain = case.policy()
    randomise(plain)
    _, grads, _ = case.gradients(plain)
    plain.to("cpu")
    torch._dynamo.reset()
    counters.clear()
    model = case.model.clone()
    set_torch_compile_wrapper(model=model, backend=BACKEND)
    policy = case.policy(model)
    randomise(policy)
    _, ours, _ = case.gradients(policy)
    policy.to("cpu")
    trained = graphs()
    case.drawn(model)
    put = case.model.clone()
    put.add_object_patch("diffusion_model", torch.compile(case.native.model.diffusion_model, backend=BACKEND))
    return {
        "same": all(torch.equal(ours[key], grads[key]) for key in grads),
        "graphs": trained,
        "still_compiled": graphs() > 0,
        "put": comfy_lora.error(lambda: case.policy(put)),
    }


def offered(case: Case) -> list[str]:
    """What compiles the policy of a node that asks for nothing, and of one that asks for it."""
    found = []
    folder_paths.set_output_directory(tempfile.mkdtemp())
    for asked in ({}, {"compile": True}):
        handle = comfy_native_node.execute(case, **asked)
        with torch.inference_mode():
            policy = comfy_native_node.sessions._load(handle.spec).policy
        found.append(policy.hooks.compiler)
        policy.to("cpu")
    return found


def refused(case: Case) -> dict[str, str]:
    """A backend that does not work here, and a network without repeated blocks."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    policy = case.policy()
    policy.compile(broken)
    told = comfy_lora.error(lambda: case.gradients(policy))
    policy.to("cpu")
    policy.hooks.network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    return {"broken": told, "no_blocks": comfy_lora.error(lambda: policy.compile(BACKEND))}


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for family in FAMILIES:
        case = Case(family)
        found[family] = {"training": training(case), "sizes": sizes(case)}
    unet, flux = Case("sd15"), Case("flux")
    print(
        json.dumps(
            {
                **found,
                "dropping": dropping(flux),
                "restoring": restoring(flux),
                "patched": patched(unet),
                "comfyuis_own": comfyuis_own(unet),
                "offered": offered(flux),
                "refused": refused(flux),
            }
        )
    )


if __name__ == "__main__":
    main()
