"""What people said of groups of pictures, as a taste learns it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from dgpo_core.common.errors import UserError
from dgpo_core.common.pixels import Unreadable, read_pixels
from dgpo_core.common.reading import shown
from dgpo_core.people.gallery import Gallery, RatedGroup, read_gallery, read_preference_gallery
from dgpo_core.people.preferences import better_of
from dgpo_core.rewards.taste.features import Features
from dgpo_core.rewards.taste.model import Judged


def read_answers(sources: Sequence[str | Path]) -> Gallery:
    """The groups of preference files (.jsonl) and of folders of rated pictures, one after the other.

    Raises UserError where one of them is not there, or has nothing to learn from.
    """
    found = []
    for source in map(Path, sources):
        if not source.exists():
            raise UserError(f"There is no {shown(source, 1000)}: give preference files or folders of rated pictures.")
        found.append(read_gallery(source) if source.is_dir() else read_preference_gallery(source))
    if not found:
        raise UserError("Give the preference files, or the folders of rated pictures, that the taste is made of.")
    notes = tuple(note for gallery in found for note in gallery.notes)
    return Gallery(tuple(group for gallery in found for group in gallery.groups), notes)


def judged(groups: Sequence[RatedGroup], seen: Features, check: Callable[[], None] = lambda: None) -> list[Judged]:
    """The groups with the features of their pictures. check: called before each group; raises to stop.

    Raises UserError naming a picture that cannot be read.
    """
    found = []
    for group in groups:
        check()
        x = seen.of([_read(path) for path in group.files], [group.prompt] * len(group.files))
        found.append(Judged(x, group.told or tuple(better_of(group.scores))))
    return found


def _read(path: Path) -> Image.Image:
    """The picture the right way up."""
    try:
        return read_pixels(path)
    except Unreadable as error:
        raise UserError(f"The picture {shown(path, 1000)} cannot be read ({error}): remove its group.") from None
