"""Finish now: which training it ends, and what no longer stands for a whole one; no ComfyUI."""

from node_files import node_file

finishing = node_file("runs.finishing")


def test_a_node_that_trains_is_asked_once_and_another_never() -> None:
    held = finishing.Finishing()
    with held.training("3") as asked:
        assert not held.ask("4")
        assert held.ask("3")
        assert held.ask("3")
        assert asked.is_set()
    assert not held.ask("3")
    assert (held.times("3"), held.times("4"), held.times(None)) == (1, 0, 1)


def test_a_node_in_a_subgraph_is_found_by_its_id_there() -> None:
    held = finishing.Finishing()
    with held.training("12:3") as asked:
        assert not held.ask("2:3")
        assert held.ask("3")
        assert asked.is_set()
    assert (held.times("12:3"), held.times("3")) == (1, 0)


def test_of_two_with_the_same_id_the_one_on_the_canvas_is_meant_and_of_two_subgraphs_none() -> None:
    held = finishing.Finishing()
    with held.training("12:3") as inner, held.training("3") as outer:
        assert held.ask("3")
        assert outer.is_set()
        assert not inner.is_set()
    with held.training("12:3"), held.training("13:3"):
        assert not held.ask("3")


def test_one_that_gives_up_is_not_taken_for_done() -> None:
    held = finishing.Finishing()
    held.given_up("3")
    assert held.times("3") == 1
