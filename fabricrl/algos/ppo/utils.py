"""What PPO's scripts and evaluation share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import VectorEnv

from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.envs.spaces import env_actions

ACTION_SPACES = (Discrete, MultiDiscrete, MultiBinary, Box)


def make_agent(args: Any, envs: VectorEnv) -> PPOAgent:
    """The agent that `args` describe, for these environments."""
    (obs_size,) = envs.single_observation_space.shape
    return PPOAgent(
        obs_size,
        envs.single_action_space,
        args.hidden_sizes,
        args.activation,
        args.log_std_init,
        args.norm_obs,
        args.norm_reward,
    )


def make_policy(agent: PPOAgent, envs: VectorEnv, greedy: bool, seed: int) -> Callable[..., Any]:
    """A function (observations [N, D]; rewards and dones [N] of the step before) → actions for `envs.step`."""
    generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def policy(obs: np.ndarray, rewards: np.ndarray, dones: np.ndarray) -> Any:
        inputs = torch.as_tensor(obs, dtype=torch.float32)
        actions = agent.greedy(inputs) if greedy else agent.act(inputs, agent.head.noise((len(obs),), generator))
        return env_actions(envs.single_action_space, actions.numpy())

    return policy
