"""PPO learns which action the observation asks for, for each kind of action space, in seconds."""

import json
from collections.abc import Callable

import pytest

from fabricrl import evaluate
from tests.conftest import Trained


@pytest.mark.parametrize(
    ("kind", "least"),
    # The best return is 10; acting at random earns 2.5, 4.2, 5 and about 4.5
    [("Discrete", 9.9), ("MultiDiscrete", 9.9), ("MultiBinary", 9.9), ("Box", 9.0)],
)
def test_ppo_learns_the_identity(
    kind: str, least: float, ppo: Callable[..., Trained], script: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    flags = "--num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 8 --gamma 0 --learning-rate 0.005"
    run = ppo("--env-id", f"tests.envs:Identity{kind}-v0", "--total-timesteps", 8192, *flags.split())
    assert run.code == 0
    script(evaluate.main, run.folder, "--json", "--episodes", 20)
    results = json.loads(capsys.readouterr().out)
    assert results["greedy"]["episodes"] == results["sampled"]["episodes"] == 20
    assert results["greedy"]["return_mean"] >= least
    assert results["greedy"]["length_mean"] == 10
