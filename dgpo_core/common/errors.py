"""How a run ends before its end: by what the user can fix, or because the user asked; and what a picture can lack."""


class UserError(Exception):
    """One clear sentence: what was wrong, with what, and what to do.

    Command-line programs print it and exit with code 2; ComfyUI nodes show it on the node. Nothing has been written
    when it is raised during validation.
    """

    def __init__(self, sentence: str = "") -> None:
        """sentence: half characters in it become escapes, as in `reading.shown`. No log can write them, and ComfyUI's
        queue stands still where its log cannot write an error."""
        super().__init__(sentence.encode(errors="backslashreplace").decode())


class Exhausted(UserError):
    """There is no more of something, whichever sample asks: leaving one out does not help."""


class Diverged(UserError):
    """The weights draw no pictures any more: whoever went on from them would fail at once, again and again."""


class Elsewhere(UserError):
    """What another process of the run has told, or is about to tell: this one ends without a word."""


class Interrupted(BaseException):
    """The user asked to stop. Not an Exception, so that nothing on the way swallows it."""


def out_of_memory(error: BaseException) -> UserError | None:
    """The sentence for an error that means "out of memory", which every part of a run can meet; None for another one.

    torch raises one class for accelerators (a RuntimeError) and a plain RuntimeError for the machine's own memory.
    """
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        where, what = "accelerator's", "lower rollout.batch, training.micro_batch and evaluation.batch"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text):
        where, what = "machine's", "lower rollout.batch, rollout.group_size and data.groups_per_iteration"
    else:
        return None
    return UserError(f"The {where} memory is too small: {what}, or choose a smaller image size.")


class NoPrompt(Exception):
    """A picture does not say what it was drawn for; the text ends a sentence that starts with the file's name."""


class SeveralPrompts(NoPrompt):
    """A picture says that it was drawn for several texts."""
