"""Around the code of a reward, which may be anybody's: whatever it raises becomes one sentence with its name.

Also `sys.exit`, which would end the run as if all were done, in the middle of an import or in the thread that scores.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.rewards.base import Reward


@contextmanager
def guarded(start: str) -> Iterator[None]:
    """Raises UserError, "`start` REASON.", for any error inside but UserError itself and the user's Ctrl-C."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{start} {described(error)}.") from error


def described(error: BaseException) -> str:
    """Class and first line of an error, also of one whose text cannot be had."""
    try:
        text = str(error).strip().split("\n")[0].rstrip(".")
    except Exception:
        text = ""
    return f"{type(error).__name__}: {shown(text, 300) or 'no message'}"


def check_prompts(rewards: Mapping[str, Reward], prompts: Sequence[Prompt]) -> None:
    """Raises UserError for a prompt that a reward cannot judge: to be called before anything is drawn."""
    for name, reward in rewards.items():
        bare = next((prompt for prompt in prompts if not prompt.sources), None) if reward.needs_source else None
        if bare:
            start = f"{shown(bare.where, 1000)}: the" if bare.where else "The"
            raise UserError(
                f"{start} reward {name!r} compares with a source picture, and the prompt {shown(bare.text, 60)!r}"
                ' brings none: add "image" to it in a .jsonl file, or take another reward.'
            )
        with guarded(f"Reward {name!r} failed in check() with"):
            reward.check(prompts)


def overlap(name: str, reward: Reward, device: torch.device, group_size: int) -> bool:
    """What `reward.overlaps` says of these."""
    with guarded(f"Reward {name!r} failed in overlaps() with"):
        return bool(reward.overlaps(device, group_size))


def idle(rewards: Mapping[str, Reward]) -> None:
    """All of them give the accelerator's memory back."""
    for name, reward in rewards.items():
        with guarded(f"Reward {name!r} failed in idle() with"):
            reward.idle()


def close(rewards: Mapping[str, Reward]) -> None:
    """All of them let go of everything, each whether or not others can; then the first error is raised."""
    problems = []
    for name, reward in rewards.items():
        try:
            with guarded(f"Reward {name!r} failed in close() with"):
                reward.close()
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[0]
