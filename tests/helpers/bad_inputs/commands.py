"""Mistakes in the arguments of the other commands: program, arguments, what is told."""

from bad_inputs.train import UNKNOWN_LORA
from bad_inputs.world import Case

EVALUATE: dict[str, tuple[Case, str]] = {
    "no LoRA named": (lambda w: [], "lora"),
    "unknown option": (lambda w: ["--lorra", "x"], "--lora"),
    "missing LoRA": (lambda w: ["--lora", "nowhere.safetensors"], "nowhere.safetensors"),
    "corrupt LoRA": (lambda w: ["--lora", w.file("a.safetensors", b"garbage")], "a.safetensors"),
    "pickled LoRA": (lambda w: ["--lora", w.file("a.bin", b"\x80\x04K\x01.")], "a.bin"),
    "LoRA of another model": (lambda w: ["--lora", w.lora(**UNKNOWN_LORA)], "lora.safetensors"),
    "one image": (lambda w: ["--lora", "a", "--images", "1"], "images is 1 but must be at least 2"),
    "images of 10^18": (lambda w: ["--lora", "a", "--images", str(10**18)], "images is 1000000000000000000"),
    "steps of 10^18": (lambda w: ["--lora", "a", "--steps", str(10**18)], "steps is 1000000000000000000"),
    "guidance that is no number": (lambda w: ["--lora", "a", "--cfg", "nan"], "cfg is nan"),
    "half a character": (lambda w: ["--lora", "caf\udce9"], "half a character"),
    "a NUL": (lambda w: ["--lora", "a\0b"], "(NUL)"),
}
BENCH: dict[str, tuple[Case, str]] = {
    "unknown option": (lambda w: ["--iteration", "3"], "--iterations"),
    "unknown preset": (lambda w: ["--preset", "quikstart"], "did you mean quickstart?"),
    "unknown random model": (lambda w: ["--random", "sd9"], "sd9"),
    "two models": (lambda w: ["--random", "sdxl", "--model", "a"], "give one of them"),
    "no iterations": (lambda w: ["--iterations", "0"], "iterations is 0 but must be at least 1"),
    "iterations of 10^18": (lambda w: ["--iterations", str(10**18)], "iterations is 1000000000000000000"),
    "height of 10^18": (lambda w: ["--height", str(10**18)], "height is 1000000000000000000"),
    "group of one": (lambda w: ["--group_size", "1"], "nothing to be compared with"),
    "groups of 10^18": (lambda w: ["--groups", str(10**18)], "groups is 1000000000000000000"),
    "negative batch": (lambda w: ["--batch", "-1"], "batch is -1"),
    "unknown reward": (lambda w: ["--reward", "brightnes"], "did you mean 'brightness'?"),
    "missing model": (lambda w: ["--model", str(w.folder / "no model"), "--device", "cpu"], "no model"),
    "a device that is not there": (lambda w: ["--device", "abacus"], "abacus"),
    "half a character": (lambda w: ["--model", "caf\udce9"], "half a character"),
}
ROWS: dict[str, tuple[str, Case, str]] = {
    f"{program}: {what}": (program, *row)
    for program, rows in {"evaluate": EVALUATE, "bench": BENCH}.items()
    for what, row in rows.items()
}
