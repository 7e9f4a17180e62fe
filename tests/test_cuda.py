"""On a GPU every script does what it does on a CPU; where there is none, these tests are skipped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fabricrl import evaluate
from fabricrl.algos import decoupled
from fabricrl.algos.droq import droq
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.sac import sac
from fabricrl.utils.decoupled import Group
from fabricrl.utils.errors import ConfigError
from tests.process import differences, load, run_team

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Episodes of 8 steps: they end where iterations and checkpoints do
COMMON = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--hidden-sizes", 16, 16, "--keep-checkpoints", 9]
CONTINUOUS = ["--env-kwargs", '{"continuous": true, "truncate": true}', "--norm-obs", "--num-threads", 1]
OFF_POLICY = [*CONTINUOUS, "--learning-starts", 32, "--batch-size", 16, "--total-timesteps", 96]
RUNS: dict[str, tuple[Callable[[], int], list]] = {
    "ppo": (ppo.main, [*CONTINUOUS, "--norm-reward", "--num-steps", 16, "--total-timesteps", 96]),
    "ppo, discrete": (ppo.main, ["--num-steps", 16, "--total-timesteps", 96]),
    "ppo_recurrent": (
        ppo_recurrent.main,
        [*CONTINUOUS, "--norm-reward", "--num-steps", 16, "--total-timesteps", 96, "--prev-action"],
    ),
    "sac": (sac.main, OFF_POLICY),
    "droq": (droq.main, [*OFF_POLICY, "--replay-ratio", 2]),
}
CUDA = ["--accelerator", "cuda"]


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, train: Callable[..., Any]) -> Callable[..., Any]:
    """Trains one of the scripts with further flags."""
    main, flags = RUNS[request.param]
    return lambda *more: train(main, *([] if "--resume" in more else [*COMMON, *flags]), *more)


def test_as_on_the_cpu(run: Callable[..., Any]) -> None:
    here, there = run(), run(*CUDA)
    assert "on cuda" in there.output
    assert not here.weights.equal(torch.zeros_like(here.weights))
    torch.testing.assert_close(there.weights.cpu(), here.weights, rtol=0, atol=2e-4)


@pytest.mark.parametrize("flags", [[], ["--vectorization", "native"]], ids=["images", "native"])
@pytest.mark.parametrize("algo", [ppo, ppo_recurrent], ids=["ppo", "ppo_recurrent"])
def test_stacked_images_and_skipped_steps_as_on_the_cpu(algo: Any, flags: list, train: Callable[..., Any]) -> None:
    images = ["--env-id", "tests.envs:PictureDict-v0", "--frame-stack", 3, "--cnn-features", 16, "--clip-reward"]
    line = [*(flags or images), "--num-envs", 4, "--num-steps", 16, "--num-minibatches", 2, "--norm-obs"]
    here, there = (train(algo.main, *line, "--total-timesteps", 128, *where) for where in ([], CUDA))
    assert "on cuda" in there.output
    torch.testing.assert_close(there.weights.cpu(), here.weights, rtol=0, atol=1e-3)


def test_straight_is_resumed(run: Callable[..., Any], tmp_path: Any) -> None:
    straight = run(*CUDA, "--checkpoint-every", 32)
    resumed = run("--resume", straight.checkpoint.with_name(f"step_{64:012d}.ckpt"), "--log-dir", tmp_path / "resumed")
    states = [
        {k: v for k, v in load(r.checkpoint).items() if k not in ("args", "best_return")} for r in (straight, resumed)
    ]
    assert differences(*states) == []


def test_checkpoint_changes_devices(run: Callable[..., Any], script: Callable[..., int], tmp_path: Any) -> None:
    half = run(*CUDA, "--checkpoint-every", 32).checkpoint.with_name(f"step_{64:012d}.ckpt")
    assert script(evaluate.main, half, "--episodes", 2) == 0
    on_cpu = run("--resume", half, "--log-dir", tmp_path / "cpu", "--accelerator", "cpu")
    assert "on cpu" in on_cpu.output
    assert on_cpu.result["steps"] == "96"


@pytest.mark.parametrize(
    "flags", [["--precision", "bf16-mixed"], ["--compile"], ["--matmul-precision", "high"]], ids=str
)
def test_faster_ways(run: Callable[..., Any], flags: list[str]) -> None:
    plain, other = run(*CUDA), run(*CUDA, *flags)
    torch.testing.assert_close(other.weights.cpu(), plain.weights.cpu(), rtol=0, atol=0.05)


def test_more_gpus_than_there_are(run: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be had"):
        run(*CUDA, "--devices", torch.cuda.device_count() + 1)


def trainers_on_gpu(rank: int) -> None:
    """In a rank: what `--player-device cpu` beside `--accelerator cuda` does, with one GPU less."""

    def group(fabric: Any, collective: Any = None, device: Any = None) -> Group:
        return Group(fabric, collective, torch.device("cuda") if collective is not None else device)

    decoupled.Group = group  # type: ignore[attr-defined,assignment]


@pytest.mark.parametrize("algo", ["ppo", "ppo_recurrent", "sac", "droq"])
def test_player_on_the_cpu_and_trainer_on_the_gpu(algo: str, train: Callable[..., Any], tmp_path: Path) -> None:
    main, flags = RUNS[algo]
    here = train(main, *COMMON, *flags, "--checkpoint-every", 32)
    twin, line = f"fabricrl.algos.{algo}.{algo}_decoupled", [*COMMON, *flags, "--checkpoint-every", 32, "--max-lag", 0]
    there = run_team(twin, *line, "--log-dir", tmp_path / "there", folder=tmp_path / "team", prepare=trainers_on_gpu)
    state = load(there.result["checkpoint"])
    weights = torch.cat([v.reshape(-1) for name, v in state["agent"].items() if "normalizer" not in name])
    torch.testing.assert_close(weights, here.weights, rtol=0, atol=2e-4)
    assert (
        train(main, "--resume", there.result["checkpoint"], "--log-dir", tmp_path / "resumed").result["steps"] == "96"
    )
