"""Numbers beyond sense, in every setting: the sentence names the setting and its range."""

import typing

from bad_inputs.world import GOOD, Case, World

from dgpo_core.settings.schema import setting_types

Row = tuple[Case, str]


def _kind(hint: object) -> object:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _with(*argv: str) -> Case:
    return lambda world: list(argv)


def _measured(world: World) -> list[str]:
    """What makes a run score by what it watches."""
    return ["--data.held_out", world.file("held_out.jsonl", GOOD)]


ABSURD: dict[str, Row] = {
    f"{name} of 10^18": (_with(f"--{name}", str(10**18)), f"{name} is 1000000000000000000 but must be")
    for name, hint in setting_types().items()
    if _kind(hint) is int and not name.endswith("seed")
}
NO_NUMBER: dict[str, Row] = {
    f"{name} of {value}": (_with(f"--{name}", value), f"{name} is {value} but must be")
    for name, hint in setting_types().items()
    if _kind(hint) is float
    for value in ("nan", "inf")
}
ROWS: dict[str, Row] = {
    **ABSURD,
    **NO_NUMBER,
    "a seed of 400 digits": (_with("--seed", "9" * 400), "seed is a number of 400 digits but must be"),
    "an order of 400 digits": (_with("--data.order_seed", "9" * 400), "data.order_seed is a number of 400 digits"),
    "a count of 5000 digits": (_with("--iterations", "9" * 5000), "iterations"),
    "a count with a point": (_with("--iterations", "3.5"), "3.5"),
    "a count in words": (_with("--rollout.steps", "ten"), "ten"),
    "a list of numbers that is too short": (_with("--training.betas", "0.9"), "betas"),
    "a decay of 1": (_with("--training.betas", "0.9", "1.0"), "training.betas is 1"),
    "a rank of 100000": (_with("--lora.rank", "100000"), "lora.rank is 100000 but must be at least 1 and at most 4096"),
    "an image of 100000 pixels": (_with("--model.width", "100000"), "model.width is 100000 but must be at least 0 and"),
    "an unknown number type": (_with("--model.dtype", "float8"), "float8"),
    "an unknown alarm": (_with("--evaluation.on_alarm", "panic"), "panic"),
    "a port that is none": (_with("--human.port", "70000"), "human.port is 70000"),
    "rewards with a word for a weight": (_with("--reward", "shapes=much"), "much"),
    "rewards with infinite weight": (_with("--reward", "shapes=inf"), "shapes"),
    "a reward twice": (_with("--reward", "shapes=1,shapes=2"), "shapes"),
    "a condition on a reward that is not there": (_with("--reward", "shapes=1?ocr>0.5"), "ocr"),
    "a condition that is none": (_with("--reward", "shapes=1?shapes_graded"), "shapes"),
    "a condition without a number": (_with("--reward", "shapes=1?shapes_graded>x,shapes_graded=0"), "shapes_graded"),
    "a reward that is trained and watched": (_with("--watch", "shapes_graded"), "cannot be watched as well"),
    "a watched reward with a weight": (_with("--watch", "entropy=2"), "only watched"),
    "a watched reward that is unknown": (lambda w: ["--watch", "entropie", *_measured(w)], "entropy"),
    "a watched reward with options that it has not": (
        lambda w: [*_measured(w), "--config", w.file("a.yaml", "watch: [{name: entropy, options: {colour: red}}]")],
        "colour",
    ),
    "a person who measures": (_with("--evaluation.reward", "human"), "can score images by itself"),
    "ratings without a folder": (_with("--reward", "ratings"), "--groups FOLDER"),
    "a Python file that is not there": (_with("--reward", "nowhere.py:Mine"), "no file nowhere.py"),
    "half a character": (_with("--rollout.negative_prompt", "\udc80"), "half a character"),
    "half a character in a path": (_with("--data.prompts", "caf\udce9.txt"), "half a character"),
    "a NUL in a text": (_with("--rollout.negative_prompt", "a\0b"), "(NUL)"),
    "a NUL in a path": (_with("--output", "a\0b"), "(NUL)"),
    "a NUL in an option": (_with("--se\0ed", "1"), "(NUL)"),
    "an escape sequence as an option": (_with("--\x1b[31mred", "1"), "There is no option"),
    "an option of 10000 letters": (_with("--" + "x" * 10_000), "There is no option"),
}
