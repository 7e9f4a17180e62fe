"""Actor, critic and normalisers of PPO: a plain module that knows neither Fabric nor environments."""

from collections.abc import Sequence

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from fabricrl.models.distributions import make_head
from fabricrl.models.models import MLP, RunningNormalizer


class PPOAgent(nn.Module):
    """Separate networks for policy and value over vector observations.

        actor:  obs [*, D] → (normalise) → MLP → head: distribution of actions [*, A]
        critic: obs [*, D] → (normalise) → MLP → value [*]

    `forward` is the one gradient path. It takes observations as `prepare` returns them: they are normalised once a
    rollout, not once a minibatch.

    Args:
        obs_size: D.
        action_space: a single environment's, Discrete, MultiDiscrete, MultiBinary or Box.
        norm_obs, norm_reward: whether there are running statistics; None stands where there are not.

    Raises:
        TypeError: an action space without a distribution.
    """

    def __init__(
        self,
        obs_size: int,
        action_space: Space,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        log_std: float = 0.0,
        norm_obs: bool = False,
        norm_reward: bool = False,
    ) -> None:
        super().__init__()
        self.head = make_head(action_space, log_std)
        self.actor = MLP(obs_size, self.head.size, hidden_sizes, activation, gain=0.01)
        self.critic = MLP(obs_size, 1, hidden_sizes, activation, gain=1.0)
        self.obs_normalizer = RunningNormalizer(obs_size) if norm_obs else None
        self.reward_normalizer = RunningNormalizer(1) if norm_reward else None

    def forward(self, inputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prepared observations [B, D] and actions [B, A] → log π(a|s), entropy, value; each [B]."""
        logprobs, entropy = self.head.evaluate(self.actor(inputs), actions)
        return logprobs, entropy, self.critic(inputs).squeeze(-1)

    def prepare(self, obs: Tensor) -> Tensor:
        """Observations as the networks take them."""
        return obs if self.obs_normalizer is None else self.obs_normalizer(obs)

    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Draws actions [N, A] at raw observations [N, D], from noise of `head.noise`. Only what acting needs."""
        return self.head.sample(self.actor.forward(self.prepare(obs)), noise)

    def greedy(self, obs: Tensor) -> Tensor:
        """The most likely actions [N, A] at raw observations [N, D]."""
        return self.head.mode(self.actor(self.prepare(obs)))

    def value(self, obs: Tensor) -> Tensor:
        """V(s) [*] at raw observations [*, D]."""
        return self.critic(self.prepare(obs)).squeeze(-1)

    @torch.no_grad()
    def scale_rewards(self, rewards: Tensor) -> Tensor:
        """Rewards as the critic learns them: divided by the running deviation of the discounted return."""
        return rewards if self.reward_normalizer is None else self.reward_normalizer.scale(rewards)
