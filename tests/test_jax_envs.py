"""Environments in JAX as tensor environments: the same numbers, in the same memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.envs import make_envs
from fabricrl.utils.errors import ConfigError
from tests.conftest import Trained
from tests.process import differences, load

jax = pytest.importorskip("jax", reason="needs JAX: pip install -e '.[jax]'")

DRIFT = "tests.jax_envs:JaxDrift-v0"
TINY: list[Any] = ["--num-envs", 8, "--num-steps", 16, "--total-timesteps", 512, "--hidden-sizes", 8]


def made(env_id: str, num_envs: int, **changed: Any) -> Any:
    return make_envs(PPOArgs(env_id=env_id, num_envs=num_envs, **changed), 0, Path())


def own(envs: Any) -> Any:
    """The `JaxEnvs` inside."""
    return envs.env.env


def test_nothing_is_copied() -> None:
    """A tensor of a step is at the address of its array, and an array of actions at that of their tensor."""
    envs = own(made(DRIFT, 64))
    envs.reset(seed=1)
    arrays: list[Any] = []
    step = envs._next
    envs._next = lambda *given: arrays.extend((given[1], step(*given))) or arrays[-1]
    actions = torch.ones(64, dtype=torch.int32)
    obs, rewards, terminated, truncated, infos = envs.step(actions)
    taken, (_, results) = arrays
    pairs = [
        (actions, taken),
        (infos["final_obs"], results[4]["final_obs"]),
        (infos["is_success"], results[4]["is_success"]),
    ]
    pairs += zip((obs, rewards, terminated, truncated), results[:4], strict=True)
    for tensor, array in pairs:
        assert tensor.data_ptr() == array.unsafe_buffer_pointer()
        assert tensor.shape == array.shape
    assert obs.dtype == rewards.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool


def test_rows_are_what_happened() -> None:
    """An environment that goes on moves by its action, whichever else is reset; both observations have one noise."""
    envs, ends = made(DRIFT, 8), 0
    obs, _ = envs.reset(seed=1)
    steps = torch.zeros(8)
    for _ in range(60):
        name = np.asarray(own(envs)._running.state["name"])
        actions = torch.randint(2, (8, 1))
        new, rewards, terminated, truncated, infos = envs.step(actions)
        moved, last = infos["final_obs"][:, 0] - obs[:, 0] - 0.3 * actions[:, 0], infos["final_obs"]
        assert moved.abs().max() < 0.6  # of noise with a deviation of 0.1
        assert (moved != 0).all()
        torch.testing.assert_close(rewards, -last[:, 0].abs())
        steps += 1
        assert torch.equal(terminated, last[:, 0] > 2)
        assert torch.equal(truncated, steps == 9)
        ended = terminated | truncated
        assert torch.equal(new[~ended], last[~ended])
        assert ((new[ended, 0] >= 0) & (new[ended, 0] < 1)).all()
        assert np.array_equal(np.asarray(own(envs)._running.state["name"]) != name, ended.numpy())
        told = infos["episode_info"][:, 0]
        assert torch.equal(told[ended], (last[ended, 0] > 1).float())
        assert told[~ended].isnan().all()
        steps[ended], ends, obs = 0, ends + int(ended.sum()), new
    assert ends > 8 * 60 / 9 - 8


def test_seeds_begin_the_same_episodes_and_no_seed_begins_others() -> None:
    envs, other = made(DRIFT, 8), made(DRIFT, 8)
    actions = torch.ones(8, 1, dtype=torch.int64)

    def play(envs: Any, **seed: Any) -> list[Tensor]:
        obs, _ = envs.reset(**seed)
        return [obs, *(envs.step(actions)[0] for _ in range(15))]

    first, again, unseeded, others = play(envs, seed=5), play(other, seed=5), play(envs), play(other, seed=6)
    assert all(map(torch.equal, first, again))
    for run in (unseeded, others):
        assert not any(map(torch.equal, first, run))
    assert len(first[0][:, 0].unique()) == 8


@pytest.mark.parametrize("env_id", ["phys2d/CartPole-v1", "phys2d/Pendulum-v0"])
def test_numbers_are_those_of_gymnasiums_single_environment(env_id: str) -> None:
    pytest.importorskip("flax", reason="needs Flax: pip install -e '.[jax]'")
    envs, single = made(env_id, 4, env_kwargs='{"max_episode_steps": 30}'), gym.make(env_id).unwrapped
    single.reset(seed=0)
    envs.reset(seed=3)
    rng, ends = torch.Generator().manual_seed(0), 0
    for _ in range(70):
        states = np.asarray(own(envs)._running.state)
        if isinstance(envs.single_action_space, gym.spaces.Discrete):
            actions = torch.randint(2, (4, 1), generator=rng)
        else:
            actions = 4 * torch.rand(4, 1, generator=rng) - 2
        _, rewards, terminated, truncated, infos = envs.step(actions)
        ends += int((terminated | truncated).sum())
        for i in range(4):
            single.state = jax.numpy.asarray(states[i])
            action = actions[i, 0].item() if actions.dtype == torch.int64 else jax.numpy.asarray(actions[i].numpy())
            obs, reward, ended, _, _ = single.step(action)
            np.testing.assert_allclose(infos["final_obs"][i], obs, rtol=1e-5, atol=1e-6)
            assert rewards[i].item() == pytest.approx(reward, rel=1e-5, abs=1e-6)
            assert terminated[i] == ended
    assert ends >= 4


def test_numbers_are_those_of_gymnasiums_pendulum_in_numpy() -> None:
    pytest.importorskip("flax", reason="needs Flax: pip install -e '.[jax]'")
    envs, single = made("phys2d/Pendulum-v0", 4), gym.make("Pendulum-v1").unwrapped
    envs.reset(seed=3)
    single.reset(seed=0)
    for _ in range(50):
        states = np.asarray(own(envs)._running.state)
        actions = 4 * torch.rand(4, 1) - 2
        _, rewards, _, _, infos = envs.step(actions)
        for i in range(4):
            single.state = states[i]
            obs, reward, *_ = single.step(actions[i].numpy())
            np.testing.assert_allclose(infos["final_obs"][i], obs, rtol=1e-4, atol=1e-5)
            assert rewards[i].item() == pytest.approx(reward, rel=1e-4, abs=1e-5)


def test_a_resumed_run_is_the_straight_run_to_the_bit(train: Callable[..., Trained], tmp_path: Path) -> None:
    flags = ["--env-id", DRIFT, *TINY, "--norm-obs", "--norm-reward", "--gamma", 0.9]
    flags += ["--checkpoint-every", 128, "--keep-checkpoints", 9]
    straight = train(ppo.main, *flags)
    assert int(straight.result["episodes"]) > 20
    half = straight.folder / "checkpoints" / f"step_{256:012d}.ckpt"
    resumed = train(ppo.main, "--resume", half, "--log-dir", tmp_path / "more")
    assert differences(load(half)["envs"], straight.state["envs"])
    for name in ("agent", "optimizer", "envs", "generators"):
        assert differences(straight.state[name], resumed.state[name]) == [], name
    assert straight.result["return_mean"] == resumed.result["return_mean"]


def test_a_run_on_a_gpu_that_jax_does_not_know_is_refused() -> None:
    from fabricrl.envs.simulators.jax import jax_device

    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("JAX knows a GPU here")
    with pytest.raises(ConfigError, match="JAX here knows the CPU alone: pip install 'jax"):
        jax_device(torch.device("cuda"))


# --- MuJoCo Playground


@pytest.mark.usefixtures("stand_ins")
def test_playground_begins_episodes_anew_or_as_at_first() -> None:
    """In the stand-in a point is moved by actions and noise until it is further than 1 from 0."""
    for full in (True, False):
        envs = made(
            "playground/NoisyPoint", 6, env_kwargs=f'{{"full_reset": {str(full).lower()}, "episode_length": 7}}'
        )
        assert envs.single_observation_space.shape == (2,)
        first, _ = envs.reset(seed=2)
        steps, ends, begun = torch.zeros(6), 0, []
        for _ in range(40):
            new, rewards, terminated, truncated, infos = envs.step(0.5 * torch.randn(6, 2))
            last, steps = infos["final_obs"], steps + 1
            torch.testing.assert_close(rewards, -last.norm(dim=-1))
            assert torch.equal(terminated, last.norm(dim=-1) > 1)
            assert torch.equal(truncated, steps == 7)
            ended = terminated | truncated
            assert torch.equal(new[~ended], last[~ended])
            assert (torch.equal(new[ended], first[ended])) != (full and bool(ended.any()))
            begun += new[ended].unbind()
            steps[ended], ends = 0, ends + int(ended.sum())
        assert ends > 12
        assert own(envs)._next._cache_size() == 1  # compiled once
        assert len({tuple(row.tolist()) for row in begun}) == (ends if full else 6)


@pytest.mark.usefixtures("stand_ins")
def test_playground_repeats_actions_and_adds_rewards_up() -> None:
    once, twice = (made("playground/NoisyPoint", 3, env_kwargs=f'{{"action_repeat": {n}}}') for n in (1, 2))
    for envs in (once, twice):
        envs.reset(seed=2)
    actions = torch.full((3, 2), 0.1)
    (_, first, *_), (obs, second, *_) = once.step(actions), once.step(actions)
    new, rewards, *_ = twice.step(actions)
    torch.testing.assert_close(new, obs)
    torch.testing.assert_close(rewards, first + second)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["playground/NoisyPiont"],
            "playground/NoisyPiont is not known to playground; did you mean playground/NoisyPoint?",
        ),
        (
            ["playground/NoisyPoint", "--env-kwargs", '{"epsode_length": 7}'],
            "--env-kwargs do not fit playground/NoisyPoint",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(flags: list[Any], words: str, train: Callable[..., Trained]) -> None:
    with pytest.raises(ConfigError) as raised:
        train(ppo.main, "--env-id", *flags, *TINY)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize(("full_reset", "repeat"), [(True, 1), (False, 1), (False, 2)])
def test_numbers_are_those_of_playgrounds_own_wrapper(full_reset: bool, repeat: int) -> None:
    """The real one, by its own compiled step from the same states, over episodes of 5 steps."""
    length = 5 * repeat - repeat // 2  # counts repetitions; the last step's go beyond it
    playground = pytest.importorskip("mujoco_playground", reason="needs Playground: pip install -e '.[playground]'")
    env = playground.registry.load("CartpoleBalance", config_overrides={"impl": "jax"})
    theirs = playground.wrapper.wrap_for_brax_training(
        env, episode_length=length, action_repeat=repeat, full_reset=full_reset
    )
    flags = f'{{"episode_length": {length}, "action_repeat": {repeat}, "full_reset": {str(full_reset).lower()}}}'
    envs = made("playground/CartpoleBalance", 3, env_kwargs=flags)
    obs, _ = envs.reset(seed=4)
    state = jax.jit(theirs.reset)(jax.random.split(jax.random.PRNGKey(0), 3))
    begun, _ = own(envs)._running.state
    info = dict(state.info) | {"AutoResetWrapper_first_data": begun.data, "AutoResetWrapper_first_obs": begun.obs}
    state, step = state.replace(data=begun.data, obs=begun.obs, info=info), jax.jit(theirs.step)
    compare = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for t in range(5 if full_reset else 12):
        actions = 2 * torch.rand(3, 1) - 1
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        state = step(state, jax.numpy.asarray(actions.numpy()))
        compare(rewards, state.reward)
        assert not terminated.any()
        assert np.array_equal(truncated, np.asarray(state.done) > 0)
        assert truncated.all() == (t % 5 == 4)
        if not (full_reset and t == 4):  # where each draws states of its own
            compare(obs, state.obs)
    assert (obs != infos["final_obs"]).any() == (full_reset or t % 5 == 4)
