"""The benchmark of ranks: its model, and what it counts."""

import contextlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TASKS = {"here": 0.5, "there": 1.0}  # and what a collective costs


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
    """An update costs 2 s and 6 s shared among ranks; a collective 0.5 s here and 1 s there, and 0.1 s a message."""

    def cost(ranks: int, calls: float, each: float) -> dict[str, float]:
        compute, messages = 2 + 6 / ranks, calls * (ranks - 1)
        return {
            "compute": compute,
            "calls": calls,
            "messages": messages,
            "cpu": compute + each * calls + 0.1 * messages,
        }

    calls = {1: 0.0, 2: 3.0, 4: 4.0, 8: 5.0}
    coupled = {
        task: {ranks: cost(ranks, count, each) for ranks, count in calls.items()} for task, each in TASKS.items()
    }
    assert math.isnan(scale.predicted("here", 2, coupled)), "two numbers of ranks below are needed"
    for task in TASKS:
        for ranks in (4, 8):
            told = {name: costs if name != task else dict(costs) for name, costs in coupled.items()}
            right = told[task][ranks]["cpu"]
            told[task] |= {count: cell | {"cpu": 99.0} for count, cell in told[task].items() if count >= ranks}
            assert scale.predicted(task, ranks, told) == pytest.approx(right)
    alone = {"here": {ranks: cell for ranks, cell in coupled["here"].items() if ranks < 8}}
    assert math.isnan(scale.predicted("here", 4, alone)), "one cell does not tell two costs"


def test_an_iteration_waits_for_the_rank_with_the_most_work_or_for_cores(scale: Any) -> None:
    assert scale.iteration({"player": 2.0, "trainer": 3.0}, 1, 2) == 3.0
    assert scale.iteration({"player": 2.0, "trainer": 3.0}, 4, 2) == 10.0
    assert scale.iteration({"coupled": 5.0}, 8, 8) == 5.0


@pytest.mark.parametrize("factor", [1.0, 1.3, 0.7])
def test_a_prediction_that_is_far_from_what_was_measured_is_marked(scale: Any, factor: float) -> None:
    """Four players take `factor` times what two lead to expect."""

    def cells(power: int, factor: float) -> dict[int, dict[str, float]]:
        found = {}
        for count in (1, 2, 4):
            compute, sent = 4 + 8 / count, float(count**power)
            cpu = (compute + 0.5 + 0.1 * sent) * (factor if count == 4 else 1)
            found[count] = {"compute": compute, "cpu": cpu, "calls": 1.0, "messages": sent, "wall": cpu}
        return found

    costs = {"here": {}, "here, player": cells(1, factor), "here, trainer": cells(2, 1.0)}
    (*_, players, trainers), clock = scale.check_model(costs, 99)
    assert players.startswith("| here, player | 4 | ")
    assert (scale.MISSED in players) == (factor != 1)
    if factor == 1:
        assert scale.MISSED not in trainers + "".join(clock)
    assert [line.startswith("| here | decoupled") for line in clock] == [False, False, True, True, True]


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


def test_the_share_of_a_link_that_messages_get_is_fitted_to_one_cell_and_held_against_the_others(
    scale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second of work, and messages that get half of a link: 100 Mbit take a second for 6.25 MB."""

    refused: list[str] = []

    @contextlib.contextmanager
    def two_nodes(rate: str, delay: float) -> Iterator[list[str]]:
        if delay or rate in refused:
            raise OSError("no such queue")
        yield ["a", "b"]

    def measured(repeats: int, task: str, ranks: int, link: str, places: list[str]) -> list[dict[str, float]]:
        size, rate = {"small": 6.25e6, "large": 25e6}[task], scale.bits(link.split(", ")[1])
        seconds = 0.0 if rate == 1e10 else 2 * size * 8 / rate
        return [{"wall": 1 + seconds, "bytes": size, "messages": 4.0}]

    monkeypatch.setattr(scale, "two_nodes", two_nodes)
    lines = scale.between_nodes(SimpleNamespace(measured=measured, has=lambda *_: False), ["small", "large"], 1)
    cells = {tuple(line.split(" | ")[:2]): line.strip("| ").split(" | ")[-1] for line in lines if "0 |" in line}
    assert cells["| small", "100mbit"] == "1.00 (fitted)"
    assert cells["| large", "100mbit"] == cells["| large", "1gbit"] == cells["| small", "1gbit"] == "1.00"
    assert lines[-1] == "Of a link messages get 50%."
    for rates in (["10gbit"], ["1gbit", "100mbit"], ["10gbit", "1gbit", "100mbit"]):
        refused[:] = rates
        (line,) = scale.between_nodes(SimpleNamespace(measured=measured, has=lambda *_: False), ["small", "large"], 1)
        assert line.startswith("None: ")
