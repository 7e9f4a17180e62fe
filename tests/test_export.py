"""An exported policy acts as the policy itself: alone, in batches of any size, over whole episodes."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import fabricrl
from fabricrl import export
from fabricrl.algos.droq import utils as droq_utils
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo import utils as ppo_utils
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.ppo_recurrent import utils as recurrent_utils
from fabricrl.algos.sac import sac
from fabricrl.algos.sac import utils as sac_utils
from fabricrl.envs.spaces import env_actions, rescale_actions
from fabricrl.policy import Policy
from fabricrl.utils.errors import ConfigError, OutputError, RunError
from tests.process import Finished, call
from tests.test_policy import CASES, REPLAY, ROLLOUTS, short_runs  # noqa: F401

HAS_ONNX = all(map(importlib.util.find_spec, export.NEEDED))
FORMATS = ["pt2", pytest.param("onnx", marks=pytest.mark.skipif(not HAS_ONNX, reason="needs the extra export"))]
UTILS: dict[str, Any] = {"ppo": ppo_utils, "ppo_recurrent": recurrent_utils, "sac": sac_utils, "droq": droq_utils}
# Name → script and arguments of short runs whose policies play whole episodes here
PLAYED: dict[str, tuple[Any, list[Any]]] = {
    "ppo": (ppo, ["--env-id", "CartPole-v1", *ROLLOUTS, "--norm-obs"]),
    "memory": (ppo_recurrent, ["--env-id", "CartPole-v1", *ROLLOUTS, "--mask-velocities", "--prev-action",
                               "--prev-reward", "--rnn-type", "gru"]),
    "images": (ppo, ["--env-id", "tests.envs:PictureDict-v0", *ROLLOUTS, "--norm-obs", "--frame-stack", 3]),
    "sac": (sac, ["--env-id", "tests.envs:Deterministic-v0", "--env-kwargs", '{"continuous": true}', *REPLAY]),
}  # fmt: skip


def written(path: Path, kind: str, out: Path) -> dict[str, Any]:
    finished = call(export.main, path, "--format", kind, "--out", out, "--json")
    assert finished.code == 0
    return json.loads(finished.out)


def stepper(policy: Policy, path: Path) -> export.Stepper:
    module = export.ExportedPolicy(policy, UTILS[policy.algo].env_actions)
    return export.Stepper(module, policy, export.opened(path, module))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "name", ["text", "tuple", "discrete", "keys", "images", "frames", "memory", "pixels", "allowed", "sac", "critics"]
)
def test_actions_are_those_of_the_policy(
    name: str,
    kind: str,
    runs: Callable[[str], Finished],
    tmp_path: Path,
) -> None:
    """The command compares steps of observations drawn at random; here it is told that it agreed."""
    result = written(runs(name).checkpoint, kind, tmp_path / f"policy.{kind}")
    assert result["difference"] <= 1e-5
    assert (tmp_path / f"policy.{kind}").exists()
    space = fabricrl.load(runs(name).checkpoint).action_space
    assert result["outputs"]["action"] == {"dtype": str(space.dtype), "shape": ["N", *space.shape]}
    assert ("memory" in result["inputs"]) == ("next_memory" in result["outputs"]) == (name in ("memory", "pixels"))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", PLAYED)
def test_twenty_episodes_have_the_returns_of_the_policy(name: str, kind: str, tmp_path: Path) -> None:
    script, flags = PLAYED[name]
    path = call(script.main, *flags, "--num-threads", 1, "--log-dir", tmp_path).checkpoint
    written(path, kind, tmp_path / f"policy.{kind}")
    policy = fabricrl.load(path)
    program = stepper(policy, tmp_path / f"policy.{kind}")
    kwargs = json.loads(policy.args.env_kwargs)

    def played(act: Callable[[Any, float], Any], begin: Callable[[], None]) -> list[float]:
        env, returns = gym.make(policy.env_id, **kwargs), []
        for episode in range(20):
            begin()
            obs, _ = env.reset(seed=episode)
            score, reward, done = 0.0, 0.0, False
            while not done:
                obs, reward, terminated, truncated, _ = env.step(act(obs, reward))
                score, done = score + float(reward), terminated or truncated
            returns.append(score)
        env.close()
        return returns

    own = played(policy, policy.reset)
    theirs = played(lambda obs, reward: program([obs], [reward])[0], program.reset)
    assert theirs == pytest.approx(own, rel=1e-4)
    assert name == "sac" or len(set(own)) > 1, "all episodes alike: nothing is compared"


@pytest.mark.parametrize("kind", FORMATS)
def test_batches_may_have_any_size(kind: str, runs: Callable[[str], Finished], tmp_path: Path) -> None:
    policy = fabricrl.load(runs("lstm").checkpoint)
    written(policy.path, kind, tmp_path / f"policy.{kind}")
    program = stepper(policy, tmp_path / f"policy.{kind}")
    for size in (1, 2, 17):
        program.reset()
        policy.reset()
        for obs in np.random.default_rng(size).normal(size=(3, size, 4)).astype(np.float32):
            assert (program(list(obs)) == policy(obs)).all()


def test_a_pt2_file_needs_pytorch_alone(runs: Callable[[str], Finished], tmp_path: Path) -> None:
    path = runs("masked").checkpoint
    result = written(path, "pt2", tmp_path / "policy.pt2")
    about = {"fabricrl.json": ""}
    program = torch.export.load(tmp_path / "policy.pt2", extra_files=about).module()
    (action,) = program(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    assert action.tolist() == [fabricrl.load(path)([0.1, 0.2, 0.3, 0.4])]
    told = json.loads(about["fabricrl.json"])
    assert told["env_id"] == "CartPole-v1"
    assert told["inputs"] == result["inputs"] == {"obs": {"dtype": "float32", "shape": ["N", 4]}}


def test_a_program_that_acts_otherwise_is_noticed(
    runs: Callable[[str], Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(self: export.EnvActions, actions: torch.Tensor) -> torch.Tensor:
        return original(self, actions) + 1e-3

    original = export.EnvActions.forward
    monkeypatch.setattr(export.EnvActions, "forward", wrong)
    with pytest.raises(RunError, match=r"differs from the policy: actions differ by [0-9.]+e-0[34]"):
        written(runs("sac").checkpoint, "pt2", tmp_path / "policy.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
@pytest.mark.parametrize("rescales", [False, True])
def test_actions_have_the_type_of_their_space(dtype: str, rescales: bool) -> None:
    space = Box(-2, 3, (2, 2), np.dtype(dtype))
    drawn = torch.linspace(-1, 1, 8).view(2, 4)
    expected = (rescale_actions if rescales else env_actions)(space, drawn.numpy())
    found = export.EnvActions(space, rescales)(drawn).numpy()
    assert found.dtype == expected.dtype == space.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_mistakes_are_told_in_one_line(
    runs: Callable[[str], Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = runs("masked").checkpoint
    for out in (tmp_path / "policy", tmp_path / "nowhere" / "policy.pt2"):
        with pytest.raises(ConfigError, match=r"--out is .*policy.*: it must be a file of a folder that exists, and"):
            written(path, "pt2", out)
    (tmp_path / "taken.pt2").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*taken\.pt2: Is a directory"):
        written(path, "pt2", tmp_path / "taken.pt2")
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(OutputError, match=r"cannot write /proc/policy\.pt2: No such file"):
        written(path, "pt2", Path("/proc/policy.pt2"))
    monkeypatch.setattr(export, "algorithm", lambda *_: SimpleNamespace())
    with pytest.raises(ConfigError, match="no env_actions"):
        written(path, "pt2", tmp_path / "policy.pt2")
    monkeypatch.setattr(export, "NEEDED", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"--format onnx needs a package that is not installed: pip install .*export"):
        written(path, "onnx", tmp_path / "policy.onnx")


def test_every_case_is_a_case_of_policies() -> None:
    assert {"text", "frames", "lstm"} <= CASES.keys()
