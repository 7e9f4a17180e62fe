"""Names that policy.py and export.py look for, of recurrent PPO."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from fabricrl.algos.ppo_recurrent.agent import ACTION_SPACES, RecurrentPPOAgent, make_agent
from fabricrl.data import FrameStack
from fabricrl.envs.spaces import env_actions

__all__ = ["ACTION_SPACES", "env_actions", "make_agent", "make_policy"]


def make_policy(agent: RecurrentPPOAgent, envs: VectorEnv, greedy: bool, seed: int) -> Callable[..., Any]:
    """A function (observations [N, R]; rewards and dones [N] of the step before; masks [N, L], where there are any) →
    actions for `envs.step`.

    It remembers, and forgets where an episode was done.
    """
    generator = torch.Generator().manual_seed(seed)
    frames = FrameStack(agent)
    actions = states = torch.empty(0)

    @torch.inference_mode()
    def policy(obs: np.ndarray, rewards: np.ndarray, dones: np.ndarray, masks: np.ndarray | None = None) -> Any:
        nonlocal actions, states
        inputs, allowed = frames.add(obs, dones), None if masks is None else torch.as_tensor(masks)
        memory = torch.zeros(len(obs), agent.memory_size)
        if len(states) == len(obs):  # not the first
            memory = agent.remember(actions, torch.as_tensor(rewards, dtype=torch.float32), states)
            memory = torch.where(torch.as_tensor(dones)[:, None], 0.0, memory)
        if greedy:
            actions, states = agent.greedy(inputs, memory, allowed)
        else:
            actions, states = agent.act(inputs, memory, agent.head.noise((len(obs),), generator), allowed)
        return env_actions(envs.single_action_space, actions.numpy())

    return policy
