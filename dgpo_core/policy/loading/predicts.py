"""What a checkpoint predicts, found from all its evidence: keys, header, scheduler and family.

The network's shape does not say it: the same UNet is trained to return noise, v or a flow's velocity, and taking one
for another trains a wrong model without an error. So every sign counts, and where signs disagree the user decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.policy.family import Family
from dgpo_core.policy.loading.header import Header
from dgpo_core.policy.loading.libraries import user_errors

_SPELLINGS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "noise": "epsilon",
    "v": "v",
    "v_pred": "v",
    "v_prediction": "v",
    "velocity": "v",
    "flow": "flow",
    "flow_match": "flow",
    "flow_matching": "flow",
    "flow_prediction": "flow",
    "rectified_flow": "flow",
    "rf": "flow",
}
_HEADER_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
_V_FLAGS = ("ss_v_parameterization", "v_parameterization", "v_pred")
_ZERO_SNR_FLAGS = ("ss_zero_terminal_snr", "zero_terminal_snr", "ztsnr", "modelspec.zero_terminal_snr")
_DISCRETE = (  # what the names of diffusers' schedulers begin with that stand on a table of betas
    *("DDIM", "DDPM", "DEIS", "DPMSolver", "Euler", "Heun", "KDPM2", "LMS", "PNDM", "IPNDM", "UniPC", "SASolver"),
)


@dataclass(frozen=True)
class Sign:
    """One piece of evidence. kind: epsilon, v, flow, or the name of another kind; where: what says so."""

    kind: str
    where: str


@dataclass(frozen=True)
class Evidence:
    """What a checkpoint says of itself. zero_snr: where it says that its last noise level is pure noise, or empty."""

    signs: tuple[Sign, ...] = ()
    zero_snr: str = ""


def of_header(header: Header, kinds: Sequence[str], predicted_by: Mapping[str, str]) -> Evidence:
    """What the names of a file's tensors and its metadata say; of several files of one model, join with `together`.

    kinds, predicted_by: what the family says, as in `Family`. Trainers write `ss_v_parameterization: False` for flows,
    too.
    """
    data = header.metadata
    signs = [Sign("v", "the key v_pred")] if "v_pred" in header.tensors else []
    signs += [Sign(_kind(data[key]), f"{key} in its header") for key in _HEADER_KEYS if data.get(key, "").strip()]
    flags = {key: _flag(data[key]) for key in (*_V_FLAGS, *_ZERO_SNR_FLAGS) if key in data}
    flagged = {key: "v" if flag else "epsilon" for key in _V_FLAGS if (flag := flags.get(key)) is not None}
    signs += [Sign(kind, f"{key} in its header") for key, kind in flagged.items() if kind == "v" or kind in kinds]
    architecture = data.get("modelspec.architecture", "").lower()
    signs += [
        Sign(kind, "modelspec.architecture in its header")
        for mark, kind in predicted_by.items()
        if architecture.startswith(mark)
    ]
    zero_snr = "the key ztsnr" if "ztsnr" in header.tensors else ""
    zero_snr = zero_snr or next((f"{key} in its header" for key in _ZERO_SNR_FLAGS if flags.get(key)), "")
    return Evidence(tuple(signs), zero_snr)


def together(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several files of one model."""
    signs = dict.fromkeys(sign for part in parts for sign in part.signs)
    return Evidence(tuple(signs), next((part.zero_snr for part in parts if part.zero_snr), ""))


def of_scheduler(config: Mapping[str, Any], class_name: str = "") -> Evidence:
    """What a diffusers scheduler config says; class_name: what model_index.json calls it."""
    name = str(config.get("_class_name") or class_name)
    where = f"its scheduler ({shown(name, 60)})" if name else "its scheduler's config"
    given = config.get("prediction_type")
    if "EDM" in name:
        return Evidence((Sign("EDM", where),))
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") is True:
        return Evidence((Sign("flow", where),))
    if name and not name.startswith(_DISCRETE):
        return Evidence((Sign(name.removesuffix("Scheduler"), where),))
    zero_snr = where if config.get("rescale_betas_zero_snr") is True else ""
    return Evidence((Sign(_kind(given) if isinstance(given, str) else "epsilon", where),), zero_snr)


def decide(
    what: str,
    own: Evidence,
    scheduler: Evidence,
    *,
    kinds: Sequence[str],
    asked: str = "auto",
    borrowed: bool = False,
) -> tuple[str, bool]:
    """The prediction (epsilon, v or flow), and whether the last noise level is pure noise.

    what: begins the sentences, "The model x"; own: what the weights' files say; scheduler: what the scheduler's config
    says; kinds: the predictions that the family can have; asked: `model.prediction`; borrowed: whether the scheduler is
    only lent to the weights (the config folder of a single file, most often that of the base model), so that its
    epsilon is no evidence against them. Raises UserError where nothing or no single thing is said, and for other kinds.
    """
    if asked != "auto":
        return _asked(what, asked, own, scheduler, kinds)
    signs = list(own.signs)
    if not (borrowed and signs and all(sign.kind == "epsilon" for sign in scheduler.signs)):
        signs += scheduler.signs
    by_kind = {sign.kind: sign for sign in reversed(signs)}
    if len(by_kind) > 1:
        one, other = list(by_kind.values())[:2]
        raise UserError(
            f"{what} contradicts itself: it predicts {one.kind} by {one.where} and {other.kind} by {other.where};"
            f" say which with model.prediction ({', '.join(kinds)})."
        )
    if not by_kind:
        raise UserError(f"{what} does not say what it predicts: set model.prediction to {' or '.join(kinds)}.")
    (sign,) = by_kind.values()
    if sign.kind not in kinds:
        raise UserError(
            f"{what} predicts {sign.kind} by {sign.where}, which cannot be trained here: take another model, or, where"
            f" that is wrong, set model.prediction to {' or '.join(kinds)}."
        )
    zero_snr = own.zero_snr or scheduler.zero_snr
    if zero_snr and sign.kind == "epsilon":
        raise UserError(
            f"{what} has zero terminal SNR by {zero_snr} but predicts epsilon by {sign.where}, which is impossible"
            " (there noise says nothing of the picture): set model.prediction to v, or to epsilon to do without."
        )
    return sign.kind, bool(zero_snr) and sign.kind == "v"


def _asked(what: str, asked: str, own: Evidence, scheduler: Evidence, kinds: Sequence[str]) -> tuple[str, bool]:
    if asked not in kinds:
        raise UserError(f"{what} is of a family that predicts {' or '.join(kinds)}, not {asked}: set model.prediction.")
    return asked, asked == "v" and bool(own.zero_snr or scheduler.zero_snr)


def settle(
    what: str,
    own: Evidence,
    config: Mapping[str, Any],
    class_name: str,
    family: type[Family],
    *,
    asked: str = "auto",
    borrowed: bool = False,
) -> Any:
    """The scheduler of the prediction that `decide` finds, with the noise levels of the one that came with the model.

    config, class_name: of the latter, and how model_index.json calls its class. Raises UserError as `decide`, and for a
    UNet with a flow whose shift depends on the size of the image: how is not known.
    """
    theirs = of_scheduler(config, class_name)
    kind, zero_snr = decide(what, own, theirs, kinds=family.kinds, asked=asked, borrowed=borrowed)
    if kind == "flow" and len(family.kinds) > 1 and config.get("use_dynamic_shifting") is True:
        raise UserError(
            f"{what} has a flow whose shift depends on the image's size, in a way that is not known for its family: put"
            " use_dynamic_shifting false and a shift into its scheduler's config."
        )
    named = str(config.get("_class_name") or class_name)
    return _scheduler(config, named, kind, zero_snr, family.betas, what)


def _scheduler(
    config: Mapping[str, Any], name: str, kind: str, zero_snr: bool, betas: Mapping[str, Any], what: str
) -> Any:
    """The scheduler that goes with what was decided, on the noise levels that `config` has.

    With zero terminal SNR the steps are spaced so that the first is on the last noise level ("trailing"): it is pure
    noise, as what is drawn from (Lin et al., arXiv 2305.08891, section 3.3). Raises UserError for a config that the
    scheduler does not take.
    """
    import diffusers

    if kind == "flow":
        cls = name if name.startswith("FlowMatch") else "FlowMatchEulerDiscreteScheduler"
        shift = config.get("shift", config.get("flow_shift", 1.0))
        made = {**config, "shift": shift or 1.0}
        if cls != name:  # what it has of betas means nothing here
            made = {"num_train_timesteps": config.get("num_train_timesteps", 1000), "shift": shift or 1.0}
    else:
        cls = name if name.startswith(_DISCRETE) else "DDIMScheduler"
        own = "beta_start" in config or config.get("trained_betas") is not None
        named = "v_prediction" if kind == "v" else "epsilon"
        made = {**(config if own else betas), "prediction_type": named, "rescale_betas_zero_snr": zero_snr}
        if zero_snr and made.get("timestep_spacing") != "linspace":
            made["timestep_spacing"] = "trailing"
    with user_errors(f"{what} has a scheduler that cannot be used ({shown(cls, 60)})"):
        return getattr(diffusers, cls).from_config(made)


def _kind(text: str) -> str:
    """In this package's words; what is unknown is named as it stands."""
    plain = text.strip().lower().replace("-", "_").replace(" ", "_")
    return _SPELLINGS.get(plain, shown(text.strip(), 40))


def _flag(text: str) -> bool | None:
    plain = text.strip().lower()
    return True if plain in ("true", "1", "yes") else False if plain in ("false", "0", "no") else None
