"""N episodes side by side, whose observations tell which episode it is and how many steps it has had."""

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

OBSERVATIONS = Box(-np.inf, np.inf, (2,), np.float32)
ACTIONS = Box(-1.0, 1.0, (3,), np.float32)


class Counting:
    """Episode e takes 2 + e % 4 steps, and is terminated, a success, if e is even, else truncated. The n-th step of an
    episode earns n. Environment i of N plays the episodes i, i + N, i + 2 N, …"""

    def __init__(self, num_envs: int, device: str | torch.device = "cpu") -> None:
        self.num_envs, self.device = num_envs, torch.device(device)
        self.episodes = torch.arange(num_envs, device=self.device)
        self.counts = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, terminated and truncated [N]."""
        assert actions.shape == (self.num_envs, *ACTIONS.shape)
        self.counts += 1
        ended, even = self.counts >= 2 + self.episodes % 4, self.episodes % 2 == 0
        return self.counts.float(), ended & even, ended & ~even

    def begin(self, which: Tensor) -> None:
        """Begins the next episodes of the environments that a mask [N] or their numbers name."""
        self.episodes[which] += self.num_envs
        self.counts[which] = 0

    def observe(self) -> Tensor:
        return torch.stack((self.episodes, self.counts), -1).float()
