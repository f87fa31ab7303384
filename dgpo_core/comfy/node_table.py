"""How a text goes through the nodes of ComfyUI: for each known kind of node, a rule from its inputs to its output.

A rule gives the text that an output holds (of a CONDITIONING, the text that was encoded) and nothing but what the node
really gives out. A kind that is not here, such as one that draws its text at random or asks a language model for it,
has no rule: its output is not in the file. Core nodes are as in `comfy_extras/nodes_string.py`; the others are
those of widespread packs, as far as what they do is certain.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dgpo_core.common.errors import NoPrompt, SeveralPrompts

LONGEST = 100_000
"""Characters of a text on its way; nodes that double it could go on for ever."""


class At(Protocol):
    """One output of one node, as a rule sees it."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The node's inputs by name: values of widgets, and links."""
        ...

    @property
    def output(self) -> int:
        """Which of the node's outputs."""
        ...

    def text(self, name: str) -> str:
        """What is at an input, written there or linked. Raises NoPrompt where no text is."""
        ...

    def linked(self, name: str) -> bool:
        """Whether something is connected to an input."""
        ...


Rule = Callable[[At], str]


# --- rules -----------------------------------------------------------------------------------------------------------


def passes(name: str) -> Rule:
    """The text at one input, unchanged."""
    return lambda at: at.text(name)


def only_one(*names: str) -> Rule:
    """The one text at several inputs; those that are empty or not there say nothing."""

    def rule(at: At) -> str:
        found = {at.text(name).strip(): None for name in names if name in at.inputs}
        found.pop("", None)
        if len(found) > 1:
            raise SeveralPrompts(f"has {len(found)} different texts at one node of the workflow that it holds")
        return next(iter(found), "")

    return rule


def outputs(names: Mapping[int, str]) -> Rule:
    """Output by output, the text at the input of that name; other outputs hold none."""

    def rule(at: At) -> str:
        if at.output not in names:
            raise NoPrompt("has no text at its sampler in the workflow that it holds")
        return at.text(names[at.output])

    return rule


def first_linked(*names: str, only: tuple[int, ...] = (0,)) -> Rule:
    """The text at the first input to which something is connected, at the outputs `only`."""

    def rule(at: At) -> str:
        name = next((name for name in names if at.linked(name)), None)
        if name is None or at.output not in only:
            raise NoPrompt("has no text at its sampler in the workflow that it holds")
        return at.text(name)

    return rule


def plain(name: str, special: str) -> Rule:
    """The text at an input, where it has none of the characters that the node does something with."""

    def rule(at: At) -> str:
        text = at.text(name)
        if any(character in text for character in special):
            raise NoPrompt("has a text that a node of the workflow that it holds may have changed")
        return text

    return rule


def nothing(at: At) -> str:
    """Whatever the text was, the sampler did not see it."""
    raise NoPrompt("was drawn with a conditioning that was zeroed out")


def _reroute(at: At) -> str:
    return first_linked(*at.inputs)(at)


def _numbered(prefix: str, only: tuple[int, ...] = (0,)) -> Rule:
    """The first connected one of inputs that count: any_01, any_02, ..."""

    def rule(at: At) -> str:
        names = [name for name in at.inputs if name.startswith(prefix) and name[len(prefix) :].isdecimal()]
        return first_linked(*sorted(names, key=lambda name: int(name[len(prefix) :])), only=only)(at)

    return rule


def _written(at: At, name: str, kind: type, default: Any = None) -> Any:
    """A widget's value. NoPrompt where it is not one of `kind`, as where something is connected."""
    value = at.inputs.get(name, default)
    if type(value) is not kind:
        raise NoPrompt(f"has a workflow in which {name!r} of a node is not written down")
    return value


def _switch(at: At) -> str:
    return at.text("on_true" if _written(at, "switch", bool) else "on_false")


def _soft_switch(at: At) -> str:
    there = [name for name in ("on_true", "on_false") if name in at.inputs]
    return at.text(there[0]) if len(there) == 1 else _switch(at)


def _impact_switch(at: At) -> str:
    return at.text(f"input{_written(at, 'select', int)}")


def _concatenate(at: At) -> str:
    delimiter = at.text("delimiter") if "delimiter" in at.inputs else ""
    return delimiter.join((at.text("string_a"), at.text("string_b")))


def _replace(at: At) -> str:
    text, find, replace = at.text("string"), at.text("find"), at.text("replace")
    if text.count(find) * len(replace) > LONGEST:
        raise NoPrompt("has a text that grows without measure in the workflow that it holds")
    return text.replace(find, replace)


def _substring(at: At) -> str:
    return at.text("string")[_written(at, "start", int) : _written(at, "end", int)]


def _by_mode(**modes: Callable[[str], str]) -> Rule:
    """As the widget `mode` says; what it may say is keyed without spaces."""

    def rule(at: At) -> str:
        change = modes.get(_written(at, "mode", str).replace(" ", "_"))
        if change is None:
            raise NoPrompt("has a text that a node of the workflow that it holds may have changed")
        return change(at.text("string"))

    return rule


def _average(at: At) -> str:
    strength = at.inputs.get("conditioning_to_strength")
    if strength in (0, 1) and type(strength) in (int, float):
        return at.text("conditioning_to" if strength else "conditioning_from")
    return only_one("conditioning_to", "conditioning_from")(at)


# --- the table -------------------------------------------------------------------------------------------------------

_CONDITIONING = passes("conditioning")
_PAIR = outputs({0: "positive", 1: "negative"})
_EFFICIENT = outputs({1: "positive", 2: "negative"})

RULES: Mapping[str, Rule] = {
    # from a text to a CONDITIONING
    "CLIPTextEncode": passes("text"),
    "CLIPTextEncodeSDXL": only_one("text_g", "text_l"),
    "CLIPTextEncodeSDXLRefiner": passes("text"),
    "CLIPTextEncodeSD3": only_one("clip_l", "clip_g", "t5xxl"),
    "CLIPTextEncodeFlux": only_one("clip_l", "t5xxl"),
    "CLIPTextEncodeHiDream": only_one("clip_l", "clip_g", "t5xxl", "llama"),
    "CLIPTextEncodeHunyuanDiT": only_one("bert", "mt5xl"),
    "CLIPTextEncodePixArtAlpha": passes("text"),
    "BNK_CLIPTextEncodeAdvanced": passes("text"),
    "BNK_CLIPTextEncodeSDXLAdvanced": only_one("text_g", "text_l"),
    "smZ CLIPTextEncode": passes("text"),
    "Efficient Loader": _EFFICIENT,
    "Eff. Loader SDXL": outputs({0: "positive"}),
    # from a CONDITIONING to another of the same text
    "ConditioningMultiply": _CONDITIONING,
    "ConditioningSetArea": _CONDITIONING,
    "ConditioningSetAreaPercentage": _CONDITIONING,
    "ConditioningSetAreaStrength": _CONDITIONING,
    "ConditioningSetMask": _CONDITIONING,
    "ConditioningSetTimestepRange": _CONDITIONING,
    "FluxGuidance": _CONDITIONING,
    "FluxDisableGuidance": _CONDITIONING,
    "FluxKontextMultiReferenceLatentMethod": _CONDITIONING,
    "ReferenceLatent": _CONDITIONING,
    "StyleModelApply": _CONDITIONING,
    "unCLIPConditioning": _CONDITIONING,
    "SetModelHooksOnCond": _CONDITIONING,
    "ControlNetApply": _CONDITIONING,
    "ControlNetApplyAdvanced": _PAIR,
    "ControlNetApplySD3": _PAIR,
    "ControlNetInpaintingAliMamaApply": _PAIR,
    "ACN_AdvancedControlNetApply": _PAIR,
    "ACN_AdvancedControlNetApply_v2": _PAIR,
    "InpaintModelConditioning": _PAIR,
    "InstructPixToPixConditioning": _PAIR,
    "SD_4XUpscale_Conditioning": _PAIR,
    # from several CONDITIONINGs to one
    "ConditioningCombine": only_one("conditioning_1", "conditioning_2"),
    "ConditioningConcat": only_one("conditioning_to", "conditioning_from"),
    "ConditioningAverage": _average,
    "ConditioningZeroOut": nothing,
    # texts
    "PrimitiveString": passes("value"),
    "PrimitiveStringMultiline": passes("value"),
    "StringConcatenate": _concatenate,
    "StringReplace": _replace,
    "StringSubstring": _substring,
    "StringTrim": _by_mode(Both=str.strip, Left=str.lstrip, Right=str.rstrip),
    "CaseConverter": _by_mode(
        UPPERCASE=str.upper, lowercase=str.lower, Capitalize=str.capitalize, Title_Case=str.title
    ),
    "ShowText|pysssss": passes("text"),
    "StringConstant": passes("string"),
    "StringConstantMultiline": plain("string", "\n"),
    "String Literal": passes("string"),
    "Text Multiline": plain("text", "#["),
    "CR Text": passes("text"),
    "CR Prompt Text": passes("prompt"),
    # ways
    "Reroute": _reroute,
    "ReroutePrimitive|pysssss": passes("value"),
    "Any Switch (rgthree)": _numbered("any_"),
    "Context (rgthree)": first_linked("positive", "base_ctx", only=(0, 4)),
    "Context Switch (rgthree)": _numbered("ctx_", only=(0, 4)),
    "ComfySwitchNode": _switch,
    "ComfySoftSwitchNode": _soft_switch,
    "ImpactSwitch": _impact_switch,
    "ToBasicPipe": passes("positive"),
    "FromBasicPipe": outputs({3: "basic_pipe"}),
    "FromBasicPipe_v2": outputs({0: "basic_pipe", 4: "basic_pipe"}),
    "KSampler (Efficient)": _EFFICIENT,
    "KSampler Adv. (Efficient)": _EFFICIENT,
}
"""By kind of node. What is not here has an output that nobody can tell."""

SAMPLERS: Mapping[str, tuple[str, ...]] = {
    "KSampler": ("positive",),
    "KSamplerAdvanced": ("positive",),
    "SamplerCustom": ("positive",),
    "BasicGuider": ("conditioning",),
    "CFGGuider": ("positive",),
    "PerpNegGuider": ("positive",),
    "DualCFGGuider": ("cond1", "cond2"),
    "KSampler (Efficient)": ("positive",),
    "KSampler Adv. (Efficient)": ("positive",),
    "KSampler SDXL (Eff.)": ("sdxl_tuple",),
    "ImpactKSamplerBasicPipe": ("basic_pipe",),
}
"""Nodes that draw, and the inputs that say what. One that is not here counts by an input `positive`."""

DETAILERS = frozenset(
    ("FaceDetailer", "FaceDetailerPipe", "DetailerForEach", "DetailerForEachDebug", "DetailerForEachPipe")
)
"""Nodes that paint a part of a picture anew, with a text about that part: not what the picture was drawn for."""

SCRIPTS = frozenset(("HighRes-Fix Script", "Noise Control Script", "Tiled Upscaler Script"))
"""What may be connected to `script` of an Efficiency sampler; others (XY Plot) draw with other texts."""

WIDGETS: Mapping[str, tuple[str, ...]] = {
    "CLIPTextEncode": ("text",),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
    "StringConcatenate": ("string_a", "string_b", "delimiter"),
    "StringReplace": ("string", "find", "replace"),
    "StringTrim": ("string", "mode"),
    "CaseConverter": ("string", "mode"),
}
"""The order of widgets in a workflow as it was seen, where an old front end does not write their names."""
