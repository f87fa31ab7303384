"""What people said of groups of pictures, as a taste learns it."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from PIL import Image

from dgpo_core.common.errors import UserError
from dgpo_core.common.pixels import Unreadable, picture_bytes, read_pixels
from dgpo_core.common.reading import kind_at, shown
from dgpo_core.people.gallery import Gallery, RatedGroup, read_gallery, read_preference_gallery
from dgpo_core.people.preferences import Told, better_of
from dgpo_core.rewards.taste.features import Features
from dgpo_core.rewards.taste.model import CHANCE, Judged


def read_answers(sources: Sequence[str | Path]) -> Gallery:
    """The groups of preference files (.jsonl) and of folders of rated pictures, one after the other.

    What is given twice (a file and its folder, a copy) counts once, and is told: two of one group would agree with each
    other whatever was answered. Raises UserError where one of them is not there, or has nothing to learn from.
    """
    found = []
    for source in map(Path, sources):
        kind = kind_at(source, "The file")
        if not kind:
            raise UserError(f"There is no {shown(source, 1000)}: give preference files or folders of rated pictures.")
        found.append(read_gallery(source) if kind == "folder" else read_preference_gallery(source))
    if not found:
        raise UserError("Give the preference files, or the folders of rated pictures, that the taste is made of.")
    notes = [note for gallery in found for note in gallery.notes]
    groups: dict[Hashable, RatedGroup] = {}
    for group in (group for gallery in found for group in gallery.groups):
        groups.setdefault(_said(group), group)
    if again := sum(len(gallery.groups) for gallery in found) - len(groups):
        notes.append(f"Left out: {again} group{'s are' if again > 1 else ' is'} given twice.")
    return Gallery(tuple(groups.values()), tuple(notes))


def picture_key(picture: Image.Image) -> str:
    """The same for the same pixels, in whichever file; "" for a picture of one colour, which may be anyone's."""
    rgb = picture.convert("RGB")
    if rgb.getcolors(1):
        return ""
    return hashlib.blake2b(f"{rgb.size}".encode() + rgb.tobytes(), digest_size=16).hexdigest()


def judged(groups: Sequence[RatedGroup], seen: Features, check: Callable[[], None] = lambda: None) -> list[Judged]:
    """The groups with the features of their pictures. check: called before each group; raises to stop.

    Raises UserError naming a picture that cannot be read.
    """
    found = []
    for group in groups:
        check()
        pictures = [_read(path) for path in group.files]
        x = seen.of(pictures, [group.prompt] * len(pictures))
        found.append(Judged(x, _pairs(group), tuple(map(picture_key, pictures))))
    return found


def _pairs(group: RatedGroup) -> tuple[Told, ...]:
    return group.told or tuple(better_of(group.scores))


def _said(group: RatedGroup) -> Hashable:
    """Equal for groups of the same files of which the same was said, wherever they are and in whichever order."""
    files = [_digest(path) for path in group.files]
    pairs = ((files[i], files[j], p) for i, j, p in _pairs(group))
    return group.prompt, frozenset((*sorted(pair[:2]), CHANCE) if pair[2] == CHANCE else pair for pair in pairs)


def _digest(path: Path) -> str:
    try:
        return hashlib.blake2b(picture_bytes(path), digest_size=16).hexdigest()
    except Unreadable as error:
        raise _unreadable(path, error) from None


def _read(path: Path) -> Image.Image:
    """The picture the right way up."""
    try:
        return read_pixels(path)
    except Unreadable as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Unreadable) -> UserError:
    return UserError(f"The picture {shown(path, 1000)} cannot be read ({error}): remove its group.")
