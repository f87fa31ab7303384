"""Every family with every prediction and every solver goes through a whole training: draw, train, save, load again."""

from pathlib import Path

import bright
import pytest
import tiny
import torch
from engine import PROMPTS, quick

from dgpo_core.diffusion.solvers import SOLVERS
from dgpo_core.method.rollout import rollout
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import load_policy

KINDS = {
    "sd15": ("sd15", "epsilon", {}),
    "sd15-v": ("sd15", "v", {"prediction_type": "v_prediction"}),
    "sdxl": ("sdxl", "epsilon", {}),
    "sdxl-v": ("sdxl", "v", {"prediction_type": "v_prediction"}),
    "sd3": ("sd3", "flow", {}),
    "flux": ("flux", "flow", {}),
    "zimage": ("zimage", "flow", {}),
    "qwenimage": ("qwenimage", "flow", {}),
    "flux2": ("flux2", "flow", {}),
    "chroma": ("chroma", "flow", {}),
    "sana": ("sana", "flow", {}),
    "hidream": ("hidream", "flow", {}),
    "wan": ("wan", "flow", {}),
}
MATRIX = [(kind, solver) for kind, (_, prediction, _) in KINDS.items() for solver in SOLVERS[prediction]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each kind."""
    root = tmp_path_factory.mktemp("matrix")
    return {kind: tiny.save(family, root / kind, **options) for kind, (family, _, options) in KINDS.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "solver"), MATRIX)
def test_a_model_draws_trains_saves_and_comes_back(
    kind: str, solver: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    size = (tiny.SIZE, tiny.SIZE)
    config = quick(rollout={"solver": solver, "cfg": 2.0}, training={"clip": 1e-3, "lr": 3e-2})
    policy = load_policy(folders[kind], rank=2, alpha=4.0, seed=1)
    trainer = Trainer(policy, PROMPTS, {"bright": bright.Bright()}, config, size=size)
    first, second = trainer.iterate(), trainer.iterate()
    assert all(torch.isfinite(group.latents).all() for group in (*first.groups, *second.groups))
    assert second.metrics["grad_norm"] > 0

    path = tmp_path / "lora.safetensors"
    policy.save_lora(path)
    again = load_policy(folders[kind], init_lora=path, seed=2)

    def picture(drawn_by: object) -> torch.Tensor:
        return rollout(drawn_by, drawn_by.solver(solver, 3, *size), PROMPTS[:1], [[5]], size=size)[0].images

    with policy.using(None):
        base = picture(policy)
    trained = picture(policy)
    assert (trained - base).abs().max() > 1e-4  # the training changed something
    # alpha / rank is multiplied into B when a file is written: one rounding of float32 apart
    assert torch.allclose(picture(again), trained, atol=1e-4)
