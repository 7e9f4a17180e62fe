"""The arguments of decoupled scripts are those of the coupled ones, and a few of their own."""

import dataclasses

import pytest

from fabricrl.algos.droq.args import DroQArgs, DroQDecoupledArgs
from fabricrl.algos.ppo.args import PPOArgs, PPODecoupledArgs
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs, RecurrentPPODecoupledArgs
from fabricrl.algos.sac.args import SACArgs, SACDecoupledArgs
from fabricrl.utils.errors import ConfigError
from tests import test_decoupled_run, test_players

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


def test_a_time_out_that_no_clock_can_hold_is_refused() -> None:
    for minutes in (-1.0, 1e308, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"--timeout is .* at most 100000"):
            PPODecoupledArgs(timeout=minutes)
