"""What tests of LoRAs and native policies share: the families of models, and how nearly numbers must agree."""

TOLERANCE = 1e-5
"""Of predictions and gradients, as a share of the largest value: float32 sums in another order. 3e-6 was measured."""
LORA_FAMILIES = (
    *("sd15", "sdxl", "sd3", "sd3.5", "flux", "chroma", "flux2", "qwenimage", "zimage", "hidream", "wan", "embedded"),
)
MODULES = {
    "sd15": 32, "sdxl": 64, "sd3": 7, "flux": 18, "qwen": 24, "lumina": 8, "zimage": 8, "hidream": 24, "wan": 24,
    "aura": 20,
}  # fmt: skip
"""Attention projections; q, k and v are fused in sd3, flux, lumina and zimage. Nothing in the pack knows of aura."""
