"""The hint tells where the time goes and what would help, and is silent where nothing would."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.remarks import Remarks
from fabricrl.utils import hint as module
from fabricrl.utils import process
from fabricrl.utils.hint import hint
from tests.conftest import BareRun


def told(algo: str = "ppo", device: str = "cpu", ranks: int = 1, native: bool = False, **changes: Any) -> str | None:
    settings = {"compile": False, "hidden_sizes": (64, 64), "vectorization": "auto", "num_envs": 4}
    seconds = {name: changes.pop(name, default) for name, default in {"env": 10, "act": 5, "train": 40}.items()}
    threads = changes.pop("threads", 1)
    return hint(SimpleNamespace(**settings | changes), algo, device, ranks, threads, seconds, 1000, native)


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 20.0)  # seconds
    monkeypatch.setattr(module, "available_cores", lambda: 2)
    monkeypatch.setattr(module, "idle_cores", lambda: 1.0)
    monkeypatch.setattr(module, "has_compiler", lambda: True)


WIDE = {"hidden_sizes": (256, 256), "train": 200}


def test_an_update_that_takes_most_of_the_time_is_better_compiled() -> None:
    assert told() == "train 0.73 of the time: --compile would save about two thirds of that"
    for algo in ("sac", "droq"):
        text = "train 0.93 of the time: --compile would save about a quarter of that"
        assert told(algo, **WIDE, threads=2) == text


def test_wide_networks_are_better_trained_by_two_threads_while_a_core_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "train 0.93 of the time: --num-threads 2 would save about a third of that"
    for algo in ("sac", "droq"):
        assert told(algo, **WIDE) == text
        assert "--num-threads" not in str(told(algo, train=200)), "narrow ones are slower"
        assert "--num-threads" not in str(told(algo, **WIDE, ranks=2))
        assert "--num-threads" not in str(told(algo, **WIDE, device="cuda"))
    assert "--num-threads" not in str(told("ppo", **WIDE))
    monkeypatch.setattr(module, "idle_cores", lambda: 0.2)
    assert "--num-threads" not in str(told("droq", **WIDE))


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": True},
        {"device": "cuda"},
        {"hidden_sizes": (512, 512)},
        {"algo": "ppo_recurrent"},
        {"algo": "sac", "hidden_sizes": (512, 512), "threads": 2},
        {"train": 3},
        {"env": 1, "act": 1, "train": 4},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_compiling_is_not_advised_where_it_would_not_help(changes: dict[str, Any]) -> None:
    assert "--compile" not in (told(**changes) or "")


def test_without_a_compiler_nothing_is_said_of_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_compiler", lambda: False)
    assert "--compile" not in (told() or "")


def test_slow_environments_that_were_asked_to_be_stepped_one_by_one_are_better_in_processes() -> None:
    slow = {"env": 40, "train": 5, "compile": True}
    assert (
        told(vectorization="sync", **slow) == "env 0.80 of the time: --vectorization async would save about 50% of that"
    )
    assert told(vectorization="auto", **slow) is None  # it has been tried
    assert told(vectorization="sync", **slow | {"env": 0.04, "train": 40}) is None  # a round trip takes longer


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_environments_with_a_native_form_are_better_stepped_by_it(kind: str, device: str) -> None:
    slow = {"env": 40, "train": 20, "device": device, "vectorization": kind}
    text = "env 0.62 of the time: --vectorization native would save a good part of that"
    assert told(native=True, **slow) == text
    assert "native" not in str(told(**slow))
    assert "native" not in str(told(native=True, **slow | {"vectorization": "auto"}))
    assert "native" not in str(told(native=True, **slow | {"env": 2}))


def test_playing_and_training_at_once_is_advised_where_both_take_their_time_and_a_core_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = {"env": 20, "train": 20, "compile": True}
    shares = "env and act 0.56, train 0.44 of the time"
    assert told(**both) == f"{shares}: fabricrl ppo-decoupled --devices 2 plays and trains at the same time"
    assert "fabricrl droq-decoupled" in str(told("droq", **both))
    assert told(**both, max_lag=1) is None
    assert told(**both, ranks=2) is None
    assert told(**both, threads=2) is None
    assert told(**both, device="cuda") is None, "with one GPU the twin has none to train on"
    assert told(**both, vectorization="torch") is None, "twins take arrays"
    monkeypatch.setattr(module, "idle_cores", lambda: 0.2)
    assert told(**both) is None


# --- When it is said


def said(capsys: pytest.CaptureFixture, *steps: int, rank: int = 0, seconds_per_step: float = 0.1) -> list[str]:
    """Lines that a run of 1 000 iterations of one step prints at the logs of these steps."""
    run = BareRun(PPOArgs(num_envs=1, total_timesteps=1000, hidden_sizes=(64, 64)))
    run.algo, run.mask_size, run._iteration_steps, run._remarks = "ppo", 0, 1, Remarks()
    run.episodes.count = 1
    run.team = SimpleNamespace(global_rank=rank)
    lines = []
    for step in steps:
        run.global_step, run._is_last = step, None
        run.clock = SimpleNamespace(totals={"train": step * seconds_per_step})  # type: ignore[assignment]
        run._remarks.make(run)
        lines.append(capsys.readouterr().err)
    return lines


HINT = "hint: train 1.00 of the time: --compile would save about two thirds of that\n"


def test_it_is_said_once_at_the_first_log_after_twenty_seconds(capsys: pytest.CaptureFixture) -> None:
    assert said(capsys, 100, 190, 210, 220, 1000) == ["", "", HINT, "", ""]
    assert said(capsys, 210, rank=1) == [""]


def test_it_is_said_at_the_end_where_too_little_was_left_before(capsys: pytest.CaptureFixture) -> None:
    assert said(capsys, 300, 990, 1000, seconds_per_step=0.07) == ["", "", HINT]
    assert said(capsys, 300, 990, 1000, seconds_per_step=0.01) == ["", "", ""], "ten seconds are soon over"


def test_idle_cores_are_what_the_last_minute_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "available_cores", lambda: 4.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 9.0, 9.0))
    assert process.idle_cores() == 2.5

    def unknown() -> tuple[float, float, float]:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert process.idle_cores() == 4.0
