"""The benchmark of ranks: its model, and what it counts."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def scale() -> Any:
    spec = importlib.util.spec_from_file_location("scale", Path(__file__).parent.parent / "benchmarks/scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


def test_the_model_finds_again_the_costs_that_it_is_made_of(scale: Any) -> None:
    """An update costs 2 s and 6 s shared among ranks; a collective 0.5 s."""
    calls = {1: 0.0, 2: 3.0, 4: 4.0, 8: 5.0}
    costs = {
        ranks: {"compute": 2 + 6 / ranks, "calls": count, "cpu": 2 + 6 / ranks + 0.5 * count}
        for ranks, count in calls.items()
    }
    assert math.isnan(scale.predicted(2, costs)), "two numbers of ranks below are needed"
    for ranks in (4, 8):
        assert scale.predicted(ranks, costs) == pytest.approx(costs[ranks]["cpu"])


def test_messages_are_counted_once_also_where_one_is_made_of_others(scale: Any) -> None:
    meter = scale.Meter()
    inner = meter.counted(lambda size: size, lambda size: (1, size))
    outer = meter.counted(lambda size: inner(size) + inner(size), lambda size: (2, 3 * size))
    assert (inner(5), outer(7)) == (5, 14)
    assert [meter.totals[name] for name in ("calls", "messages", "bytes")] == [2, 1 + 2, 5 + 21]
    assert 0 < meter.totals["inside"] <= meter.totals["wait"]


def test_an_iteration_costs_what_is_counted_after_those_that_do_not_count(scale: Any) -> None:
    meter = scale.Meter()
    send = meter.counted(lambda: None, lambda: (1, 10.0))
    for step in meter.each(lambda: iter(range(6)))():
        for _ in range(9 if step < 2 else 2):
            send()
    cost = meter.of_an_iteration(2)
    assert (cost["messages"], cost["bytes"]) == (2, 20)


def test_a_rate_is_read_as_tc_has_it(scale: Any) -> None:
    assert (scale.bits("10gbit"), scale.bits("20mbit")) == (1e10, 2e7)


def test_a_machine_that_does_not_allow_nodes_says_so(scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that has been made by then is removed."""
    called: list[tuple[str, ...]] = []

    def refuse(*words: str) -> None:
        called.append(words)
        if "tc" in words:
            raise OSError("no such queue")

    removed: list[list[str]] = []
    monkeypatch.setattr(scale, "call", refuse)
    monkeypatch.setattr(scale.subprocess, "run", lambda words, **_: removed.append(words))
    with pytest.raises(OSError, match="no such queue"), scale.two_nodes("1gbit", 1.0):
        pass
    assert [words[3] for words in removed] == scale.NODES
    assert "netem" in called[-1]
