"""Every algorithm learns which action the observation asks for, for each kind of action space, in seconds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fabricrl import evaluate
from fabricrl.algos.droq import droq
from fabricrl.algos.sac import sac
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


OFF_POLICY = {
    "sac": (sac.main, "--num-envs 4 --total-timesteps 2000 --learning-starts 400 --batch-size 128 --policy-lr 0.003"),
    "droq": (
        droq.main,
        "--num-envs 2 --total-timesteps 600 --learning-starts 200 --replay-ratio 5 --batch-size 64 --policy-lr 0.01",
    ),
}


@pytest.mark.parametrize("algorithm", OFF_POLICY)
def test_off_policy_algorithms_learn_the_identity(
    algorithm: str, script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # The best return is 10; actions that are uniform earn 4.5, and zeros earn 6
    main, flags = OFF_POLICY[algorithm]
    common = "--env-id tests.envs:IdentityBox-v0 --hidden-sizes 32 32 --gamma 0 --q-lr 0.003 --num-threads 1"
    assert script(main, *common.split(), *flags.split(), "--log-dir", tmp_path) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("result "))
    checkpoint = Path(line.partition(" checkpoint=")[2])
    script(evaluate.main, checkpoint.parent.parent, "--json", "--episodes", 20)
    results = json.loads(capsys.readouterr().out)
    assert results["greedy"]["return_mean"] >= 9.0
    assert 7.5 <= results["sampled"]["return_mean"] < results["greedy"]["return_mean"]  # some entropy is left
    assert results["greedy"]["length_mean"] == 10
