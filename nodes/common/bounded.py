"""What is dear to load and may be loaded again. Nothing here knows ComfyUI."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Bounded(Generic[Item]):
    """At most `most` items by key. The one not taken for longest goes, and `let_go` is called with it."""

    def __init__(self, most: int, let_go: Callable[[Item], object] = lambda item: None) -> None:
        self.most, self._let_go = most, let_go
        self._items: OrderedDict[str, Item] = OrderedDict()

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items.values())

    def get(self, key: str) -> Item | None:
        """What is there under the key; it does not count as taken."""
        return self._items.get(key)

    def take(self, key: str, make: Callable[[], Item]) -> Item:
        """What is there under the key, else what `make` makes, called once there is room for it."""
        if key not in self._items:
            while len(self._items) >= self.most:
                self._let_go(self._items.popitem(last=False)[1])
            self._items[key] = make()
        self._items.move_to_end(key)
        return self._items[key]

    def drop(self, key: str) -> None:
        """The item, which is there, goes."""
        self._let_go(self._items.pop(key))
