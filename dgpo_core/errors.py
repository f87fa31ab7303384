"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """One clear sentence: what was wrong, with what, and what to do.

    Command-line programs print it and exit with code 2; ComfyUI nodes show it on the node. Nothing has been written
    when it is raised during validation.
    """
