"""Settings for who says only what to teach, to which kind of model, and whether a person judges.

A preset for the model, in rounds small enough that some minutes make several of them.
"""

from dataclasses import replace

from dgpo_core.settings.config import EMBEDDED, Config
from dgpo_core.settings.presets import load_preset
from dgpo_core.settings.shipped import EDITOR, MODELS

PRESETS = {
    EMBEDDED: "quickstart",
    EDITOR: "quickstart-edits",
    "sd15": "sd15",
    "sdxl": "sdxl",
    "sd3": "sd35m",
    "flux": "flux",
    "kontext": "flux",
    "chroma": "chroma-pickscore",
    "flux2": "flux2-klein-pickscore",
    "qwenimage": "qwenimage-pickscore",
    "qwen-image-edit": "qwenimage-pickscore",
    "zimage": "zimage",
    "sana": "sana-pickscore",
    "hidream": "hidream-pickscore",
    "wan": "wan",
}
"""By kind of model: one that ships, or a family."""
_ALIKE = {"sd20": "sd15", "ssd1b": "sdxl", "segmind_vega": "sdxl", "koala": "sdxl"}
GROUPS, GROUP_SIZE = 4, 8
"""Of a round: with it a person's answers were measured on the embedded model (dgpo_core/demo/README.md)."""


def kind_in_comfyui(name: str) -> str:
    """The kind of a MODEL by what ComfyUI calls its model (ZImage, WAN21_T2V, Flux2): the family, or one that it is
    like, whose name it begins with; else the name."""
    begins = [start for start in (*PRESETS, *_ALIKE) if name.lower().startswith(start)]
    kind = max(begins, key=len, default=name)
    return _ALIKE.get(kind, kind)


def recipe(kind: str, people: bool) -> Config:
    """The settings; those of SD3.5, a flow model, for a kind that has no preset. The quickstart stays as it is.

    people: a person judges, so what counts is the spread within a group, whose scores are not those of another.
    """
    preset = load_preset(PRESETS.get(kind, PRESETS["sd3"]))
    if kind in MODELS and not people:
        return preset
    spread = "group" if people else preset.training.advantage_std
    return replace(
        preset,
        data=replace(preset.data, groups_per_iteration=GROUPS),
        rollout=replace(preset.rollout, group_size=GROUP_SIZE),
        training=replace(preset.training, advantage_std=spread, ema_slow_every=1),  # an average of few rounds
    )
