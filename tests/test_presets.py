"""--preset tuned: settings for one environment, from each algorithm's presets.toml."""

import importlib
import re
import tomllib
from pathlib import Path
from unittest import mock

import gymnasium as gym
import pytest

from fabricrl.algos.command_line import parse
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.ppo.args import PRESETS, PPOArgs, PPODecoupledArgs
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.algos.sac.args import SACArgs
from fabricrl.utils.errors import ConfigError

KINDS = {"ppo": PPOArgs, "ppo_recurrent": RecurrentPPOArgs, "sac": SACArgs, "droq": DroQArgs}
TUNED = [
    (algo, family, settings)
    for algo in KINDS
    for family, settings in tomllib.loads(
        (Path(importlib.import_module(f"fabricrl.algos.{algo}").__file__ or "").parent / "presets.toml").read_text()
    ).items()
]


def parsed(kind: type, algo: str, *flags: str) -> object:
    with mock.patch("sys.argv", ["script.py", *flags]):
        return parse(kind, algo, PRESETS if algo.startswith("ppo") else None)


@pytest.mark.parametrize(("algo", "family", "settings"), TUNED, ids=[f"{algo}-{family}" for algo, family, _ in TUNED])
def test_every_tuned_environment_is_registered_and_its_settings_are_allowed(
    algo: str, family: str, settings: dict
) -> None:
    versions = [env_id for env_id in gym.registry if re.fullmatch(rf"{family}-v\d+", env_id)]
    assert versions
    args = parsed(KINDS[algo], algo, "--preset", "tuned", "--env-id", versions[-1])
    assert args.env_id == versions[-1]
    for name, value in settings.items():
        assert getattr(args, name) == (tuple(value) if isinstance(value, list) else value)


def test_flags_win_over_tuned_settings() -> None:
    args = parsed(PPOArgs, "ppo", "--preset", "tuned", "--env-id", "CartPole-v1", "--num-envs", "2")
    assert (args.num_envs, args.num_steps, args.gamma) == (2, 32, 0.98)
    assert parsed(PPODecoupledArgs, "ppo", "--preset=tuned", "--env-id=CartPole-v1").gae_lambda == 0.8


def test_atari_games_are_tuned_by_their_preset() -> None:
    args = parsed(PPOArgs, "ppo", "--preset", "tuned", "--env-id", "ALE/Breakout-v5")
    assert (args.env_id, args.frame_stack, args.preset) == ("ALE/Breakout-v5", 4, "tuned")


@pytest.mark.parametrize("kind", [PPOArgs, SACArgs])
def test_an_environment_that_nobody_tuned(kind: type) -> None:
    algo = "ppo" if kind is PPOArgs else "sac"
    with pytest.raises(ConfigError, match=r"--preset tuned has no settings for my_envs:Reach-v0, only for .*Pendulum"):
        parsed(kind, algo, "--preset", "tuned", "--env-id", "my_envs:Reach-v0")
    with pytest.raises(ConfigError, match="preset"):
        parsed(kind, algo, "--preset", "nothing")
