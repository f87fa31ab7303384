"""The LoRA branch: the paper's y + scale B A x, in the base's type, trained in float32."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dgpo_core.policy.branch import lora_branch


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 8, generator=generator).to(dtype), torch.randn(2, 5, 6, generator=generator).to(dtype)
    A, B = torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator)
    return x, y, A.requires_grad_(), B.requires_grad_()


@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],  # a few roundings of the type
)
def test_it_is_a_low_rank_update_in_the_type_of_the_base(dtype: torch.dtype, close: float) -> None:
    x, y, A, B = inputs(dtype)
    found = lora_branch(x, y, A, B, 0.5)
    exact = y.double() + 0.5 * x.double() @ A.double().T @ B.double().T
    assert found.dtype == dtype
    assert (found - exact).norm() < close * exact.norm()


def test_the_gradients_of_the_parameters_are_float32_and_those_of_the_formula() -> None:
    x, y, A, B = inputs(torch.bfloat16)
    lora_branch(x, y, A, B, 0.5).float().square().sum().backward()
    a, b = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
    (y.double() + 0.5 * x.double() @ a.T @ b.T).square().sum().backward()
    for parameter, exact in ((A, a), (B, b)):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - exact.grad).norm() < 2e-2 * exact.grad.norm()


def test_without_gradients_a_parameter_is_cast_again_only_once_it_has_changed() -> None:
    x, y, A, B = inputs(torch.bfloat16)
    with torch.no_grad():
        first = lora_branch(x, y, A, B, 1.0)
        cast = A._dgpo_cast[1]
        assert torch.equal(lora_branch(x, y, A, B, 1.0), first)
        assert A._dgpo_cast[1] is cast
        for change in (lambda: A.mul_(2), lambda: A.lerp_(torch.zeros(3, 8), 0.5), lambda: A.copy_(B.T @ B @ A)):
            change()
            assert torch.equal(lora_branch(x, y, A, B, 1.0), lora_branch(x, y, A.bfloat16(), B.bfloat16(), 1.0))
    torch.optim.AdamW([A], lr=0.1).step()  # no gradient: nothing moves
    A.grad = torch.ones_like(A)
    torch.optim.AdamW([A], lr=0.1, foreach=True).step()
    with torch.no_grad():
        assert torch.equal(lora_branch(x, y, A, B, 1.0), lora_branch(x, y, A.bfloat16(), B.bfloat16(), 1.0))


def test_a_compiled_branch_makes_no_graph_anew_after_a_step() -> None:
    x, y, A, B = inputs(torch.bfloat16)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lora_branch, backend=counter)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(compiled(x, y, A, B, 1.0), lora_branch(x, y, A.bfloat16(), B.bfloat16(), 1.0))
            A.mul_(1.5)
            B.mul_(1.5)
    assert counter.frame_count == 1
