"""Simulators as tensor environments. ManiSkill and Isaac Lab, which need a GPU, are stood for by small packages
that have their interfaces, in tests/stand_ins."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from fabricrl import evaluate
from fabricrl.algos.ppo import ppo, ppo_decoupled
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.sac import sac
from fabricrl.envs import make_envs
from fabricrl.envs.tensors import TensorEnvs
from fabricrl.utils.errors import ConfigError
from tests.conftest import Trained

ADAPTERS = tuple(f"fabricrl.envs.simulators.{name}" for name in ("maniskill", "isaaclab", "playground"))
TINY: list[Any] = ["--num-steps", 16, "--num-minibatches", 2, "--update-epochs", 2, "--hidden-sizes", 8]


def made(env_id: str, num_envs: int, **changed: Any) -> Any:
    return make_envs(PPOArgs(env_id=env_id, num_envs=num_envs, **changed), 0, Path())


# --- What each step tells


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("env_id", "num_envs", "final"),
    [("maniskill/Count-v1", 1, True), ("isaaclab/Isaac-Count", 8, True), ("isaaclab/Isaac-Count", 8, False)],
    ids=["ManiSkill", "Isaac Lab", "Isaac Lab without last observations"],
)
def test_rows_are_what_happened(env_id: str, num_envs: int, final: bool) -> None:
    """Episode e takes 2 + e % 4 steps, of which the n-th earns n, and is terminated if e is even, else truncated."""
    envs, ends = made(env_id, num_envs), 0
    if not final:
        envs.env.env.env.unwrapped.cfg.compute_final_obs = False
    obs, _ = envs.reset(seed=1)
    for _ in range(40):
        before = obs.clone()
        obs, rewards, terminated, truncated, infos = envs.step(torch.zeros(num_envs, 3))
        for i in range(num_envs):
            episode, count = (int(number) for number in before[i])
            ended = count + 1 == 2 + episode % 4
            ends += ended
            assert rewards[i] == count + 1
            assert terminated[i] == (ended and episode % 2 == 0)
            assert truncated[i] == (ended and episode % 2 == 1)
            assert obs[i].tolist() == ([episode + num_envs, 0] if ended else [episode, count + 1])
            assert infos["final_obs"][i].tolist() == [episode, count + 1 if final or not ended else count]
            if "maniskill" in env_id:
                told = infos["episode_info"][i, 0].item()
                assert told == (episode % 2 == 0) if ended else told != told
    assert ends > 8
    envs.close()


@pytest.mark.usefixtures("stand_ins")
def test_many_environments_of_maniskill_end_each_in_its_own_row() -> None:
    """As on a GPU. Where some end and others go on, infos tell of the latter what is so, and of the former what was."""
    importlib.import_module("mani_skill.envs")
    vectors = importlib.import_module("mani_skill.vector.wrappers.gymnasium")
    adapter = importlib.import_module("fabricrl.envs.simulators.maniskill")
    batch = gym.make("Count-v1", num_envs=8, obs_mode="state", sim_backend="physx_cuda:0")
    args = PPOArgs(env_id="maniskill/Count-v1", num_envs=8)
    envs = TensorEnvs(adapter.ManiSkillEnvs(vectors.ManiSkillVectorEnv(batch)), args)
    obs, _ = envs.reset(seed=1)
    mixed = 0
    for _ in range(40):
        episode, count = obs.long().unbind(-1)
        obs, rewards, terminated, truncated, infos = envs.step(torch.zeros(8, 3))
        ended, even = count + 1 == 2 + episode % 4, episode % 2 == 0
        mixed += bool(ended.any() and not ended.all() and even[ended].any() and not even[ended].all())
        assert torch.equal(rewards, count + 1.0)
        assert torch.equal(terminated, ended & even)
        assert torch.equal(truncated, ended & ~even)
        assert torch.equal(infos["final_obs"], torch.stack((episode, count + 1), -1).float())
        following = torch.stack((episode + 8 * ended, (count + 1) * ~ended), -1)
        assert torch.equal(obs, following.float())
        if ended.any():
            successes = infos["episode_info"][:, 0]
            assert torch.equal(successes.isnan(), ~ended)
            assert torch.equal(successes[ended], even[ended].float())
    assert mixed > 5
    envs.close()


@pytest.mark.usefixtures("stand_ins")
def test_what_an_end_means_can_be_chosen() -> None:
    """In ManiSkill episodes may go on after a success; in Isaac Lab time may belong to the task."""
    envs = made("maniskill/Count-v1", 1, env_kwargs='{"ignore_terminations": true}')
    envs.reset(seed=1)
    assert not any(envs.step(torch.zeros(1, 3))[2].any() for _ in range(20))
    envs = made("isaaclab/Isaac-Count", 4, env_kwargs='{"overrides": ["env.is_finite_horizon=true"]}')
    envs.reset(seed=1)
    steps = [envs.step(torch.zeros(4, 3)) for _ in range(20)]
    terminated, truncated = (torch.stack(ends) for ends in list(zip(*steps, strict=True))[2:4])
    assert not truncated.any()
    assert terminated.sum() > 4 * 3
    envs.close()


# --- Runs


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("env_id", "num_envs"), [("maniskill/Count-v1", 1), ("isaaclab/Isaac-Count", 8)])
def test_ppo_trains_saves_resumes_and_is_evaluated(
    env_id: str, num_envs: int, train: Callable[..., Trained], script: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    """A run ends as it should only if the environments of the one before, and of the trial, have been closed."""
    steps = 16 * num_envs * 4
    flags = ["--env-id", env_id, "--num-envs", num_envs, "--total-timesteps", steps, *TINY, "--norm-obs"]
    first = train(ppo.main, *flags)
    assert (first.code, first.result["steps"]) == (0, str(steps))
    assert "vectorization: torch" in first.output
    assert int(first.result["episodes"]) > 4
    assert 1 + 2 <= float(first.result["return_mean"]) <= 1 + 2 + 3 + 4 + 5
    assert all(weight.isfinite().all() for weight in first.weights)
    second = train(ppo.main, "--resume", first.folder, "--total-timesteps", 2 * steps, "--log-dir", tmp_path / "more")
    assert (second.code, second.result["steps"]) == (0, str(2 * steps))
    assert script(evaluate.main, second.folder, "--episodes", 1, "--mode", "greedy") == 0
    assert "return" in capsys.readouterr().out


@pytest.mark.usefixtures("stand_ins")
def test_sac_trains(train: Callable[..., Trained]) -> None:
    """Its buffer stores the last observations of episodes, not the first of the next."""
    flags = ["--total-timesteps", 120, "--learning-starts", 40, "--batch-size", 8, "--hidden-sizes", 8]
    trained = train(sac.main, "--env-id", "maniskill/Count-v1", *flags)
    assert (trained.code, trained.result["steps"]) == (0, "120")
    assert int(trained.result["episodes"]) > 120 / 5 - 1
    assert all(weight.isfinite().all() for weight in trained.weights)


# --- Mistakes


@pytest.mark.parametrize(
    ("env_id", "package", "command"),
    [
        ("playground/CartpoleBalance", "mujoco_playground", "pip install -e '.[playground]'"),
        ("maniskill/PickCube-v1", "mani_skill", "pip install -e '.[maniskill]'"),
        ("isaaclab/Isaac-Cartpole", "isaaclab_tasks", "pip install 'isaaclab>=3'"),
        ("phys2d/CartPole-v1", "jax", "pip install -e '.[jax]'"),
    ],
)
def test_a_package_that_is_missing_is_told_with_the_command_that_installs_it(
    env_id: str, package: str, command: str, train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name in ADAPTERS or name.startswith("gymnasium.envs.phys2d"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as raised:
        train(ppo.main, "--env-id", env_id)
    assert str(raised.value) == f"--env-id {env_id} needs a package that is not installed: {command}"


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["maniskill/Count-v1"], "--num-envs is 4: ManiSkill steps several environments on a GPU alone"),
        (
            ["maniskill/Cuont-v1"],
            "--env-id maniskill/Cuont-v1 is not known to maniskill; did you mean maniskill/Count-v1",
        ),
        (["isaaclab/Isaac-Cuont"], "--env-id isaaclab/Isaac-Cuont is not known to isaaclab; did you mean"),
        (["isaaclab/Zzz"], "--env-id isaaclab/Zzz is not known to isaaclab"),
        (["isaaclab/Isaac-Count", "--eval-every", 100], "--eval-every is set: Isaac Lab has one simulation a process"),
        (
            ["isaaclab/Isaac-Count", "--env-kwargs", '{"overrides": ["physics=isaacsim_physx"]}'],
            "needs Isaac Sim's Kit for Isaac Sim PhysX physics",
        ),
        (["isaaclab/Isaac-Count", "--env-kwargs", '{"color": 1}'], r'--env-kwargs {"color": 1} does not fit'),
    ],
)
def test_mistakes_are_told_in_a_line(flags: list[Any], words: str, train: Callable[..., Trained]) -> None:
    with pytest.raises(ConfigError) as raised:
        train(ppo.main, "--env-id", *flags, *TINY)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("stand_ins")
def test_scripts_that_play_on_the_cpu_take_no_simulator(train: Callable[..., Trained]) -> None:
    with pytest.raises(ConfigError, match="isaaclab/Isaac-Count is registered only as a vector environment"):
        train(ppo_decoupled.main, "--env-id", "isaaclab/Isaac-Count", *TINY[:2], "--devices", 2)
