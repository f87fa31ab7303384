"""Run names that cannot be a folder's on every system."""

from bad_inputs.world import Case

WRONG = {
    **{
        f"the device {name}": name
        for name in ("CON", "nul", "aux.txt", "Prn.tar.gz", "COM1", "lpt9", "CONOUT$", "com0.x")
    },
    **{f"with {mark!r}": f"a{mark}b" for mark in '/\\:*?"<>|\n\t\r\x1b\u202e'},
    **{f"the name {name!r}": name for name in (".", "..", "...", "a.", "a ", " a", ".hidden", "~/a\u2028")},
}


def _named(name: str) -> Case:
    return lambda world: ["--name", name]


ROWS = {
    **{f"run name: {what}": (_named(name), "cannot be a folder name") for what, name in WRONG.items()},
    "run name: 250 letters": (_named("x" * 250), "is too long: at most 200 bytes"),
    "run name: 70 letters of three bytes": (_named("語" * 70), "is too long"),
    "run name: half a character": (_named("a\ud800"), "half a character"),
    "run name: a NUL": (_named("a\0b"), "(NUL)"),
}
