"""What is told of a LoRA: how much of it was applied, what became of the rest, and what its header says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dgpo_core.common.reading import shown
from dgpo_core.policy.lora import keys as lora_keys
from dgpo_core.policy.lora.keys import Matches

PLAIN = "apply it in ComfyUI with DGPO LoRA Loader and make a plain LoRA with Extract and Save Lora"
"""What converts a LoRA of any form that ComfyUI knows into one that training can go on from."""

_MOST = 80  # characters of a text in the header


def made_for(metadata: Mapping[str, str]) -> str:
    """The base model that a LoRA's header names, "" where it names none."""
    architecture = metadata.get("modelspec.architecture", "").removesuffix("/lora")
    return shown(metadata.get("ss_base_model_version") or architecture or metadata.get("dgpo.base", ""), _MOST)


def summary(metadata: Mapping[str, str]) -> str:
    """What a LoRA's header says of its training, in one line; "" where it says nothing."""
    said = {what: metadata[f"dgpo.{what}"] for what in ("step", "rewards", "base") if f"dgpo.{what}" in metadata}
    own = [f"{what} {shown(text, _MOST)}" for what, text in said.items()]
    facts = [f"DGPO {', '.join(own)}"] if own else []
    if made_for(metadata):
        facts.append(f"made for {made_for(metadata)}")
    if metadata.get("ss_network_dim"):
        facts.append(f"rank {shown(metadata['ss_network_dim'], _MOST)}")
    return ", ".join(facts)


def report(
    matches: Matches, applied: int, unread: Mapping[str, str], metadata: Mapping[str, str], with_clip: bool
) -> str:
    """One line: how many modules were applied, what became of the others, and what the header says.

    unread: modules that were left out because ComfyUI would read only a part of them, each with a key that it does not.
    """
    text = () if with_clip else lora_keys.of_text_encoder(matches.missing)
    missing = [name for name in matches.missing if name not in set(text)]
    lost = len(matches.targets) - len(unread) - applied
    reasons = [
        f"{len(text)} of the text encoder left out: no CLIP is connected" if text else "",
        _some(missing, "not in this model"),
        _some(matches.misfits, "of other shapes than this model's"),
        _some(matches.incomplete, "incomplete"),
        _some(matches.twice, "given twice under two names"),
        *(_some(names, f"in a form that ComfyUI does not know ({name})") for name, names in _forms(unread).items()),
        f"{lost} that ComfyUI had no place for" if lost else "",
    ]
    head = "; ".join([f"{applied} of {matches.total} modules applied", *filter(None, reasons)])
    return "; ".join(filter(None, [head, summary(metadata)]))


def nothing_fits(
    name: str, matches: Matches, unread: Mapping[str, str], metadata: Mapping[str, str], with_clip: bool
) -> str:
    """The sentence for a LoRA of which nothing could be applied."""
    if not with_clip and matches.total and len(lora_keys.of_text_encoder(matches.missing)) == matches.total:
        return f"The LoRA {shown(name)} changes only the text encoder: connect a CLIP."
    if unread:
        form, names = next(iter(_forms(unread).items()))
        return f"The LoRA {shown(name)} is in a form that ComfyUI does not know ({form}, in {names[0]}): convert it."
    if matches.left_out and not matches.missing:
        why = "other shapes than this model's" if matches.misfits else "tensors that do not belong together"
        return f"The LoRA {shown(name)} does not fit: {shown(matches.left_out[0])} has {why}."
    if matches.targets:
        return f"The LoRA {shown(name)} is in a form that ComfyUI does not know: convert it, or give another."
    base = made_for(metadata)
    return f"The LoRA {shown(name)} has no layer of this model: it was made for {base or 'another one'}."


def _some(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}, such as {shown(names[0])}" if names else ""


def _forms(unread: Mapping[str, str]) -> dict[str, list[str]]:
    """The modules by their form, or the key that was not read where that has no name."""
    by_form: dict[str, list[str]] = {}
    for module, key in unread.items():
        by_form.setdefault(lora_keys.form([key]) or shown(key.rpartition(".")[2]), []).append(shown(module))
    return by_form
