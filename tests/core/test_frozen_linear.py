"""Frozen maps that autograd keeps nothing of, and the adapters outside of the module tree."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgpo_core.common.errors import UserError
from dgpo_core.policy.adapters import NAMES
from dgpo_core.policy.frozen_linear import LoraBank, frozen_conv, frozen_linear

SHAPES = {"a.to_q": (6, 4), "b.proj": (3, 4)}


def inference(*shape: int) -> Tensor:
    """A weight as ComfyUI loads it."""
    with torch.inference_mode():
        return torch.randn(*shape)


def bank(**settings: float) -> LoraBank:
    given = {"rank": 2, "alpha": 4.0, "seed": 5, **settings}
    return LoraBank(SHAPES, device=torch.device("cpu"), **given)


def test_a_frozen_linear_has_the_gradient_of_autograd() -> None:
    weight, bias = torch.randn(5, 4), torch.randn(5)
    x = torch.randn(2, 3, 4, requires_grad=True)
    frozen_linear(x, lambda v: F.linear(v, weight, bias), lambda: nullcontext(weight)).pow(2).sum().backward()
    same = x.detach().clone().requires_grad_()
    F.linear(same, weight, bias).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_frozen_convolution_has_the_gradient_of_autograd(dims: int) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = kind(4, 6, 3, stride=2, padding=1, groups=2)
    x = torch.randn(2, 4, *([7] * dims), requires_grad=True)
    options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    frozen_conv(x, conv, lambda: nullcontext(conv.weight), **options).pow(2).sum().backward()
    assert conv.weight.grad is None
    same = x.detach().clone().requires_grad_()
    conv(same).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


def test_weights_may_be_inference_tensors() -> None:
    weight, kernel = inference(4, 4), inference(4, 4, 1, 1)
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        F.linear(x, weight)
    y = frozen_linear(x, lambda v: F.linear(v, weight), lambda: nullcontext(weight))
    one = {"stride": (1, 1), "dilation": (1, 1), "padding": (0, 0), "groups": 1}
    frozen_conv(y[..., None, None], lambda v: F.conv2d(v, kernel), lambda: nullcontext(kernel), **one).sum().backward()
    torch.testing.assert_close(x.grad, (torch.ones(2, 4) @ kernel[..., 0, 0]) @ weight)


def test_nothing_of_the_base_is_saved_for_the_backward() -> None:
    weight, saved = torch.randn(5, 4), []
    x = torch.randn(2, 4, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = frozen_linear(x, lambda v: F.linear(v, weight), lambda: nullcontext(weight))
        assert saved == []
        lora = bank().add("a.to_q", x, torch.zeros(2, 6))
    assert {tuple(tensor.shape) for tensor in saved} <= {(2, 4), (2, 4)[::-1], (2, 2), (6, 2), (2, 6)}
    (y.sum() + lora.sum()).backward()


@pytest.mark.parametrize("wanted", [True, False])
def test_the_answer_can_be_written_into(wanted: bool) -> None:
    weight, more = torch.randn(4, 4), torch.randn(2, 3, 4, requires_grad=True)
    x = torch.randn(2, 3, 4, requires_grad=wanted)
    y = frozen_linear(x, lambda v: F.linear(v, weight, torch.ones(4)), lambda: nullcontext(weight))
    y += more
    (y * 2).sum().backward()
    torch.testing.assert_close(more.grad, torch.full_like(more, 2.0))
    if wanted:
        torch.testing.assert_close(x.grad, (torch.full_like(x, 2.0) @ weight))


def test_the_weight_is_borrowed_in_the_backward_only_and_given_back() -> None:
    weight, log = torch.randn(5, 4), []

    @contextmanager
    def lend() -> Iterator[Tensor]:
        log.append("lent")
        page = weight.clone()
        yield page
        page.fill_(torch.nan)  # the next one's
        log.append("back")

    x = torch.randn(2, 4, requires_grad=True)
    y = frozen_linear(x, lambda v: F.linear(v, weight), lend)
    assert log == []
    y.sum().backward()
    assert log == ["lent", "back"]
    torch.testing.assert_close(x.grad, torch.ones(2, 5) @ weight)


def test_the_bank_starts_as_the_adapters_of_diffusers_do() -> None:
    policy = tiny.shared("sd15")
    theirs = policy.adapter_state("old")
    shapes = {
        key.removesuffix(".lora_A.weight"): (theirs[key.replace("lora_A", "lora_B")].shape[0], a.shape[1])
        for key, a in theirs.items()
        if key.endswith("lora_A.weight")
    }
    ours = LoraBank(shapes, rank=2, alpha=64.0, seed=0, device=torch.device("cpu"))
    for name in NAMES:
        state = ours.state(name)
        assert list(state) == list(theirs)
        assert all(torch.equal(state[key], theirs[key]) for key in theirs)


def test_only_the_current_adapter_is_trained() -> None:
    trained = {name: {p.requires_grad for p in bank().state(name).values()} for name in NAMES}
    assert trained == {"current": {True}, "old": {False}, "ema": {False}}


def test_the_switch_chooses_the_branch_and_falls_back() -> None:
    adapters, x, y = bank(), torch.randn(3, 4), torch.randn(3, 6)
    with torch.no_grad():
        for i, name in enumerate(NAMES):
            adapters.state(name)["a.to_q.lora_B.weight"].fill_(i + 1)
    found = {}
    for name in (*NAMES, None):
        with adapters.using("old"):
            with suppress(ZeroDivisionError), adapters.using(name):
                found[name] = adapters.add("a.to_q", x, y)
                raise ZeroDivisionError
            assert adapters.active == "old"
    assert adapters.active == "current"
    assert torch.equal(found[None], y)
    for i, name in enumerate(NAMES):
        state = adapters.state(name)
        low = x @ state["a.to_q.lora_A.weight"].T
        torch.testing.assert_close(found[name], y + 2 * (i + 1) * low.sum(1, keepdim=True).expand(3, 6))


def test_dropout_is_on_current_while_it_trains_and_a_rows_seed_decides_its_mask() -> None:
    adapters, x, y = bank(dropout=0.5), torch.randn(40, 4), torch.zeros(40, 6)
    seeds = range(40)
    with torch.no_grad():
        for name in NAMES:
            adapters.state(name)["a.to_q.lora_B.weight"].fill_(1.0)
    plain = adapters.add("a.to_q", x, y)
    with adapters.dropout.dropping(seeds):
        dropped = adapters.add("a.to_q", x, y)
        seen = adapters.dropout(x, "a.to_q")
        assert torch.equal(adapters.add("a.to_q", x, y), dropped)
        assert not torch.equal(seen, adapters.dropout(x, "a.to_k"))
        twice = adapters.dropout(torch.cat([x, x]), "a.to_q")  # two conditionings of the same rows
        for name in ("old", "ema"):
            with adapters.using(name):
                assert torch.equal(adapters.add("a.to_q", x, y), plain)
    assert torch.equal(twice, torch.cat([seen, seen]))
    assert ((seen == 0) | (seen == 2 * x)).all()
    assert 0.34 < (seen == 0).float().mean() < 0.66  # of 160 draws, four standard deviations
    low = seen @ adapters.state("current")["a.to_q.lora_A.weight"].T
    torch.testing.assert_close(dropped, 2 * low.sum(1, keepdim=True).expand(40, 6))  # as peft: before A
    with adapters.dropout.dropping(seeds[20:]):
        torch.testing.assert_close(adapters.add("a.to_q", x[20:], y[20:]), dropped[20:])
    with adapters.dropout.dropping(seeds), adapters.dropout.dropping_rows([7, 3]):
        torch.testing.assert_close(adapters.add("a.to_q", x[[7, 3]], y[[7, 3]]), dropped[[7, 3]])
        with pytest.raises(UserError, match=r"a\.to_q mixes the images of a batch"):  # 1 row for 2 seeds
            adapters.add("a.to_q", x[:1], y[:1])
    assert torch.equal(adapters.add("a.to_q", x, y), plain)


def test_a_state_is_loaded_into_all_three_adapters() -> None:
    adapters = bank()
    state = {key: torch.randn(p.shape) for key, p in adapters.state("current").items()}
    adapters.load(state)
    for name in NAMES:
        assert all(torch.equal(p, state[key]) for key, p in adapters.state(name).items())


def test_the_answer_has_the_type_of_the_base() -> None:
    y = bank().add("a.to_q", torch.randn(3, 4).bfloat16(), torch.randn(3, 6).bfloat16())
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("alpha", 0.0), ("dropout", 1.0)])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        bank(**{name: value})
