"""Files of settings that are damaged, meant ill or mistaken: each is given with --config."""

from bad_inputs.world import Case

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, tuple[str | bytes, str]] = {
    # --- what is no YAML, or does harm
    "a list": ("- a\n- b", "must hold 'name: value' lines"),
    "a word": ("quickstart", "must hold 'name: value' lines"),
    "a number": ("3", "must hold 'name: value' lines"),
    "brackets without an end": ("a: [1, 2", "not valid YAML"),
    "quotes without an end": ('name: "a', "not valid YAML"),
    "a tab for a space": ("rollout:\n\tsteps: 3", "not valid YAML"),
    "an alias of nothing": ("name: *x", "not valid YAML"),
    "two documents": ("name: a\n---\nname: b", "not valid YAML"),
    "a key twice": ("seed: 1\nseed: 2", "seed is given twice"),
    "a key twice in a group": ("rollout: {steps: 3, steps: 4}", "steps is given twice"),
    "a list for a key": ("[a, b]: 3", "not valid YAML"),
    "a mapping for a key": ("{a: b}: 3", "not valid YAML"),
    "a number for a key": ("3: 4", "there is no setting 3"),
    "nothing for a key": ("null: 4", "there is no setting None"),
    "UTF-16": ("name: a".encode("utf-16"), "not UTF-8"),
    "Latin-1": ("name: café".encode("latin-1"), "not UTF-8"),
    "bytes": (bytes(range(256)), "not UTF-8"),
    "a NUL": ("name: a\0b", "not valid YAML"),
    "a NUL in an escape": ('rollout: {negative_prompt: "a\\0b"}', "(NUL)"),
    "half a character": ('name: "\\ud800"', "half a character"),
    "an escape sequence in a key": ('"\\e[31mred": 1', "there is no setting \\x1b[31mred"),
    "lists in lists": ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "mappings in mappings": ("a: " + "{b: " * 2000 + "1" + "}" * 2000, "nested too deeply"),
    "a hundred levels": ("reward: " + "[" * 100 + "]" * 100, "nested"),
    "an alias bomb": (BOMB, "more than 2,000,000 values"),
    "an alias of itself": ("a: &a [*a]", "nested more than"),
    "code": ("name: !!python/object/apply:os.system [true]", "not valid YAML"),
    "bytes in a text": ("name: !!binary aGk=", "it holds bytes"),
    "a set": ("reward: !!set {a, b}", "it holds set"),
    "a date with a tag": ("name: !!timestamp 2026-01-01", "it holds date"),
    "an empty number": ('seed: !!int ""', "not valid YAML"),
    "a number of 5000 digits": ("seed: " + "9" * 5000, "not valid YAML"),
    "a number of 400 digits": ("training: {lr: " + "9" * 400 + "}", "a whole number of 400 digits"),
    "a file of 2 MB": ("# " + "x" * 2**21, "too large"),
    # --- what is no setting, or has another kind
    "a group that is a number": ("rollout: 3", "rollout must hold 'name: value' lines"),
    "a group that is empty": ("rollout:", "rollout must hold 'name: value' lines"),
    "a group that is a list": ("model: [a]", "model must hold 'name: value' lines"),
    "a group that is a setting": ("seed: {a: 1}", "seed must be a whole number"),
    "a date for a number": ("seed: 2026-01-01", "seed must be a whole number"),
    "a truth for a number": ("seed: true", "seed must be a whole number"),
    "a point in a count": ("iterations: 3.5", "iterations must be a whole number"),
    "a text for a count": ("iterations: '3'", "iterations must be a whole number"),
    "a text for a number": ("training: {lr: fast}", "training.lr must be a number"),
    "a number beyond floats": ("training: {lr: 1e400}", "training.lr is inf"),
    "a number for a truth": ("memory: {offload: 1}", "memory.offload must be true or false"),
    "a number for a text": ("name: 3", "name must be text"),
    "a list for a text": ("output: [a]", "output must be text"),
    "nothing for a text": ("output:", "output must be text"),
    "a list for a choice": ("combine: [sum]", "combine must be one of"),
    "a word for a list": ("lora: {targets: to_q}", "lora.targets must be a list"),
    "numbers in a list of texts": ("lora: {targets: [1]}", "lora.targets must be text"),
    "three betas": ("training: {betas: [0.9, 0.9, 0.9]}", "training.betas must hold 2 values"),
    "a beta that is a word": ("training: {betas: [0.9, high]}", "training.betas must be a number"),
    "resume in a file": ("resum: true", "did you mean resume?"),
    "a reward that is a number": ("reward: 3", "reward must be NAME=WEIGHT"),
    "a reward without a name": ("reward: [{weight: 1}]", "must give each reward a name"),
    "a reward named by a number": ("reward: [{name: 3}]", "reward must be text"),
    "a reward with another field": ("reward: [{name: shapes, wait: 1}]", "a reward has no wait"),
    "a reward with a word for a weight": ("reward: {shapes: much}", "the weight of shapes must be a number"),
    "a weight that is no number": ("reward: {shapes: .nan}", "shapes"),
    "options that are a list": ("reward: [{name: shapes, options: [1]}]", "the options of shapes must be"),
    "an option that is a number": ("reward: [{name: shapes, options: {1: 2}}]", "shapes"),
    "an option that is the device": ("reward: [{name: shapes, options: {device: cpu}}]", "device"),
    "a condition that is a list": ("reward: [{name: shapes, only_if: [1]}]", "the condition of shapes must be text"),
}


def _given(content: str | bytes) -> Case:
    return lambda world: ["--config", world.file("mine.yaml", content)]


def _folder(world: object) -> list[str]:
    (world.folder / "folder.yaml").mkdir()
    return ["--config", str(world.folder / "folder.yaml")]


ROWS: dict[str, tuple[Case, str]] = {
    **{f"settings file: {what}": (_given(content), message) for what, (content, message) in FILES.items()},
    "settings file: a folder": (_folder, "it is a folder"),
    "settings file: a path with a NUL": (lambda world: ["--config", "a\0.yaml"], "(NUL)"),
    "settings file: a path that is too long": (lambda world: ["--config", "x" * 5000], "cannot be read"),
}
