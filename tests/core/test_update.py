"""The update's gradient against plain autograd, and that what it saves (forwards, memory) changes nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import SIZE, TIMESTEPS, Calls, accumulate, distance, make_tasks, moved, quick
from torch import Tensor

from dgpo_core.common.seeds import noise
from dgpo_core.diffusion.prediction import Epsilon, Flow
from dgpo_core.method import loss as L
from dgpo_core.method.update import Rows, Tally, Task, candidate_timesteps, draw_timesteps
from dgpo_core.policy import Cond, guided, load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.settings.config import TrainingConfig

# Two ways to the same float32 gradient: sums in another order and matrix products of other heights differ by some 1e-6
# of it; a wrong term or weight would show at 1e-2 and above.
CLOSE = 1e-4


def settings(**changes: Any) -> TrainingConfig:
    """Without clip and KL term; beta so large that the groups' sigmoids are far apart."""
    return replace(quick().training, **{"beta": 300.0, "clip": 0.0, "kl_weight": 0.0, **changes})


def plain(policy: DiffusersPolicy, task: Task, t: TrainingConfig, uncond: Cond | None) -> Tensor:
    """-log sigmoid(-s_g) + KL + the norm's guard of one task, written as in the paper, for autograd."""
    G, sigma = len(task.group), task.t / 1000
    eps = noise(task.noise_seed, policy.latent_shape(*SIZE))
    x_t = (1 - sigma) * task.group.latents + sigma * eps
    v = eps - task.group.latents
    args = (x_t, torch.full((G,), task.t), task.cond.expand(G))
    with torch.no_grad(), policy.using(None):
        f_ref = f_kl = guided(policy, *args, uncond, t.kl_cfg)
    if t.reference == "old":
        with torch.no_grad(), policy.using("old"):
            f_ref = policy.predict(*args)
    f = policy.predict(*args)
    d, d_ref = ((y - v).square().mean((1, 2, 3)) for y in (f, f_ref))
    s = t.beta / G * (task.A * (d - d_ref)).sum()
    loss = -torch.log(torch.sigmoid(-s))
    if t.logit_scaling == "official":
        loss = loss / t.beta
    ratio = f.square().sum((1, 2, 3)).sqrt() / f_kl.square().sum((1, 2, 3)).sqrt()
    return loss + t.kl_weight * (f - f_kl).square().mean() + t.norm_guard * torch.relu(ratio - 1).mean()


def by_autograd(policy: DiffusersPolicy, losses: Sequence[Tensor]) -> Tensor:
    parameters = policy.trainable()
    mean = torch.stack(list(losses)).mean()
    found = torch.autograd.grad(mean, [parameters[key] for key in sorted(parameters)])
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_scaling": "paper"},
        {"logit_scaling": "official"},
        {"logit_scaling": "paper", "kl_weight": 5.0},
        {"logit_scaling": "official", "kl_weight": 0.1},
        {"logit_scaling": "official", "kl_weight": 0.1, "kl_cfg": 4.5},  # mode 2a
        {"logit_scaling": "paper", "kl_weight": 5.0, "reference": "old"},  # mode 2b
        {"logit_scaling": "official", "norm_guard": 0.5},
        {"logit_scaling": "official", "norm_guard": 0.5, "kl_weight": 0.1, "reference": "old"},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_the_gradient_is_that_of_the_mean_group_loss_the_kl_term_and_the_guard(
    changes: dict[str, Any], policy: DiffusersPolicy
) -> None:
    moved(policy, "current", seed=1)
    moved(policy, "old", seed=2)
    t, tasks = settings(**changes), make_tasks(policy)
    (uncond,) = policy.encode([""])
    exact = by_autograd(policy, [plain(policy, task, t, uncond) for task in tasks])
    found, _ = accumulate(policy, tasks, t, uncond=uncond if t.kl_cfg > 1 else None)
    assert distance(found, exact) < CLOSE


def test_the_paper_scaling_is_beta_times_the_official_one(policy: DiffusersPolicy) -> None:
    moved(policy, "current", seed=1)
    tasks = make_tasks(policy)
    official, _ = accumulate(policy, tasks, settings(logit_scaling="official"))
    paper, _ = accumulate(policy, tasks, settings(logit_scaling="paper"))
    assert distance(paper, 300.0 * official) < CLOSE


def test_the_guided_reference_of_the_kl_term_changes_the_gradient(policy: DiffusersPolicy) -> None:
    moved(policy, "current", seed=1)
    tasks, (uncond,) = make_tasks(policy), policy.encode([""])
    plain_reference, _ = accumulate(policy, tasks, settings(kl_weight=1.0))
    guided_reference, _ = accumulate(policy, tasks, settings(kl_weight=1.0, kl_cfg=4.5), uncond=uncond)
    assert distance(guided_reference, plain_reference) > 10 * CLOSE


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["frozen", "old"])
def test_the_micro_batch_changes_neither_gradient_nor_tally(reference: str, policy: DiffusersPolicy) -> None:
    moved(policy, "current", seed=1)
    moved(policy, "old", seed=2, size=0.29)
    t = settings(reference=reference, clip=1e-4, kl_weight=0.1)
    tasks = make_tasks(policy)  # 4 tasks of G = 4: 16 rows
    sigmoids = torch.tensor([_sigmoid(policy, task, t) for task in tasks])
    assert sigmoids.max() - sigmoids.min() > 0.2  # else a wrong logit of a cut group would not show
    whole, tally = accumulate(policy, tasks, t, micro_batch=64)
    assert 0 < tally.clipped < tally.samples == 16
    for micro_batch in (1, 3, 4, 7, 8, 16):
        found, parts = accumulate(policy, tasks, t, micro_batch)
        assert distance(found, whole) < CLOSE, micro_batch
        assert (parts.samples, parts.clipped) == (tally.samples, tally.clipped), micro_batch
        assert [parts.loss, parts.kl, parts.error] == pytest.approx([tally.loss, tally.kl, tally.error], rel=1e-3)


def _sigmoid(policy: DiffusersPolicy, task: Task, t: TrainingConfig) -> float:
    rows = Rows.of([task], policy)
    d = []
    for adapter in ("current", "old" if t.reference == "old" else None):
        with torch.no_grad(), policy.using(adapter):
            d.append(L.denoising_error(policy.predict(rows.x_t, rows.t, rows.cond), rows.target))
    return torch.sigmoid(L.group_logit(rows.A[None], d[0][None], d[1][None], t.beta)).item()


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 8, 64])
def test_no_forward_is_larger_than_the_micro_batch(
    micro_batch: int, policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make_tasks(policy)
    calls = Calls(policy, monkeypatch)
    accumulate(policy, tasks, settings(), micro_batch)
    assert max(rows for _, rows, _ in calls) == min(micro_batch, 16)
    # whole groups take the logit from the forward that is differentiated: no forward more than the two there must be
    passes = 1 if micro_batch >= 4 else 2
    assert calls.rows("current") == passes * 16
    assert calls.rows(None) == 16


def test_samples_that_are_alone_in_a_forward_weigh_as_much_as_others(policy: DiffusersPolicy) -> None:
    """5 samples cut into 3 and 2: each still counts one fifth."""
    moved(policy, "current", seed=1)
    tasks = make_tasks(policy, G=5, timesteps=TIMESTEPS[:1])
    whole, _ = accumulate(policy, tasks, settings(kl_weight=0.1), 64)
    cut, _ = accumulate(policy, tasks, settings(kl_weight=0.1), 3)
    assert distance(cut, whole) < CLOSE


# --- forwards that are not needed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "old_is_current", "adapters"),
    [
        ({"clip": 1e-2}, True, {"current", None}),  # the old policy is the current one: nothing can be clipped
        ({"clip": 1e-2}, False, {"current", None, "old"}),
        ({"clip": 0.0}, False, {"current", None}),
        ({"clip": 1e-2, "reference": "old"}, False, {"current", "old", None}),  # the KL term is always the base's
        ({"clip": 0.0, "reference": "old"}, False, {"current", "old", None}),
        ({"clip": 1e-2, "reference": "old"}, True, {"current", None}),
        ({"clip": 1e-2, "reference": "old", "kl_weight": 0.0}, False, {"current", "old"}),
        ({"clip": 0.0, "kl_weight": 0.0}, False, {"current", None}),
    ],
)
def test_only_the_policies_that_are_needed_are_asked_and_once_each(
    changes: dict[str, Any],
    old_is_current: bool,
    adapters: set[str | None],
    policy: DiffusersPolicy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = make_tasks(policy)
    calls = Calls(policy, monkeypatch)
    accumulate(policy, tasks, settings(**{"kl_weight": 0.1, **changes}), old_is_current=old_is_current)
    assert calls.adapters() == adapters
    assert all(calls.rows(adapter) == 16 for adapter in adapters)
    assert all(grad == (adapter == "current") for adapter, _, grad in calls)


def test_where_old_is_current_skipping_its_forward_changes_nothing(policy: DiffusersPolicy) -> None:
    moved(policy, "current", seed=1)
    moved(policy, "old", seed=1)
    tasks = make_tasks(policy)
    for changes in ({"clip": 1e-3}, {"clip": 1e-3, "reference": "old"}):
        asked, _ = accumulate(policy, tasks, settings(kl_weight=0.1, **changes), old_is_current=False)
        skipped, _ = accumulate(policy, tasks, settings(kl_weight=0.1, **changes), old_is_current=True)
        assert distance(skipped, asked) < CLOSE


def test_a_plug_in_that_has_turned_gradients_off_changes_nothing(policy: DiffusersPolicy) -> None:
    """`torch.set_grad_enabled(False)` stands at the top of many a scoring script."""
    tasks = make_tasks(policy)
    moved(policy, "current", seed=1)
    exact, _ = accumulate(policy, tasks, settings())
    with torch.no_grad():
        found, _ = accumulate(policy, tasks, settings())
    assert torch.equal(found, exact)


def test_an_update_without_tasks_is_nothing(policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(policy, monkeypatch)
    found, tally = accumulate(policy, [], settings())
    assert not calls
    assert tally == Tally()
    assert found.count_nonzero() == 0


# --- the clip --------------------------------------------------------------------------------------------------------


def test_the_clip_stops_the_gradient_of_the_samples_that_have_moved_far_enough(policy: DiffusersPolicy) -> None:
    moved(policy, "current", seed=1)
    moved(policy, "old", seed=2)
    (task, *_) = make_tasks(policy)
    rows = Rows.of([task], policy)
    with torch.no_grad():
        d, d_old = (_error(policy, name, rows) for name in ("current", "old"))
    ahead = d_old > d  # already likelier than under the old policy
    stopped = replace(task, A=torch.where(ahead, 1.0, -1.0))
    free = replace(task, A=torch.where(ahead, -1.0, 1.0))
    found, tally = accumulate(policy, [stopped], settings(clip=1e-6))
    assert found.count_nonzero() == 0
    assert tally.means()["clip_fraction"] == 1.0
    clipped, tally = accumulate(policy, [free], settings(clip=1e-6))
    unclipped, _ = accumulate(policy, [free], settings(clip=0.0))
    assert tally.clipped == 0
    assert distance(clipped, unclipped) < CLOSE
    assert unclipped.norm() > 0


def test_the_clip_leaves_the_other_samples_and_the_kl_term(policy: DiffusersPolicy) -> None:
    moved(policy, "current", seed=1)
    moved(policy, "old", seed=2)
    (task, *_) = make_tasks(policy)
    rows = Rows.of([task], policy)
    with torch.no_grad():
        d, d_old, d_ref = (_error(policy, name, rows) for name in ("current", "old", None))
    t = settings(clip=1e-6, kl_weight=0.1)
    task = replace(task, A=torch.where(d_old > d, 1.0, -1.0) * torch.tensor([1.0, 1.0, -1.0, -1.0]))
    keep = torch.tensor([0.0, 0.0, 1.0, 1.0])
    s = t.beta / 4 * (task.A * (d - d_ref)).sum()
    with policy.using(None), torch.no_grad():
        f_ref = policy.predict(rows.x_t, rows.t, rows.cond)
    f = policy.predict(rows.x_t, rows.t, rows.cond)
    loss = (torch.sigmoid(s) * keep * task.A * L.denoising_error(f, rows.target)).mean()
    exact = by_autograd(policy, [loss + 0.1 * (f - f_ref).square().mean()])
    found, tally = accumulate(policy, [task], t)
    assert tally.clipped == 2
    assert distance(found, exact) < CLOSE


def _error(policy: DiffusersPolicy, adapter: Any, rows: Rows) -> Tensor:
    with policy.using(adapter):
        return L.denoising_error(policy.predict(rows.x_t, rows.t, rows.cond), rows.target)


# --- groups that prefer nothing ---------------------------------------------------------------------------------------


def test_a_group_of_equal_rewards_costs_the_kl_terms_forwards_alone(
    policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [replace(task, A=torch.zeros(4)) for task in make_tasks(policy)]
    for changes, rows in (({"kl_weight": 0.1}, {"current": 16, None: 16}), ({"kl_weight": 0.0}, {})):
        calls = Calls(policy, monkeypatch)
        _, tally = accumulate(policy, tasks, settings(clip=1e-2, **changes), micro_batch=3)
        assert {adapter: calls.rows(adapter) for adapter in calls.adapters()} == rows
        assert tally.compared == 0
        monkeypatch.undo()


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_dropout_the_micro_batch_changes_nothing_either(sd3_folder: Path) -> None:
    policy = load_policy(sd3_folder, rank=4, alpha=8.0, dropout=0.4)
    moved(policy, "current", seed=1)
    moved(policy, "old", seed=2, size=0.29)
    t, tasks = settings(clip=1e-4, kl_weight=0.1), make_tasks(policy)
    whole, _ = accumulate(policy, tasks, t, micro_batch=64)
    for micro_batch in (1, 3, 4, 8):
        found, _ = accumulate(policy, tasks, t, micro_batch)
        assert distance(found, whole) < CLOSE, micro_batch
    backwards, _ = accumulate(policy, tasks[::-1], t)
    assert distance(backwards, whole) < CLOSE  # nor which group is beside which
    policy.enable_gradient_checkpointing()
    again, _ = accumulate(policy, tasks, t, micro_batch=3)
    assert distance(again, whole) < CLOSE
    plain = load_policy(sd3_folder, rank=4, alpha=8.0)
    moved(plain, "current", seed=1)
    moved(plain, "old", seed=2, size=0.29)
    assert distance(accumulate(plain, tasks, t)[0], whole) > 100 * CLOSE


# --- noise and timesteps ---------------------------------------------------------------------------------------------


def test_the_samples_of_a_group_share_the_noise_and_it_is_redrawn_per_timestep(policy: DiffusersPolicy) -> None:
    tasks = make_tasks(policy)
    rows = Rows.of(tasks, policy)
    x0 = torch.cat([task.group.latents for task in tasks])
    eps = (rows.target + x0).view(4, 4, -1)  # flow: target = eps - x0
    assert torch.allclose(eps, eps[:, :1].expand_as(eps), atol=1e-5)  # adding x0 and taking it away rounds
    assert all((eps[a, 0] - eps[b, 0]).abs().max() > 0.1 for a in range(4) for b in range(a))
    assert rows.t.view(4, 4).tolist() == [[task.t] * 4 for task in tasks]
    sigma = rows.t.view(-1, 1, 1, 1) / 1000
    assert torch.allclose(rows.x_t, (1 - sigma) * x0 + sigma * eps.view_as(x0), atol=1e-5)


LEVELS = torch.tensor([1000.0, 900.0, 700.0, 500.0, 200.0])
FLOW = Flow()


@pytest.mark.parametrize(
    ("t_min", "kept"),
    [
        (0.0, 5),
        (0.5, 4),  # a noise level: 500 is on it
        (0.51, 3),
        (0.999, 1),
        (1.0, 1),  # from 1 on: how many of the first steps
        (3.0, 3),
        (5.0, 5),
    ],
)
def test_the_timestep_clip_is_a_noise_level_or_a_number_of_steps(t_min: float, kept: int) -> None:
    assert candidate_timesteps(LEVELS, FLOW, t_min).tolist() == LEVELS[:kept].tolist()


def test_timesteps_are_drawn_without_replacement_and_only_from_those_allowed() -> None:
    allowed = candidate_timesteps(LEVELS, FLOW, 0.5)
    t = settings(timesteps=3)
    draws = [draw_timesteps(allowed, t, FLOW, seed) for seed in range(100)]
    assert all(len(set(draw)) == 3 and set(draw) <= {1000.0, 900.0, 700.0, 500.0} for draw in draws)
    assert {level for draw in draws for level in draw} == {1000.0, 900.0, 700.0, 500.0}
    assert len({tuple(draw) for draw in draws}) > 10
    assert draw_timesteps(allowed, t, FLOW, 5) == draws[5]


def test_a_model_with_a_table_of_noise_levels_is_told_the_level_that_it_was_given() -> None:
    t = settings(timesteps=50, timestep_source="uniform", t_min=0.3)
    table = Epsilon(alphas_cumprod=torch.linspace(0.99, 0.01, 1000))
    draws = draw_timesteps(LEVELS, t, table, seed=3)
    assert all(level == round(level) and 300 <= level <= 999 for level in draws)
    assert any(level != round(level) for level in draw_timesteps(LEVELS, t, FLOW, seed=3))


def test_a_solvers_timesteps_between_the_entries_of_a_noise_table_are_not_trained_at() -> None:
    """Euler, evenly spaced, steps between them. Noise is added by the table: the network would hear of another."""
    levels = torch.linspace(999, 0, 8)
    assert any(level % 1 for level in levels.tolist())
    t, table = settings(timesteps=5), Epsilon(1000, torch.linspace(0.999, 0.01, 1000))
    draws = [[x for seed in range(50) for x in draw_timesteps(levels, t, p, seed)] for p in (table, FLOW)]
    assert all(x % 1 == 0 and 0 <= x <= 999 for x in draws[0])
    assert any(x % 1 for x in draws[1])  # a flow model takes any


def test_uniform_timesteps_lie_between_t_min_and_the_top() -> None:
    t = settings(timesteps=50, timestep_source="uniform", t_min=0.3)
    draws = [x for seed in range(20) for x in draw_timesteps(LEVELS, t, FLOW, seed)]
    assert 300 <= min(draws) < 310
    assert 990 < max(draws) <= 1000
    assert abs(sum(draws) / 1000 - 650) < 25  # 1000 draws: the mean's deviation is 200 / sqrt(1000) = 6


# --- memory against time ---------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradient(policy: DiffusersPolicy, sd3_folder: Path) -> None:
    other = load_policy(sd3_folder, rank=4, alpha=8.0)
    other.enable_gradient_checkpointing()
    t = settings(kl_weight=0.1, clip=1e-4)
    found = []
    for each in (policy, other):
        moved(each, "current", seed=1)
        moved(each, "old", seed=2)
        found.append(accumulate(each, make_tasks(each), t, micro_batch=8)[0])
    assert distance(found[1], found[0]) < CLOSE  # the backward runs again what the forward ran, adapter and all


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_gradient(policy: DiffusersPolicy, sd3_folder: Path) -> None:
    """Traced but not turned into machine code, so no compiler is needed; a graph that was made with one adapter and is
    used with another would show."""
    other = load_policy(sd3_folder, rank=4, alpha=8.0)
    other.compile(backend="eager")
    t = settings()
    found = []
    for each in (policy, other):
        moved(each, "current", seed=1)
        found.append(accumulate(each, make_tasks(each, timesteps=TIMESTEPS[:1]), t)[0])
    assert distance(found[1], found[0]) < CLOSE
