"""Actor, critic, encoder and normalisers of PPO: a plain module that knows neither Fabric nor environments."""

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Space
from torch import Tensor, nn

from fabricrl.models.distributions import make_head
from fabricrl.models.models import MLP, RewardNormalizer, make_encoder, make_normalizer, normalized
from fabricrl.utils.batch import Batch, Outputs

ACTION_SPACES = (Discrete, MultiDiscrete, MultiBinary, Box)


class PPOAgent(nn.Module):
    """Separate networks for policy and value; where there are images, over an encoder that both share.

        obs [*, D] → (normalise) → features             records [*, R] or [*, S, R] → (normalise) → encoder → features
        actor:  features → MLP → head: distribution of actions [*, A]
        critic: features → MLP → value [*]

    `masks` [*, L] say which discrete actions are allowed; None: all are.

    `forward` is the one gradient path. It takes observations as `prepare` returns them: they are normalised once a
    rollout, not once a minibatch.

    Args:
        obs_space: of one environment, vectors [D] or records of bytes.
        action_space: a single environment's, Discrete, MultiDiscrete, MultiBinary or Box.
        norm_obs, norm_reward: normalise by running statistics; else `obs_normalizer`, `reward_normalizer` is None.

    Raises:
        TypeError: an action space without a distribution.
    """

    def __init__(
        self,
        obs_space: Box,
        action_space: Space,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        log_std: float = 0.0,
        norm_obs: bool = False,
        norm_reward: bool = False,
        frame_stack: int = 1,
        cnn_features: int = 512,
    ) -> None:
        super().__init__()
        self.head = make_head(action_space, log_std)
        self.encoder = make_encoder(obs_space, frame_stack, cnn_features)
        self.frame_stack = frame_stack
        self.obs_shape = (frame_stack, *obs_space.shape) if frame_stack > 1 else obs_space.shape
        self.obs_dtype = torch.float32 if self.encoder is None else torch.uint8
        self.rows_at_once = None if self.encoder is None else 256  # of a rollout; None: all
        num_features = obs_space.shape[0] if self.encoder is None else self.encoder.num_features
        self.actor = MLP(num_features, self.head.size, hidden_sizes, activation, gain=0.01)
        self.critic = MLP(num_features, 1, hidden_sizes, activation, gain=1.0)
        self.obs_normalizer = make_normalizer(obs_space) if norm_obs else None
        self.reward_normalizer = RewardNormalizer() if norm_reward else None

    def forward(self, batch: Batch) -> Outputs:
        """Prepared `obs` [B, ...], `actions` [B, A] and `masks` [B, L] → log π(a|s), entropy, value; each [B]."""
        features = self.features(batch.obs)
        params, masks = self.actor(features), batch.columns.get("masks")
        logprobs, entropy = self.head.logprob_and_entropy(params, batch.actions, masks)
        return Outputs(logprobs, entropy, self.critic(features).squeeze(-1))

    def prepare(self, obs: Tensor) -> Tensor:
        """Observations [*, D] or [*, R] as the networks take them."""
        return obs if self.obs_normalizer is None else normalized(self.obs_normalizer, obs)

    def features(self, inputs: Tensor) -> Tensor:
        """Inputs of actor and critic, from prepared observations."""
        return inputs if self.encoder is None else self.encoder(inputs)

    def act(self, obs: Tensor, noise: Tensor, masks: Tensor | None = None) -> Tensor:
        """Draws actions [N, A] at raw observations [N, ...], from noise of `head.noise`. Only what acting needs."""
        return self.head.sample(self.actor(self.features(self.prepare(obs))), noise, masks)

    def greedy(self, obs: Tensor, masks: Tensor | None = None) -> Tensor:
        """The most likely actions [N, A] at raw observations [N, ...]."""
        return self.head.mode(self.actor(self.features(self.prepare(obs))), masks)

    def value(self, obs: Tensor) -> Tensor:
        """V(s) [N] at raw observations [N, ...]."""
        return self.prepared_value(self.prepare(obs))

    def prepared_value(self, inputs: Tensor) -> Tensor:
        """V(s) [N] at prepared observations [N, ...]."""
        return self.critic(self.features(inputs)).squeeze(-1)


def make_agent(args: Any, envs: Any) -> PPOAgent:
    """The agent that `args` describe, for these environments."""
    return PPOAgent(
        envs.single_observation_space,
        envs.single_action_space,
        args.hidden_sizes,
        args.activation,
        args.log_std_init,
        args.norm_obs,
        args.norm_reward,
        args.frame_stack,
        args.cnn_features,
    )
