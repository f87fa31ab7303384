"""What is dear to load stays, the least recently taken goes first, and there is room before the next is made."""

import pytest
from node_files import node_file

Bounded = node_file("common.bounded").Bounded


def test_what_is_there_is_not_made_again() -> None:
    made = []
    items = Bounded(2)
    for _ in range(3):
        assert items.take("a", lambda: made.append("a") or "A") == "A"
    assert made == ["a"]


def test_the_one_not_taken_for_longest_goes_before_the_next_is_made() -> None:
    gone: list[str] = []
    items = Bounded(2, gone.append)
    items.take("a", lambda: "A")
    items.take("b", lambda: "B")
    items.take("a", lambda: "again")
    assert items.take("c", lambda: f"C after {gone}") == "C after ['B']"
    assert list(items) == ["A", "C after ['B']"]


def test_looking_at_an_item_does_not_keep_it() -> None:
    items = Bounded(2)
    items.take("a", lambda: "A")
    items.take("b", lambda: "B")
    assert (items.get("a"), items.get("z")) == ("A", None)
    items.take("c", lambda: "C")
    assert items.get("a") is None


def test_what_cannot_be_made_leaves_room() -> None:
    gone: list[str] = []
    items = Bounded(1, gone.append)
    items.take("a", lambda: "A")
    with pytest.raises(ZeroDivisionError):
        items.take("b", lambda: 1 / 0)
    assert (gone, list(items)) == (["A"], [])


def test_a_dropped_item_is_let_go() -> None:
    gone: list[str] = []
    items = Bounded(2, gone.append)
    items.take("a", lambda: "A")
    items.drop("a")
    assert (gone, items.get("a")) == (["A"], None)
