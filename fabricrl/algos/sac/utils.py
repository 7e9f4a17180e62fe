"""Names that policy.py and export.py look for, of SAC."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from fabricrl.algos.sac.agent import ACTION_SPACES, SACAgent, make_agent
from fabricrl.data import FrameStack
from fabricrl.envs.spaces import rescale_actions as env_actions

__all__ = ["ACTION_SPACES", "env_actions", "make_agent", "make_policy"]


def make_policy(agent: SACAgent, envs: VectorEnv, greedy: bool, seed: int) -> Callable[..., np.ndarray]:
    """A function (observations [N, R]; rewards and dones [N] of the step before) → actions for `envs.step`."""
    generator = torch.Generator().manual_seed(seed)
    action_space: Any = envs.single_action_space
    frames = FrameStack(agent)

    @torch.inference_mode()
    def policy(obs: np.ndarray, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        inputs = frames.add(obs, dones)
        actions = agent.greedy(inputs) if greedy else agent.act(inputs, agent.head.noise((len(obs),), generator))
        return env_actions(action_space, actions.numpy())

    return policy
