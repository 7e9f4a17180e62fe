"""Names that policy.py and export.py look for, of PPO."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from fabricrl.algos.ppo.agent import ACTION_SPACES, PPOAgent, make_agent
from fabricrl.data import FrameStack
from fabricrl.envs.spaces import env_actions

__all__ = ["ACTION_SPACES", "env_actions", "make_agent", "make_policy"]


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
