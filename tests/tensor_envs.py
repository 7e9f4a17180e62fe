"""Environments that take and return tensors, for tests."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from fabricrl.envs.torch.env import TorchEnv


class Numbered(TorchEnv):
    """Episodes that are terminated after 2, 4 or 5 steps, or else truncated after 5. A state is a random number that
    tells its episode from others, a length from 2 to 7, and how many steps there were; a step earns their number."""

    single_observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    single_action_space = Discrete(2, start=1)
    num_random = 2

    def first_state(self, random: Tensor) -> Tensor:
        length = 2 + (6 * random[:, 1]).floor()
        return torch.stack((random[:, 0], length, torch.zeros_like(length)), -1)

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        name, length, count = state.unbind(-1)
        count = count + 1 + 0 * actions
        state = torch.stack((name, length, count), -1)
        return state, count, (count >= length) & (length != 3)

    def observe(self, state: Tensor) -> Tensor:
        return state

    def told(self, state: Tensor) -> dict[str, Tensor]:
        return {"is_success": state[:, 0]}


class Steered(Numbered):
    """Numbered episodes with real actions, of which an observation shows the last."""

    single_observation_space = Box(-np.inf, np.inf, (5,), np.float32)
    single_action_space = Box(np.array([-1.0, 2.0], np.float32), np.array([3.0, 10.0], np.float32))

    def first_state(self, random: Tensor) -> Tensor:
        return torch.cat((super().first_state(random), torch.zeros_like(random)), -1)

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbered, rewards, terminated = super().next_state(state[:, :3], actions[:, 0])
        return torch.cat((numbered, actions), -1), rewards, terminated


class Mistaken(Numbered):
    """Numbered episodes of which a step returns something wrong.

    Args:
        fault: what it is.
    """

    def __init__(self, *args: Any, fault: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.fault = fault

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Any, Any]:
        state, rewards, terminated = super().next_state(state, actions)
        faults = {
            "column": (rewards[:, None], terminated),
            "mean": (rewards.mean(), terminated),
            "number": (1.0, terminated),
            "float": (rewards, terminated.float()),
            "bool column": (rewards, terminated[:, None]),
            "all": (rewards, terminated.all()),
        }
        return state, *faults[self.fault]


class Simulator(VectorEnv):
    """Not made of tensor code alone, and without a state that it tells: asks for a value in every step.

    Args:
        fault: how it misbehaves with step 5.
    """

    looks = True
    single_observation_space = Box(-1.0, 1.0, (2, 2), np.float32)
    single_action_space = Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, num_envs: int, device: str = "cpu", fault: str = "") -> None:
        self.num_envs, self.device, self.fault = num_envs, torch.device(device), fault
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "tensors": True}
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.count = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.count, self.generator = 0, torch.Generator(self.device).manual_seed(seed or 0)
        return self._obs(), {}

    def _obs(self) -> Tensor:
        return torch.rand(self.num_envs, 2, 2, generator=self.generator, device=self.device)

    def step(self, actions: Tensor) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.count += 1
        obs, rewards = self._obs(), -actions.square().sum(-1)
        if self.looks and rewards.max().item() > 0:
            raise RuntimeError("nothing is earned here")
        ended = torch.full((self.num_envs,), self.count % 4 == 0, device=self.device)
        obs, rewards = self._with_fault(obs, rewards) if self.count == 5 else (obs, rewards)
        tells = self.fault != "no final" and (self.fault != "final at ends" or ended.any())
        infos: dict[str, Any] = {"final_obs": obs} if tells else {}
        if self.fault == "masks":
            infos["action_mask"] = torch.ones(self.num_envs, 2, dtype=torch.bool)
        return obs, rewards, torch.zeros_like(ended), ended, infos

    def _with_fault(self, obs: Any, rewards: Tensor) -> tuple[Any, Any]:
        if self.fault == "raises":
            raise RuntimeError("the motor is broken")
        if self.fault == "nan":
            obs[1, 0, 1] = torch.nan
        if self.fault == "nan reward":
            rewards[1] = torch.nan
        return obs.numpy() if self.fault == "array" else obs, rewards[:1] if self.fault == "shape" else rewards


class Ignorant(Simulator):
    """Knows no device."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs)


class Pictures(Simulator):
    """Has observations that are not supported."""

    single_observation_space = Box(0, 255, (8, 8), np.uint8)


_IDS = {
    "Numbered": Numbered,
    "Steered": Steered,
    "Mistaken": Mistaken,
    "Simulator": Simulator,
    "Ignorant": Ignorant,
    "TensorPictures": Pictures,
}
for _name, _class in _IDS.items():
    limit = 5 if issubclass(_class, Numbered) else None
    gym.register(f"{_name}-v0", vector_entry_point=_class, max_episode_steps=limit)  # type: ignore[arg-type]
