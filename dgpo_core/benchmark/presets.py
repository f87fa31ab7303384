"""The settings that a model of real size is measured with."""

PRESETS = {
    "sd15": "sd15-pickscore",
    "sd21": "sd21",
    "sd35m": "sd35m-pickscore-curve",
    "sdxl": "sdxl-pickscore",
    "flux": "flux-pickscore",
    "kontext": "flux-pickscore",
    "chroma": "chroma-pickscore",
    "flux2-klein": "flux2-klein-pickscore",
    "qwenimage": "qwenimage-pickscore",
    "qwen-image-edit": "qwenimage-pickscore",
    "zimage": "zimage-pickscore",
    "sana": "sana-pickscore",
    "hidream": "hidream-pickscore",
    "wan": "wan",
    "wan-14b": "wan",
}
"""The preset that a random model is timed and counted with where none is given."""
