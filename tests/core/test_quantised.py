"""A base of fp8, int8 or nf4: smaller, and its LoRA trains as on the same weights kept whole."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import bright
import pytest
import single_file
import tiny
import torch
from engine import distance, gradient, moved, quick, write_quick
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dgpo_core import evaluate, train
from dgpo_core.common.errors import UserError
from dgpo_core.method.rollout import rollout
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import FAMILIES, load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.policy.quantised import KINDS, QuantisedLinear, large_linears, quantise, refuse_unavailable
from dgpo_core.runs import assemble

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BNB = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
ALL = [pytest.param(kind, marks=BNB if kind == "nf4" else ()) for kind in KINDS]
BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5}  # of a weight, without scales
SCALES = {"fp8": 4 / 64, "int8": 4 / 64, "nf4": 4 / 64}  # of a weight: rows of 64 here, blocks of 64
ERROR = {"fp8": 0.04, "int8": 0.015, "nf4": 0.12}  # of normal weights, relative


def packed(kind: str, outputs: int = 48, inputs: int = 64, bias: bool = False) -> tuple[nn.Linear, QuantisedLinear]:
    """A Linear, and the same one in fewer bytes."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return linear, KINDS[kind](linear.weight, linear.bias)


def parts(policy: DiffusersPolicy) -> Iterator[tuple[str, QuantisedLinear]]:
    """The quantised layers of a policy's network, by name."""
    return ((n, m) for n, m in policy.network.named_modules() if isinstance(m, QuantisedLinear))


def made_whole(policy: DiffusersPolicy) -> DiffusersPolicy:
    """The policy with ordinary Linears of the weights that the quantised ones compute with."""
    for name, layer in list(parts(policy)):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight, linear.bias = nn.Parameter(layer.weight), layer.bias
        within, _, last = name.rpartition(".")
        setattr(policy.network.get_submodule(within), last, linear.requires_grad_(False))
    return policy


def trained_gradient(policy: DiffusersPolicy) -> tuple[Tensor, Tensor]:
    """Prediction and gradient of a loss of all outputs with an adapter that does something."""
    moved(policy, "current", seed=3, size=0.1)
    out = policy.predict(*tiny.inputs(policy))
    out.square().mean().backward()
    return out.detach(), gradient(policy)


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_a_layer_takes_fewer_bytes_and_stays_near_the_weight(kind: str) -> None:
    linear, small = packed(kind, outputs=1000)
    assert sum(b.nbytes for b in small.buffers()) == pytest.approx((BYTES[kind] + SCALES[kind]) * linear.weight.numel())
    assert not list(small.parameters())
    assert small.weight.dtype == torch.float32
    assert 0 < distance(small.weight, linear.weight) < ERROR[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ALL)
def test_forward_and_gradient_are_those_of_the_rounded_weight_and_nothing_is_saved(
    kind: str, dtype: torch.dtype
) -> None:
    _, small = packed(kind, bias=True)
    bias = small.bias.to(dtype)
    small.bias = nn.Parameter(bias, requires_grad=False)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = small(x)
    assert not saved
    like = x.detach().requires_grad_()
    expected = nn.functional.linear(like, small.whole(dtype), bias)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, like.grad)


@pytest.mark.parametrize("kind", ALL)
def test_rows_of_zeros_and_of_very_large_and_small_numbers_stay_what_they_are(kind: str) -> None:
    weight = torch.randn(4, 64) * torch.tensor([0.0, 1e-6, 1.0, 1e6])[:, None]
    whole = KINDS[kind](weight, None).weight
    assert whole.isfinite().all()
    for row, is_row in zip(whole, weight, strict=True):
        assert (row - is_row).norm() <= ERROR[kind] * is_row.norm()


def test_what_was_fp8_in_its_file_stays_what_it_was_in_every_number_type() -> None:
    weight = torch.randn(16, 64).mul_(0.1).to(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(KINDS["fp8"](weight.to(dtype), None).whole(dtype), weight.to(dtype))


@BNB
def test_a_layer_that_makes_no_whole_blocks_stays_whole_in_nf4() -> None:
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(10, 7), nn.Linear(64, 7)])})
    quantise(network, "nf4", CPU)
    assert [isinstance(m, QuantisedLinear) for m in network["blocks"]] == [False, True]


# --- a network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_within_blocks_are_quantised_and_no_others(family: str) -> None:
    network = tiny.shared(family).pipe.components[FAMILIES[family].network_name]
    names = {n.removesuffix(".base_layer") for n, _ in large_linears(network, FAMILIES[family].kept_whole)}
    assert all(re.search(r"block|^(layers|noise_refiner|context_refiner)\.\d", name) for name in names)
    assert not any("time" in name or "emb" in name for name in names)
    assert any("attn" in name or "attention" in name for name in names)
    convolutions = family == "sana"  # its feed-forward has no Linear
    assert convolutions or any(".ff" in name or "mlp" in name or "feed_forward" in name for name in names)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_the_lora_is_plain_autograds_on_the_rounded_weights(family: str, kind: str) -> None:
    policy = load_policy(tiny.folder(family), rank=2, quantize=kind)
    assert list(parts(policy))
    full = load_policy(tiny.folder(family), rank=2)
    plain = made_whole(load_policy(tiny.folder(family), rank=2, quantize=kind))
    assert not list(parts(plain))
    (out, found), (same, expected) = trained_gradient(policy), trained_gradient(plain)
    assert distance(out, same) < 1e-6
    assert distance(found, expected) < 1e-5  # float32 in another order
    assert 0 < distance(out, trained_gradient(full)[0]) < 0.2


@pytest.mark.parametrize("kind", ALL)
def test_gradient_checkpointing_and_compiling_give_the_same_gradient(kind: str) -> None:
    plain = load_policy(tiny.folder("flux"), rank=2, quantize=kind)
    _, expected = trained_gradient(plain)
    other = load_policy(tiny.folder("flux"), rank=2, quantize=kind)
    other.enable_gradient_checkpointing()
    assert distance(trained_gradient(other)[1], expected) < 1e-5
    other.compile(backend="eager")
    assert distance(trained_gradient(other)[1], expected) < 1e-5


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_base_draws_trains_saves_and_comes_back(family: str, kind: str, tmp_path: Path) -> None:
    size = (tiny.SIZE, tiny.SIZE)
    solver = "euler"
    config = quick(rollout={"solver": solver, "cfg": 2.0}, training={"clip": 1e-3, "lr": 3e-2})
    policy = load_policy(tiny.folder(family), rank=2, alpha=4.0, seed=1, quantize=kind)
    base = copy.deepcopy(dict(policy.network.named_buffers()))
    prompts = tiny.prompts(family)
    trainer = Trainer(policy, prompts, {"bright": bright.Bright()}, config, size=size)
    trainer.iterate()
    assert trainer.iterate().metrics["grad_norm"] > 0
    assert all(torch.equal(b, base[n]) for n, b in policy.network.named_buffers())
    policy.save_lora(tmp_path / "lora.safetensors")
    again = load_policy(tiny.folder(family), init_lora=tmp_path / "lora.safetensors", seed=2, quantize=kind)

    def picture(drawn_by: DiffusersPolicy) -> Tensor:
        return rollout(drawn_by, drawn_by.solver(solver, 3, *size), prompts[:1], [[5]], size=size)[0].images

    assert torch.allclose(picture(again), picture(policy), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lora_of_a_quantised_base_is_an_ordinary_one(family: str, tmp_path: Path) -> None:
    policy = load_policy(tiny.folder(family), rank=2, quantize="int8")
    moved(policy, "current", seed=3)
    policy.save_lora(tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert set(file.keys()) == set(load_policy(tiny.folder(family), rank=2).lora_tensors())
    plain = tiny.build(family, tmp_path)
    plain.load_lora_weights(tmp_path / "lora.safetensors")
    given = {k for k, _ in getattr(plain, policy.network_name).named_parameters() if "lora_A.default_0" in k}
    assert len(given) == len(policy.trainable()) // 2


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_are_quantised_likewise_and_read_prompts_nearly_as_before(family: str, kind: str) -> None:
    policy = load_policy(tiny.folder(family), rank=2, quantize_text=kind)
    assert not list(parts(policy))
    for encoder in policy._text_encoders():
        assert any(isinstance(module, QuantisedLinear) for module in encoder.modules())
    full = tiny.shared(family).encode(tiny.PROMPTS)
    for cond, expected in zip(policy.encode(tiny.PROMPTS), full, strict=True):
        for name in {"tokens", "pooled"} & cond.tensors.keys():
            assert 0 < distance(cond.tensors[name], expected.tensors[name]) < 4 * ERROR[kind]


@pytest.mark.parametrize("kind", ALL)
def test_a_single_file_is_quantised_as_a_folder_is(kind: str, tmp_path: Path) -> None:
    path = single_file.write(tiny.sd15(tmp_path), tmp_path / "model.safetensors")
    file = load_policy(path, rank=2, quantize=kind, config=tiny.folder("sd15"))
    folder = load_policy(tiny.folder("sd15"), rank=2, quantize=kind)
    assert torch.equal(file.predict(*tiny.inputs(file)), folder.predict(*tiny.inputs(folder)))


@pytest.mark.parametrize("kind", ALL)
def test_a_quantised_base_computes_in_its_number_type(kind: str) -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2, dtype="bf16", quantize=kind)
    full = load_policy(tiny.folder("sd3"), rank=2, dtype="bf16")
    assert {layer.weight.dtype for _, layer in parts(policy)} == {torch.bfloat16}
    out, expected = (p.predict(*tiny.inputs(p)).detach() for p in (policy, full))
    assert distance(out, expected) < 0.2


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_an_unknown_kind_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="'int3': use one of none, fp8, int8, nf4"):
        load_policy("no such model", quantize="int3")


def test_a_missing_package_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'bitsandbytes"):
        load_policy("no such model", quantize="nf4")


def test_a_device_that_has_no_such_numbers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object, dtype: torch.dtype) -> Tensor:
        raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend.\nmore")

    monkeypatch.setattr(KINDS["fp8"], "whole", fails)
    with pytest.raises(UserError, match="fp8 do not work on the device cpu .*to the MPS backend\\): set"):
        refuse_unavailable("fp8", CPU)


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("kind", ALL)
def test_a_run_goes_on_from_its_checkpoint(kind: str, here: Path, sd3_folder: Path) -> None:
    argv = [*write_quick(here, sd3_folder, evaluation={"every": 0}), "--model.quantize", kind]
    assert train.main([*argv, "--name", "whole"]) == 0
    parted = [*argv, "--name", "parted"]
    assert train.main([*parted, "--iterations", "2"]) == 0
    assert train.main([*parted, "--resume"]) == 0
    first, second = (load_file(here / f"runs/{name}/lora.safetensors") for name in ("whole", "parted"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("rewards")
def test_a_lora_is_measured_on_the_base_that_it_was_trained_on(
    here: Path, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = write_quick(here, sd3_folder, iterations=1, evaluation={"every": 0, "final_images": 0})
    assert train.main([*argv, "--model.quantize", "int8"]) == 0
    bases: list[bool] = []
    load = assemble.load_model

    def load_model(*args: object) -> tuple[DiffusersPolicy, tuple[int, int]]:
        policy, size = load(*args)
        bases.append(any(parts(policy)))
        return policy, size

    monkeypatch.setattr(assemble, "load_model", load_model)
    lora = ["--lora", "runs/test/lora.safetensors", "--model", str(sd3_folder), "--images", "2"]
    said = ["--prompts", "held_out.txt", "--reward", "bright"]
    assert evaluate.main([*lora, *said]) == 0
    assert evaluate.main([*lora, "--config", "runs/test/config.yaml"]) == 0
    assert bases == [True, True]


@pytest.mark.usefixtures("rewards")
def test_a_resumed_run_keeps_its_kind_of_base(here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = write_quick(here, sd3_folder, iterations=1, evaluation={"every": 0, "final_images": 0})
    assert train.main(argv) == 0
    assert train.main([*argv, "--resume", "--iterations", "2", "--model.quantize", "int8"]) == 2
    assert "model.quantize" in "".join(capsys.readouterr())
