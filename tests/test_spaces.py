"""Spaces of every supported kind and shape: what the network sees, and what reaches the environment."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo.utils import make_agent
from fabricrl.algos.sac import utils as sac
from fabricrl.algos.sac.args import SACArgs
from fabricrl.envs import make_env, make_envs
from fabricrl.envs.spaces import check_bounded, env_actions, rescale_actions
from fabricrl.utils.errors import ConfigError, NonFiniteError
from tests.conftest import Trained
from tests.envs import ODD_SPACES

OBSERVATIONS = {  # kind -> length of the vector that the network sees
    "box": 3,
    "box_2d": 6,
    "box_int": 2,
    "box_unbounded": 3,
    "dict": 5,  # 2 numbers and one of 3 choices
    "dict_nested": 2,
    "dict_text": 5,  # the text is left out
    "discrete": 3,
    "discrete_start": 3,
    "multi_binary": 4,
    "multi_binary_2d": 6,
    "multi_discrete": 5,
    "multi_discrete_2d": 11,
    "tuple": 4,
}
ACTIONS = (
    "box",
    "box_2d",
    "box_unbounded",
    "box_uneven",
    "discrete",
    "discrete_start",
    "multi_binary",
    "multi_binary_2d",
    "multi_discrete",
    "multi_discrete_2d",
    "multi_discrete_start",
)
TINY = "--num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 32 --hidden-sizes 8 --logger csv"


def odd(obs: str = "box", action: str = "discrete") -> list[str]:
    return ["--env-id", "tests.envs:Odd-v0", "--env-kwargs", f'{{"obs": "{obs}", "action": "{action}"}}']


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_ppo_trains_on_observations_of_this_kind(kind: str, ppo: Callable[..., Trained]) -> None:
    run = ppo(*odd(obs=kind), *TINY.split(), "--norm-obs")
    assert run.code == 0
    assert run.weights.isfinite().all()
    assert run.state["agent"]["actor.hidden.0.weight"].shape == (8, OBSERVATIONS[kind])


@pytest.mark.parametrize("kind", ACTIONS)
def test_ppo_trains_with_actions_of_this_kind_and_the_environment_accepts_them(
    kind: str, ppo: Callable[..., Trained]
) -> None:
    run = ppo(*odd(action=kind), *TINY.split())  # the environment refuses what is not in its space
    assert run.code == 0
    assert run.weights.isfinite().all()


@pytest.mark.parametrize("kind", ACTIONS)
def test_greedy_and_drawn_actions_are_in_the_space(kind: str, tmp_path: Path) -> None:
    args = PPOArgs(env_id="tests.envs:Odd-v0", env_kwargs=f'{{"action": "{kind}"}}', num_envs=64)
    envs = make_envs(args, 0, tmp_path)
    agent = make_agent(args, envs)
    obs = torch.randn(64, 3)
    space = ODD_SPACES[kind]
    drawn = agent.act(obs, agent.head.noise((64,), torch.Generator().manual_seed(1)))
    for actions in (drawn, agent.greedy(obs)):
        batch = env_actions(space, actions.detach().numpy())
        assert len(batch) == 64
        assert all(space.contains(action.astype(space.dtype)) for action in batch)
    envs.close()


@pytest.mark.parametrize("kind", ["discrete_start", "multi_discrete", "multi_discrete_start"])
def test_every_choice_is_drawn_including_those_that_do_not_count_from_zero(kind: str) -> None:
    space = ODD_SPACES[kind]
    sizes = [int(space.n)] if isinstance(space, Discrete) else space.nvec.tolist()
    indices = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    actions = {tuple(np.atleast_1d(action).tolist()) for action in env_actions(space, indices)}
    assert len(actions) == np.prod(sizes)
    assert all(space.contains(np.array(a) if len(a) > 1 else np.int64(a[0])) for a in actions)


def test_actions_by_hand() -> None:
    assert env_actions(Discrete(3, start=5), np.array([[0], [2]])).tolist() == [5, 7]
    assert env_actions(MultiDiscrete([2, 3], start=[1, -1]), np.array([[0, 2]])).tolist() == [[1, 1]]
    matrix = env_actions(MultiDiscrete([[2, 3], [4, 2]]), np.array([[1, 2, 3, 0]]))
    assert matrix.tolist() == [[[1, 2], [3, 0]]]
    bits = env_actions(MultiBinary((2, 2)), np.array([[1.0, 0.0, 0.0, 1.0]], np.float32))
    assert bits.tolist() == [[[1, 0], [0, 1]]]
    assert bits.dtype == np.int8
    box = Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))
    assert env_actions(box, np.array([[-3.0, -3.0], [0.5, 30.0]], np.float32)).tolist() == [[-1.0, 0.0], [0.5, 10.0]]


def test_a_flat_observation_keeps_every_part_in_a_fixed_place() -> None:
    args = SimpleNamespace(env_id="tests.envs:Odd-v0", env_kwargs='{"obs": "dict"}', mask_velocities=False)
    env = make_env(args)
    obs, _ = env.reset(seed=1)
    raw = env.unwrapped.observation_space
    raw.seed(1)
    sample = raw.sample()  # the same draw
    gear = np.eye(3)[sample["gear"]]
    np.testing.assert_allclose(obs, np.concatenate([gear, sample["speed"]]), rtol=1e-6)  # keys in alphabetical order
    assert obs.dtype == np.float32 or obs.dtype == np.float64


def test_squashed_actions_are_stretched_to_the_bounds_by_hand() -> None:
    box = Box(np.array([-1.0, 0.0, -3.0], np.float32), np.array([1.0, 10.0, 1.0], np.float32))
    actions = np.array([[-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [0.5, -0.5, 0.5], [1.0, 1.0, 1.0]], np.float32)
    expected = [[-1.0, 0.0, -3.0], [0.0, 5.0, -1.0], [0.5, 2.5, 0.0], [1.0, 10.0, 1.0]]
    assert rescale_actions(box, actions).tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ends_of_the_policy_are_exactly_the_bounds_and_nothing_lies_beyond(dtype: type) -> None:
    rng = np.random.default_rng(0)
    ends = np.repeat([[-1.0], [1.0]], 4, axis=1).astype(np.float32)
    drawn = rng.uniform(-1, 1, (50, 4)).astype(np.float32)
    for _ in range(300):
        low = (rng.normal(size=4) * 10 ** rng.uniform(-3, 3)).astype(dtype)
        high = low + (rng.exponential(size=4) * 10 ** rng.uniform(-2, 3)).astype(dtype)
        space = Box(low, high, dtype=dtype)
        assert np.array_equal(rescale_actions(space, ends), [space.low, space.high])
        inside = rescale_actions(space, drawn)
        assert ((inside >= space.low) & (inside <= space.high)).all()
        expected = low + (drawn.astype(float) + 1) / 2 * (high.astype(float) - low)
        assert (abs(inside - expected) <= 4 * np.finfo(dtype).eps * np.maximum(abs(low), abs(high))).all()


def test_bounds_as_far_apart_as_numbers_go_are_reached_too() -> None:
    space = Box(np.float32(-3e38), np.float32(3e38), (2,))
    with np.errstate(all="raise"):
        assert rescale_actions(space, np.array([[-1.0, 0.0], [0.0, 1.0]], np.float32)).tolist() == [
            [space.low[0], 0.0],
            [0.0, space.high[1]],
        ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 2, 1)])
def test_stretched_actions_have_the_shape_and_type_of_the_space(shape: tuple[int, ...], dtype: type) -> None:
    space = Box(-2.0, 4.0, shape, dtype)
    size = int(np.prod(shape))
    flat = np.linspace(-1, 1, 5 * size, dtype=np.float32).reshape(5, size)
    actions = rescale_actions(space, flat)
    assert actions.shape == (5, *shape)
    assert actions.dtype == dtype
    assert all(space.contains(np.asarray(action)) for action in actions)
    np.testing.assert_allclose(actions.reshape(5, size), 1 + 3 * flat, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ([-1.0, -np.inf], [1.0, 1.0]),
        ([-1.0, 0.0], [1.0, np.inf]),
        ([-np.inf, -np.inf], [np.inf, np.inf]),
        ([-1.0, 2.0], [1.0, 2.0]),  # nothing to choose from
    ],
)
def test_a_box_without_room_between_two_bounds_is_refused(low: list[float], high: list[float]) -> None:
    with pytest.raises(ConfigError, match="needs a Box with finite bounds"):
        check_bounded(Box(np.array(low, np.float32), np.array(high, np.float32)))


@pytest.mark.parametrize("convert", [env_actions, rescale_actions])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_reach_no_environment(convert: Callable[..., np.ndarray], value: float) -> None:
    space, actions = Box(-1.0, 1.0, (2,), np.float32), np.full((3, 2), 3e38, np.float32)
    assert np.isfinite(convert(space, actions)).all()  # however large
    actions[1, 1] = value
    with pytest.raises(NonFiniteError, match="actions are not finite"):
        convert(space, actions)


def test_a_box_with_bounds_is_accepted() -> None:
    for space in (ODD_SPACES["box"], ODD_SPACES["box_2d"], ODD_SPACES["box_uneven"]):
        check_bounded(space)


@pytest.mark.parametrize("kind", ["box", "box_2d", "box_uneven"])
def test_the_policy_of_an_evaluation_answers_in_the_space(kind: str, tmp_path: Path) -> None:
    args = SACArgs(env_id="tests.envs:Odd-v0", env_kwargs=f'{{"action": "{kind}"}}', num_envs=64, hidden_sizes=(8,))
    envs = make_envs(args, 0, tmp_path)
    agent, space, obs = sac.make_agent(args, envs), ODD_SPACES[kind], np.random.default_rng(0).normal(size=(64, 3))
    none = np.zeros(64, bool)
    greedy = sac.make_policy(agent, envs, True, 1)
    drawn = [sac.make_policy(agent, envs, False, seed)(obs, none, none) for seed in (1, 1, 2)]
    assert all(space.contains(action) for action in (*greedy(obs, none, none), *drawn[0]))
    inputs = torch.as_tensor(obs, dtype=torch.float32)
    assert np.array_equal(greedy(obs, none, none), rescale_actions(space, agent.greedy(inputs).detach().numpy()))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], greedy(obs, none, none))
    envs.close()
