"""Rollouts of a counting environment, for both kinds of vector environment."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import VectorEnv

from fabricrl import evaluate
from fabricrl.algos.ppo.agent import PPOAgent, make_agent
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo.ppo import rollout
from fabricrl.data import RolloutBuffer
from fabricrl.envs import make_envs
from fabricrl.utils.errors import ConfigError, NonFiniteError
from fabricrl.utils.seeding import env_seeds
from tests.conftest import BareRun
from tests.envs import vectors
from tests.process import call

STEPS, ENVS = 7, 3
# Lengths 3, 4 and 5 for the three environments (seeds 0, 1, 2), so that ends fall on every step of a rollout
KINDS = {
    "terminated": '{"terminate_after": 3, "stagger": 3}',
    "truncated": '{"truncate_after": 3, "stagger": 3}',
    "both": '{"terminate_after": 3, "truncate_after": 3, "stagger": 3}',
    "one step": '{"truncate_after": 1}',
}


@pytest.fixture(params=["sync", "async"])
def vectorization(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build(vectorization: str, tmp_path: Path) -> Iterator[Any]:
    made: list[VectorEnv] = []

    def make(env_kwargs: str, env_id: str = "tests.envs:Counting-v0", num_envs: int = ENVS) -> VectorEnv:
        args = PPOArgs(env_id=env_id, env_kwargs=env_kwargs, vectorization=vectorization, num_envs=num_envs)
        made.append(make_envs(args, 0, tmp_path))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


def playing(envs: VectorEnv, **settings: Any) -> tuple[BareRun, PPOAgent]:
    """A run with an agent that acts in these environments."""
    args = PPOArgs(num_envs=ENVS, **settings)
    return BareRun(args, action_space=envs.single_action_space), make_agent(args, envs)


class Expected:
    """The counting environment written a second time, one environment after the other, as an independent reference."""

    def __init__(self, kind: str, seed: int) -> None:
        self.length = 1 if kind == "one step" else 3 + seed % 3
        self.terminates, self.truncates = kind in ("terminated", "both"), kind != "terminated"
        self.seed, self.steps, self.episode = seed, 0, 0

    def obs(self) -> list[int]:
        return [self.steps, self.episode, self.seed]

    def step(self) -> tuple[float, bool, bool, list[int] | None]:
        self.steps += 1
        reward, final = float(self.steps), None
        done = self.steps == self.length
        if done:
            final = self.obs()
            self.steps, self.episode = 0, self.episode + 1
        return reward, done and self.terminates, done and self.truncates, final


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_a_real_step_and_every_field_belongs_to_it(build: Any, kind: str) -> None:
    envs = build(KINDS[kind])
    run, agent = playing(envs)
    rb = RolloutBuffer(STEPS, ENVS, vectors(3), 1, torch.int64)
    obs, _ = envs.reset(seed=list(range(ENVS)))
    rb.start(obs)
    references = [Expected(kind, seed) for seed in range(ENVS)]
    for iteration in range(3):  # ends fall on first, middle and last rows, and episodes cross rollouts
        rollout(run, agent, envs, rb)
        limits: dict[tuple[int, int], list[float]] = {}
        if rb.has_truncated:
            stored = zip(*rb.truncated_episodes(), strict=True)
            limits = {(int(t), int(env)): final.tolist() for t, env, final in stored}
        expected_limits = {}
        for env, reference in enumerate(references):
            for t in range(STEPS):
                where = (iteration, t, env)
                assert rb.obs[t, env].tolist() == reference.obs(), where  # the observation that the action answered
                reward, terminated, truncated, final = reference.step()
                assert rb.rewards[t, env].item() == reward, where  # a row of a reset would have reward 0
                assert rb.terminated[t, env].item() == terminated, where
                assert rb.truncated[t, env].item() == truncated, where
                assert rb.dones[t, env].item() == (terminated or truncated), where
                assert rb.obs[t + 1, env].tolist() == reference.obs(), where  # after an end: the reset's, not the last
                if truncated and not terminated:
                    expected_limits[t, env] = final
        assert limits == expected_limits
        assert (kind == "terminated" or kind == "both") == (not rb.has_truncated)
        rb.start()
        assert rb.obs[0].tolist() == [reference.obs() for reference in references]


def test_actions_are_stored_as_they_were_drawn_but_reach_the_environment_clipped(build: Any) -> None:
    envs = build('{"action": "box_uneven"}', "tests.envs:Odd-v0")  # bounds [−1, 1] and [0, 10]; refuses others
    run, agent = playing(envs, log_std_init=2.0)
    rb = RolloutBuffer(STEPS, ENVS, vectors(3), 2, torch.float32)
    rb.start(envs.reset(seed=1)[0])
    noise = agent.head.noise((STEPS, ENVS), torch.Generator().manual_seed(3))
    run.act_rng.manual_seed(3)
    rollout(run, agent, envs, rb)
    with torch.no_grad():
        torch.testing.assert_close(rb.actions, agent.act(rb.obs[:-1], noise))
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0])
    assert ((rb.actions < low) | (rb.actions > high)).any()


def test_environments_of_all_runs_ranks_and_indices_start_from_different_seeds() -> None:
    """Neighbouring seeds, the largest, ranks, resumed runs; and many environments of one run."""
    seeds = [
        env_seed
        for seed in (*range(50), 9_999, 10_000, 2**31 - 1)
        for rank in range(3)
        for step in (0, 1_000)
        for env_seed in env_seeds(seed, rank, 4, step)
    ]
    assert len(set(seeds)) == len(seeds)
    assert len({env_seed for rank in range(8) for env_seed in env_seeds(1, rank, 4096)}) == 8 * 4096
    assert env_seeds(1, 1, 2) == env_seeds(1, 0, 4)[2:], "an environment's place in the run decides"


def test_environments_in_training_share_no_seed_with_those_of_evaluation(tmp_path: Path) -> None:
    assert all(2**30 <= env_seed < 2**31 for seed in range(100) for env_seed in env_seeds(seed, 0, 8, seed))
    with pytest.raises(ConfigError, match=r"--seed is 1073741817: it must be between 0 and 1073741816"):
        call(evaluate.main, tmp_path, "--seed", 2**30 - 7, "--num-envs", 8)


def step(rb: RolloutBuffer, t: int, **changes: Any) -> None:
    """Adds an ordinary step with some fields changed."""
    fields: dict[str, Any] = {
        "actions": np.zeros((2, 1), np.int64),
        "next_obs": np.zeros((2, 2), np.float32),
        "rewards": np.zeros(2),
        "terminated": np.zeros(2, bool),
        "truncated": np.zeros(2, bool),
        "infos": {},
    }
    rb.add(t, **(fields | changes))


def small_buffer() -> RolloutBuffer:
    rb = RolloutBuffer(3, 2, vectors(2), 1, torch.int64)
    rb.start(np.zeros((2, 2), np.float32))
    for t in range(3):
        step(rb, t)
    return rb


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_number_that_is_not_finite_is_found_and_named(bad: float) -> None:
    rb = small_buffer()
    assert rb.find_nonfinite() is None
    step(rb, 1, rewards=np.array([0.0, bad]))
    assert rb.find_nonfinite() == "reward of environment 1 is not finite after step 1 of the rollout"
    rb = small_buffer()
    step(rb, 2, next_obs=np.array([[0.0, bad], [0.0, 0.0]]))
    assert rb.find_nonfinite() == "observation of environment 0 is not finite after step 2 of the rollout"
    rb = small_buffer()
    step(rb, 0, rewards=np.array([bad, 0.0]))
    step(rb, 1, rewards=np.array([0.0, -bad]))
    assert rb.find_nonfinite() == "reward of environment 0 is not finite after step 0 of the rollout"
    rb = small_buffer()
    rb.start(np.array([[bad, 0.0], [0.0, 0.0]]))
    assert rb.find_nonfinite() == "first observation is not finite"


def test_a_final_observation_that_is_not_finite_is_found_though_no_row_holds_it() -> None:
    rb = small_buffer()
    finals = np.empty(2, dtype=object)
    finals[1] = np.array([0.0, np.nan])
    step(rb, 1, truncated=np.array([False, True]), infos={"final_obs": finals})
    assert rb.find_nonfinite() == "final observation of environment 1 is not finite after step 1 of the rollout"


def test_large_finite_numbers_are_not_taken_for_infinite_ones() -> None:
    rb = small_buffer()
    for t in range(3):
        step(rb, t, rewards=np.full(2, 3e38))  # the sum overflows float32
    assert rb.find_nonfinite() is None


def test_a_time_limit_that_falls_on_a_lost_life_is_not_bootstrapped() -> None:
    """As EnvPool may report it: nothing was to be expected after that life."""
    rb = RolloutBuffer(1, 2, vectors(1), 1, torch.float32)
    zeros, both, none = np.zeros((2, 1), np.float32), np.ones(2, bool), np.zeros(2, bool)
    rb.start(zeros)
    rb.add(0, zeros, zeros, zeros[:, 0], none, both, {"life_lost": np.array([True, False]), "final_obs": zeros})
    _, envs, _ = rb.truncated_episodes()
    assert envs.tolist() == [1]
    assert rb.ends.all()


def test_final_observations_are_copies() -> None:
    # Environments may write their next observation into the array that they returned
    rb = small_buffer()
    finals = np.empty(2, dtype=object)
    finals[0] = np.array([1.0, 2.0], np.float32)
    step(rb, 0, truncated=np.array([True, False]), infos={"final_obs": finals})
    finals[0][:] = 9.0
    _, _, stored = rb.truncated_episodes()
    assert stored.tolist() == [[1.0, 2.0]]


def test_a_rollout_with_a_bad_number_ends_in_an_error_that_names_it(build: Any) -> None:
    envs = build('{"kind": "reward_nan", "at_step": 4, "only_seed": 1}', "tests.envs:Fault-v0")
    run, agent = playing(envs)
    rb = RolloutBuffer(STEPS, ENVS, vectors(2), 1, torch.int64)
    rb.start(envs.reset(seed=list(range(ENVS)))[0])
    with pytest.raises(NonFiniteError, match="reward of environment 1 is not finite after step 4"):
        rollout(run, agent, envs, rb)
