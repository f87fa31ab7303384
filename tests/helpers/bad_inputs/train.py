"""Mistakes in the arguments of a training: what is added to those of a run that would work, and what is told."""

import torch
from bad_inputs.world import Case

A_LORA = {
    "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 999),
    "transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(999, 4),
}
UNKNOWN_LORA = {
    "no_such_block.7.to_q.lora_A.weight": torch.zeros(4, 16),
    "no_such_block.7.to_q.lora_B.weight": torch.zeros(16, 4),
}

TRAIN: dict[str, tuple[Case, str]] = {
    # --- the command line and settings files
    "unknown option": (lambda w: ["--training.lrr", "1"], "did you mean --training.lr?"),
    "option without its group": (lambda w: ["--group_size", "8"], "did you mean --rollout.group_size?"),
    "stray word": (lambda w: ["quickstart"], "quickstart"),
    "option without a value": (lambda w: ["--training.lr"], "--training.lr"),
    "text for a number": (lambda w: ["--iterations", "many"], "many"),
    "unknown choice": (lambda w: ["--training.reference", "base"], "frozen"),
    "unknown preset": (lambda w: ["--preset", "quikstart"], "did you mean quickstart?"),
    "unknown mode": (lambda w: ["--mode", "4"], "known: 1, 2a, 2b"),
    "missing settings file": (lambda w: ["--config", "nowhere.yaml"], "settings file nowhere.yaml does not exist"),
    "settings file that is no YAML": (lambda w: ["--config", w.file("a.yaml", "a: [1")], "not valid YAML"),
    "settings file that is no text": (lambda w: ["--config", w.file("a.yaml", b"\xff\xfe\x00")], "not UTF-8 text"),
    "unknown key in a settings file": (
        lambda w: ["--config", w.file("a.yaml", "rollout: {step: 3}")],
        "did you mean rollout.steps?",
    ),
    "preset without prompts": (lambda w: ["--preset", "sd15-pickscore", "--data.prompts", ""], "--data.prompts FILE"),
    # --- numbers
    "group of one": (lambda w: ["--rollout.group_size", "1"], "nothing to be compared with"),
    "no iterations": (lambda w: ["--iterations", "0"], "iterations is 0 but must be at least 1"),
    "negative learning rate": (lambda w: ["--training.lr", "-1"], "training.lr is -1"),
    "learning rate that is no number": (lambda w: ["--training.lr", "nan"], "training.lr is nan"),
    "infinite beta": (lambda w: ["--training.beta", "inf"], "training.beta is inf"),
    "guidance below 1": (lambda w: ["--rollout.cfg", "0.5"], "rollout.cfg is 0.5"),
    "more timesteps than steps": (lambda w: ["--training.timesteps", "50"], "roll-out steps may be trained on"),
    "timestep clip in the middle of a step": (lambda w: ["--training.t_min", "3.5"], "training.t_min is 3.5"),
    "rank of zero": (lambda w: ["--lora.rank", "0"], "lora.rank is 0"),
    "image size off the grid": (lambda w: ["--model.height", "33"], "multiple of 8"),
    # --- prompts
    "missing prompt file": (lambda w: ["--data.prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
    "empty prompt file": (lambda w: ["--data.prompts", w.file("a.txt", "\n# none\n")], "has no prompts"),
    "malformed JSONL": (lambda w: ["--data.prompts", w.file("a.jsonl", '{"prompt": "a"}\n{"pro')], "a.jsonl:2"),
    "JSONL without prompts": (lambda w: ["--data.prompts", w.file("a.jsonl", '{"text": "a"}')], "a.jsonl:1"),
    "prompt file in Latin-1": (lambda w: ["--data.prompts", w.file("a.txt", b"caf\xe9")], "UTF-8"),
    "prompt file of another kind": (lambda w: ["--data.prompts", w.file("a.csv", "a")], ".txt or .jsonl"),
    "missing held-out file": (lambda w: ["--data.held_out", "nowhere.jsonl"], "nowhere.jsonl"),
    # --- what settings name
    "unknown reward": (lambda w: ["--reward", "shapes_grade"], "shapes_graded"),
    "reward of no weight": (lambda w: ["--reward", "shapes=0"], "other than 0"),
    "no reward": (lambda w: ["--reward", ""], "There is no reward"),
    "unknown reward option": (
        lambda w: ["--config", w.file("a.yaml", "reward: [{name: shapes, options: {colour: red}}]")],
        "colour",
    ),
    "unknown solver": (lambda w: ["--rollout.solver", "eulr"], "euler"),
    "solver that adds noise": (lambda w: ["--rollout.solver", "euler_ancestral"], "euler"),
    "unknown evaluation solver": (lambda w: ["--evaluation.solver", "eulr"], "euler"),
    "missing model": (lambda w: ["--model.path", str(w.folder / "no model")], "no model"),
    "folder that is no model": (lambda w: ["--model.path", str(w.folder)], "model_index.json"),
    "checkpoint that is no model": (lambda w: ["--model.path", w.file("a.safetensors", b"garbage")], "a.safetensors"),
    "pickled model": (lambda w: ["--model.path", w.file("a.ckpt", b"\x80\x04K\x01.")], "a.ckpt"),
    "unknown family": (lambda w: ["--model.family", "sd4"], "sd4"),
    "family of another model": (lambda w: ["--model.family", "sdxl"], "sdxl"),
    "device that is not there": (lambda w: ["--model.device", "abacus"], "abacus"),
    "targets that the model has not": (lambda w: ["--lora.targets", "no_such_layer"], "no_such_layer"),
    "missing LoRA": (lambda w: ["--lora.init", "nowhere.safetensors"], "nowhere.safetensors"),
    "corrupt LoRA": (lambda w: ["--lora.init", w.file("a.safetensors", b"garbage")], "a.safetensors"),
    "LoRA of other shapes": (lambda w: ["--lora.init", w.lora(**A_LORA)], "lora.safetensors"),
    "LoRA of other modules": (lambda w: ["--lora.init", w.lora(**UNKNOWN_LORA)], "lora.safetensors"),
    # --- the run folder
    "run folder with a slash": (lambda w: ["--name", "a/b"], "cannot be a folder name"),
    "output that is a file": (lambda w: ["--output", w.file("taken", "x")], "Cannot make the folder"),
    "nothing to resume": (lambda w: ["--resume"], "There is no run to resume"),
}
