"""The arguments of decoupled scripts are those of the coupled ones, and a few of their own."""

import dataclasses
import importlib

import pytest

from fabricrl.algos import run as run_module
from fabricrl.algos.droq.args import DroQArgs, DroQDecoupledArgs
from fabricrl.algos.ppo.args import PPOArgs, PPODecoupledArgs
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs, RecurrentPPODecoupledArgs
from fabricrl.algos.sac.args import SACArgs, SACDecoupledArgs
from fabricrl.utils.errors import ConfigError
from tests import test_decoupled_run, test_players
from tests.process import call
from tests.test_decoupled_run import MODULE

TWINS = {
    "ppo": (PPOArgs, PPODecoupledArgs),
    "ppo_recurrent": (RecurrentPPOArgs, RecurrentPPODecoupledArgs),
    "sac": (SACArgs, SACDecoupledArgs),
    "droq": (DroQArgs, DroQDecoupledArgs),
}
# Where tests show what it does; the others reach the same functions as in the coupled script, whose runs are equal
OWN = {"max_lag": test_decoupled_run, "players": test_players, "weights_precision": test_players}


def defaults(kind: type) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("algo", TWINS)
def test_every_argument_has_a_test_that_shows_what_it_does(algo: str) -> None:
    coupled, decoupled = (defaults(kind) for kind in TWINS[algo])
    assert decoupled.keys() - coupled.keys() == OWN.keys()
    assert coupled.keys() <= decoupled.keys()
    for name, module in OWN.items():
        flag = f"--{name.replace('_', '-')}"
        with open(module.__file__ or "") as source:
            assert flag in source.read(), flag


@pytest.mark.parametrize("algo", TWINS)
def test_defaults_are_the_coupled_scripts(algo: str) -> None:
    coupled, decoupled = (defaults(kind) for kind in TWINS[algo])
    assert {name for name, default in coupled.items() if decoupled[name] != default} == set()


@pytest.mark.parametrize("algo", TWINS)
def test_every_argument_has_a_help_text(algo: str) -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(TWINS[algo][1]))


SHARED_BY_2 = "each of 2 trainers has an equal share of"


@pytest.mark.parametrize(
    ("algo", "flags", "words"),
    [
        ("ppo", [], "--devices is 1: a decoupled script needs at least 2 ranks"),
        ("sac", ["--devices", 2, "--players", 2, "--num-envs", 2], "--players is 2: it must be less than 2"),
        ("ppo", ["--devices", 3, "--num-envs", 1, "--num-steps", 9, "--num-minibatches", 3], SHARED_BY_2),
        ("ppo_recurrent", ["--devices", 3, "--num-envs", 1, "--num-steps", 9, "--num-minibatches", 3], SHARED_BY_2),
        ("sac", ["--devices", 3, "--num-envs", 3], "--num-envs is 3: it must be a multiple of 2"),
        ("droq", ["--devices", 2, "--num-nodes", 2, "--num-envs", 3, "--batch-size", 7], "--batch-size is 7"),
        ("droq", ["--devices", 3, "--num-envs", 6, "--buffer-size", 257], "--buffer-size is 257"),
    ],
)  # fmt: skip
def test_what_trainers_cannot_share_is_refused_before_any_rank_starts(
    algo: str, flags: list[object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before an environment is tried; a launcher's ranks, which run already, find it out together."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("it was not noticed before anything started")

    monkeypatch.setattr(run_module, "check_env", forbidden)
    monkeypatch.setattr(run_module, "launch", forbidden)
    with pytest.raises(ConfigError, match=words):
        call(importlib.import_module(MODULE[algo]).main, *flags)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(AssertionError, match="not noticed"):
        call(importlib.import_module(MODULE[algo]).main, *flags)


def test_a_time_out_that_no_clock_can_hold_is_refused() -> None:
    for minutes in (-1.0, 1e308, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"--timeout is .* at most 100000"):
            PPODecoupledArgs(timeout=minutes)
