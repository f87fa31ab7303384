"""What should be known before a model that was distilled to few steps is trained."""

from dgpo_core.policy.distilled import FewSteps
from dgpo_core.settings.config import EvalConfig, RolloutConfig


def few_steps_warning(few: FewSteps | None, rollout: RolloutConfig, evaluation: EvalConfig | None = None) -> str:
    """What should be known before such a model is trained, in one text; empty for any other model.

    evaluation: None where nothing is measured.
    """
    if few is None:
        return ""
    steps = few.steps or rollout.steps
    wrong = [f"rollout.steps {steps} (now {rollout.steps})"] if rollout.steps != steps else []
    wrong += [f"rollout.cfg 1 (now {rollout.cfg:g})"] if rollout.cfg != 1 else []
    if evaluation:
        wrong += [f"evaluation.steps {steps} (now {evaluation.steps})"] if evaluation.steps != steps else []
        wrong += [f"evaluation.cfg 1 (now {evaluation.cfg:g})"] if evaluation.cfg != 1 else []
    said = f"The model draws in few steps ({few.kind}, {steps} steps, by {few.sign})"
    how = f": train it as it draws, with {', '.join(wrong)}" if wrong else ""
    return f"{said}{how}. If it is none of that kind, set model.distilled no."
