"""What ships with DGPO, by the words that name it in settings: models, and the prompts that go with them."""

from pathlib import Path

from dgpo_core.settings.config import EMBEDDED

DEMO = Path(__file__).parents[1] / "demo"
EDITOR, EDITS = "embedded-editor", "embedded-edits"
MODELS = {EMBEDDED: DEMO / "model", EDITOR: DEMO / "editor"}
"""By `model.path`: diffusers folders."""
FEW_STEPS = {EMBEDDED: DEMO / "lora_2steps.safetensors"}
"""By `model.few_step_lora`."""
TRAINING = {EMBEDDED: DEMO / "train.jsonl", EDITS: DEMO / "edits.jsonl"}
"""By `data.prompts`."""
HELD_OUT = {EMBEDDED: DEMO / "held_out.jsonl", EDITS: DEMO / "edits_held_out.jsonl"}
"""By `data.held_out`."""
