"""Policies on tiny random models of every family: attention, prompts, the VAE, settings for memory and speed."""

from __future__ import annotations

from pathlib import Path

import own_pipeline
import pytest
import tiny
import torch

from dgpo_core.benchmark import random_model
from dgpo_core.common.errors import UserError
from dgpo_core.policy import FAMILIES, Cond, guided, load_policy, pipeline
from dgpo_core.policy.families.language import lengths
from dgpo_core.policy.pipeline import DiffusersPolicy


def test_every_family_has_a_tiny_model() -> None:
    assert {*tiny.BUILDERS, *tiny.EDITORS} == set(FAMILIES)


# --- attention -------------------------------------------------------------------------------------------------------


def test_what_is_trained_never_uses_cudnns_attention_and_others_may(policy: DiffusersPolicy) -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with policy.using("current"):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
def test_flux_of_full_width_has_a_gradient_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "_FLUX", {**random_model._FLUX, "num_layers": 1, "num_single_layers": 1})
    cuda = torch.device("cuda")
    policy = random_model.random_policy(
        "flux", rank=2, alpha=2.0, dropout=0.0, targets=None, dtype="bfloat16", device=cuda, seed=0, offload=False
    )
    (cond,) = policy.encode(["a picture"])
    x, t = torch.randn(1, *policy.latent_shape(512, 512), device=cuda), torch.tensor([500.0], device=cuda)
    with policy.using("current"):
        policy.predict(x, t, cond).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.trainable().values())


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_encoded_once_and_alone(family: str) -> None:
    policy = load_policy(tiny.folder(family), rank=2)
    calls: list[str] = []
    encode = policy._encode
    policy._encode = lambda text: calls.append(text) or encode(text)
    first = policy.encode([*tiny.PROMPTS, tiny.PROMPTS[0], ""])
    assert not policy.is_encoded(["something new"])
    assert policy.is_encoded([*tiny.PROMPTS, ""])
    again = policy.encode(["", *tiny.PROMPTS])
    assert calls == [*tiny.PROMPTS, ""]
    assert all(len(c) == 1 for c in first)
    for a, b in zip(first[:2], again[1:], strict=True):
        assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    policy._conds.clear()
    other = policy.encode([tiny.PROMPTS[1]])[0]  # with no prompt beside it
    assert all(torch.equal(other.tensors[k], first[1].tensors[k]) for k in other.tensors)


def test_the_prompt_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    import dgpo_core.policy.pipeline as module

    policy = load_policy(tiny.folder("sd15"), rank=2)
    one = module._bytes(policy.encode(["x"])[0])
    monkeypatch.setattr(module, "_CACHE_BYTES", 3 * one)
    policy.encode([str(i) for i in range(5)])  # five at once are needed at once
    assert policy.is_encoded([str(i) for i in range(5)])
    policy.encode(["y"])
    assert policy.is_encoded(["3", "4", "y"])
    assert not policy.is_encoded(["2"])


def test_sd3_without_t5_appends_no_tokens_for_it() -> None:
    policy = tiny.shared("sd3")
    assert policy.encode(tiny.PROMPTS)[0].tensors["tokens"].shape == (1, tiny.MAX_TOKENS, 64)


def test_sdxl_zeros_the_empty_prompt_as_its_pipeline_does() -> None:
    empty, some = tiny.shared("sdxl").encode(["", "a"])
    assert all(not v.any() for v in empty.tensors.values())
    assert all(v.any() for v in some.tensors.values())


def test_cond_rows() -> None:
    cond = Cond({"a": torch.arange(3.0).view(3, 1), "b": torch.arange(3)})
    assert cond.expand(2).tensors["b"].tolist() == [0, 0, 1, 1, 2, 2]
    assert cond.select([2, 0]).tensors["b"].tolist() == [2, 0]
    assert (
        cond.select(slice(1, 3)).tensors["b"].tolist()
        == cond.select(torch.tensor([1, 2])).tensors["b"].tolist()
        == [1, 2]
    )
    assert Cond.cat([cond, cond.select([1])]).tensors["b"].tolist() == [0, 1, 2, 1]
    one = cond.select([1])
    assert one.expand(4).tensors["a"].shape == (4, 1)
    assert one.expand(4).tensors["a"].data_ptr() == one.tensors["a"].data_ptr()  # a view: no copy per image
    texts = [Cond({"tokens": torch.ones(1, n, 2), "mask": torch.ones(1, n, dtype=torch.bool)}) for n in (3, 1)]
    both = Cond.cat(texts).tensors
    assert both["mask"].tolist() == [[True] * 3, [True, False, False]]
    assert both["tokens"].sum().item() == 2 * (3 + 1)  # zeros where the mask says so
    moved = cond.to(dtype=torch.bfloat16)
    assert moved.tensors["a"].dtype == torch.bfloat16
    assert moved.tensors["b"].dtype == torch.int64


def test_masks_stay_where_they_can_be_read_without_waiting() -> None:
    cond = Cond({"tokens": torch.ones(1, 3, 2), "mask": torch.ones(1, 3, dtype=torch.bool)}).to("meta").expand(2)
    assert cond.tensors["tokens"].is_meta
    assert lengths(cond.select([1, 0]).tensors["mask"]) == [3, 3]


def test_guidance_is_one_forward_and_scale_one_is_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.shared("sd3")
    x, t, cond = tiny.inputs(policy)
    uncond = policy.encode([""])[0]
    sizes: list[int] = []
    predict = policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, t, c: sizes.append(len(x)) or predict(x, t, c))
    with torch.no_grad():
        c, u = predict(x, t, cond), predict(x, t, uncond.expand(2))
        assert torch.equal(guided(policy, x, t, cond, uncond, 1.0), c)
        # a batch of four instead of two may round differently
        torch.testing.assert_close(guided(policy, x, t, cond, uncond, 4.5), u + 4.5 * (c - u), atol=1e-4, rtol=1e-4)
    assert sizes == [2, 4]


# --- the VAE and the settings for memory and speed -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_and_images(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import dgpo_core.policy.vae as module

    policy = tiny.shared(family)
    shape = policy.latent_shape(tiny.SIZE, tiny.SIZE)
    assert shape == own_pipeline.LATENTS.get(family, (4, 16, 16))
    z = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    images = policy.decode(z)
    assert images.shape == (3, 3, tiny.SIZE, tiny.SIZE)
    assert images.min() >= 0
    assert images.max() <= 1
    with torch.no_grad():
        raw, latents = own_pipeline.decoded(policy, z), own_pipeline.encoded(policy, images * 2 - 1)
    torch.testing.assert_close(images, (raw / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(policy.encode_images(images), latents)
    monkeypatch.setattr(module, "_VAE_PIXELS", 2 * tiny.SIZE**2)
    torch.testing.assert_close(policy.decode(z), images)  # in two parts: sums in another order at most


def test_image_sizes_that_do_not_fit_are_told() -> None:
    assert tiny.shared("sd15").latent_shape(34, 32) == (4, 17, 16)
    for size in ((34, 32), (32, 0)):
        with pytest.raises(UserError, match="multiples of 4"):
            tiny.shared("sd3").latent_shape(*size)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_base_trains_a_float32_adapter(family: str) -> None:
    policy = load_policy(tiny.folder(family), rank=2, dtype="bf16")
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    base = {n: p.dtype for n, p in policy.network.named_parameters() if "lora_" not in n}
    assert {dtype for name, dtype in base.items() if name.endswith("base_layer.weight")} == {torch.bfloat16}
    args = tiny.inputs(policy)
    out = policy.predict(*args)
    assert out.dtype == torch.float32
    assert policy.decode(args[0]).dtype == torch.float32
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in tiny.used(policy).values())
    full = tiny.shared(family).predict(*tiny.inputs(tiny.shared(family)))
    # bfloat16 keeps 8 bits: half a percent per operation, a few percent through the network
    assert (out - full).norm() / full.norm() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    policy = load_policy(tiny.folder(family), rank=2)
    args, gradients = tiny.inputs(policy), []
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.fill_(0.05)
    for _ in range(2):
        policy.predict(*args).square().mean().backward()
        gradients.append([p.grad for p in policy.trainable().values()])
        for parameter in policy.trainable().values():
            parameter.grad = None
        policy.enable_gradient_checkpointing()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compile_touches_the_repeated_blocks_of_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in filter(tiny.can_be_built, FAMILIES):
        compiled: list[str] = []
        policy = tiny.shared(family)
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda self, names=compiled, **_: names.append(type(self).__name__)
        )
        policy.compile()
        assert compiled
        assert all("TransformerBlock" in name for name in compiled)


def test_offload_moves_modules_in_only_while_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2, offload=True)
    policy.device = torch.device("meta")  # any device that is not the CPU: only the moves are looked at
    moves: list[tuple[str, str]] = []
    monkeypatch.setattr(policy, "text_encoders_to", lambda device: moves.append(("text", str(device))))
    monkeypatch.setattr(policy, "vae_to", lambda device: moves.append(("vae", str(device))))
    policy.encode(tiny.PROMPTS)
    policy.encode(tiny.PROMPTS)  # in the cache: nothing moves
    policy.decode(torch.zeros(1, 4, 16, 16))
    assert moves == [("text", "meta"), ("text", "cpu"), ("vae", "meta"), ("vae", "cpu")]


def test_a_model_without_text_encoders_says_so_when_a_prompt_comes() -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2)
    policy.encode(tiny.PROMPTS)
    policy.pipe.text_encoder = None
    policy.encode(tiny.PROMPTS)  # known already
    with pytest.raises(UserError, match="no text_encoder"):
        policy.encode(["a new one"])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_the_file_holds_what_was_learned(family: str, tmp_path: Path) -> None:
    policy = load_policy(tiny.folder(family), rank=2, alpha=4.0)
    x0, t, cond = tiny.inputs(policy)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9))
    x_t, target = policy.prediction.add_noise(x0, eps, t), policy.prediction.target(x0, eps, t)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = (policy.predict(x_t, t, cond) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    policy.save_lora(tmp_path / "lora.safetensors")
    again = load_policy(tiny.folder(family), init_lora=tmp_path / "lora.safetensors")
    with torch.no_grad():
        # B times 2 is exact, the branch itself is not scaled any more: float32's rounding
        torch.testing.assert_close(again.predict(x_t, t, cond), policy.predict(x_t, t, cond), atol=1e-5, rtol=1e-5)


def test_the_network_makes_room_for_text_encoders_that_do_not_fit_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = load_policy(tiny.folder("sd3"), offload=True)
    moves = []
    monkeypatch.setattr(policy.network, "to", lambda device: moves.append(str(device)))
    monkeypatch.setattr(pipeline, "_free_memory", lambda device: 0.0)
    policy.encode(["a red circle"])
    assert moves == ["cpu", str(policy.device)]
    policy.encode(["a red circle"])  # encoded before: nothing has to move
    assert len(moves) == 2
    monkeypatch.setattr(pipeline, "_free_memory", lambda device: float("inf"))
    policy.encode(["a blue square"])
    assert len(moves) == 2
