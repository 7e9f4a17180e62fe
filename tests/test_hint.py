"""The hint tells where the time goes and what would help, and is silent where nothing would."""

from types import SimpleNamespace
from typing import Any

import pytest

from fabricrl.utils import hint as module
from fabricrl.utils.hint import hint


def told(algo: str = "ppo", device: str = "cpu", ranks: int = 1, **changes: Any) -> str | None:
    settings = {"compile": False, "hidden_sizes": (64, 64), "vectorization": "auto", "num_envs": 4, "num_threads": 1}
    seconds = {name: changes.pop(name, default) for name, default in {"env": 10, "act": 5, "train": 40}.items()}
    return hint(SimpleNamespace(**settings | changes), algo, device, ranks, seconds, steps=1000)


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 20.0)  # seconds
    monkeypatch.setattr(module, "available_cores", lambda: 2)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_an_update_that_takes_most_of_the_time_is_better_compiled() -> None:
    assert told() == "train 0.73 of the time: --compile would save about two thirds of that"
    assert (
        told("sac", hidden_sizes=(256, 256), train=200)
        == "train 0.93 of the time: --compile would save about a quarter of that"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": True},
        {"device": "cuda"},
        {"hidden_sizes": (512, 512)},
        {"train": 3},
        {"env": 1, "act": 1, "train": 4},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_compiling_is_not_advised_where_it_would_not_help(changes: dict[str, Any]) -> None:
    assert "--compile" not in (told(**changes) or "")


def test_without_a_compiler_nothing_is_said_of_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert "--compile" not in (told() or "")


def test_slow_environments_that_were_asked_to_be_stepped_one_by_one_are_better_in_processes() -> None:
    slow = {"env": 40, "train": 5, "compile": True}
    assert (
        told(vectorization="sync", **slow) == "env 0.80 of the time: --vectorization async would save about 50% of that"
    )
    assert told(vectorization="auto", **slow) is None  # it has been tried
    assert told(vectorization="sync", **slow | {"env": 0.04, "train": 40}) is None  # a round trip takes longer


def test_playing_and_training_at_once_is_advised_where_both_take_their_time_and_a_core_is_free() -> None:
    both = {"env": 20, "train": 20, "compile": True}
    shares = "env and act 0.56, train 0.44 of the time"
    assert told(**both) == f"{shares}: fabricrl ppo-decoupled --devices 2 plays and trains at the same time"
    assert "fabricrl droq-decoupled" in str(told("droq", **both))
    assert told(**both, max_lag=1) is None
    assert told(**both, ranks=2) is None
    assert told(**both, num_threads=2) is None
