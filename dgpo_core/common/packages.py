"""Packages that only some trainings need: whether they are there, and what is said where they are not."""

import importlib.util

from dgpo_core.common.errors import UserError


def is_installed(module: str) -> bool:
    """Whether `import module` would find something."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module that somebody has blocked
        return False


def missing(what: str, package: str, install: str = "", instead: str = "") -> UserError:
    """The error of `what` for want of a package.

    what: begins the sentence. install: for pip, where it is more than the package. instead: what else to do.
    """
    other = f", or {instead}" if instead else ""
    return UserError(
        f"{what} needs the package {package}, which is not installed: run `pip install {install or package}`{other}."
    )
