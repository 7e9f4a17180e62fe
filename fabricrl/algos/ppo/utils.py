"""Names that policy.py and export.py look for, of PPO."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from fabricrl.algos.ppo.agent import ACTION_SPACES, PPOAgent, make_agent
from fabricrl.envs.spaces import env_actions

__all__ = ["ACTION_SPACES", "env_actions", "make_agent", "make_policy"]


class FrameStack:
    """Stacks observations that come one by one: the last S of the episode, or the newest alone if S is 1.

    Agents that name no `frame_stack` and no `obs_dtype` take vectors, without a stack.
    """

    def __init__(self, agent: Any) -> None:
        self.depth, self.dtype = getattr(agent, "frame_stack", 1), getattr(agent, "obs_dtype", torch.float32)
        self.frames = torch.empty(0)

    def add(self, obs: np.ndarray, dones: np.ndarray) -> Tensor:
        """Observations [N, R] → [N, R], or [N, S, R]; `dones` [N]: which are the first of an episode."""
        newest = torch.as_tensor(obs, dtype=self.dtype)
        if self.depth == 1:
            return newest
        newest = newest[:, None]
        if len(self.frames) != len(newest):  # the first
            self.frames = newest.repeat(1, self.depth, 1)
        shifted = torch.cat((self.frames[:, 1:], newest), 1)
        self.frames = torch.where(torch.as_tensor(dones)[:, None, None], newest, shifted)
        return self.frames


def make_policy(agent: PPOAgent, envs: VectorEnv, greedy: bool, seed: int) -> Callable[..., Any]:
    """A function (observations [N, R]; rewards and dones [N] of the step before; masks [N, L], where there are any) →
    actions for `envs.step`.
    """
    generator = torch.Generator().manual_seed(seed)
    frames = FrameStack(agent)

    @torch.inference_mode()
    def policy(obs: np.ndarray, rewards: np.ndarray, dones: np.ndarray, masks: np.ndarray | None = None) -> Any:
        inputs, allowed = frames.add(obs, dones), None if masks is None else torch.as_tensor(masks)
        if greedy:
            actions = agent.greedy(inputs, allowed)
        else:
            actions = agent.act(inputs, agent.head.noise((len(obs),), generator), allowed)
        return env_actions(envs.single_action_space, actions.numpy())

    return policy
