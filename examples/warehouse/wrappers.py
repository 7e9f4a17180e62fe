"""Changes to the warehouse that are no part of it: wrappers, each of which does one thing."""

from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs


class ShapeReward(gym.Wrapper, RecordConstructorArgs):
    """Adds what a move has gained: `scale` for each cell that the robot is nearer to the end of its task.

    With potential Φ = −`scale` × distance the reward is r + Φ(s') − Φ(s), so that a whole way earns what it did before
    and `scale` × its length, however the robot gets there: driving in circles earns nothing (Ng et al. 1999).
    """

    def __init__(self, env: gym.Env, scale: float = 0.05) -> None:
        RecordConstructorArgs.__init__(self, scale=scale)  # so that Gymnasium can make it again from its spec
        gym.Wrapper.__init__(self, env)
        self.scale = scale
        self._distance = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._distance = self.env.get_wrapper_attr("distance")
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        before, self._distance = self._distance, self.env.get_wrapper_attr("distance")
        return obs, float(reward) + self.scale * (before - self._distance), terminated, truncated, info


class Slip(gym.ActionWrapper, RecordConstructorArgs):
    """On an oily floor the robot sometimes goes in a direction drawn at random.

    Args:
        probability: of that, at each move.
    """

    def __init__(self, env: gym.Env, probability: float = 0.1) -> None:
        RecordConstructorArgs.__init__(self, probability=probability)
        gym.ActionWrapper.__init__(self, env)
        self.probability = probability

    def action(self, action: Any) -> Any:
        random = self.env.unwrapped.np_random  # the environment's, seeded with it; not numpy.random, not random
        return random.integers(self.env.action_space.n) if random.random() < self.probability else action
