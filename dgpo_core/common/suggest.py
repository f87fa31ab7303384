"""How an error names what may have been meant."""

import difflib
from collections.abc import Collection


def suggest(name: str, known: Collection[str], mark: str = "") -> str:
    """How a sentence about an unknown `name` ends: with the nearest known name, or with all where none is near.

    `mark` is put before a name, such as the dashes of an option.
    """
    same_leaf = [candidate for candidate in known if candidate.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_leaf or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f", did you mean {' or '.join(mark + candidate for candidate in near)}?"
    return f"; known: {', '.join(sorted(known))}." if len(known) <= 15 else "."
