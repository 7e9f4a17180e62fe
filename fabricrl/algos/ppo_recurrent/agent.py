"""Actor and critic of PPO with memory: a plain module that knows neither Fabric nor environments."""

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium.spaces import Box, Space
from torch import Tensor, nn

from fabricrl.algos.ppo.agent import ACTION_SPACES
from fabricrl.models.distributions import make_head
from fabricrl.models.models import MLP, RewardNormalizer, make_encoder, make_normalizer, normalized
from fabricrl.models.recurrent import RecurrentCore
from fabricrl.utils.batch import Batch, Outputs

__all__ = ["ACTION_SPACES", "RecurrentPPOAgent", "make_agent"]


class RecurrentPPOAgent(nn.Module):
    """Policy and value that remember.

        features: obs [*, D] → (normalise), or records with images → (normalise) → encoder
        inputs: features, beside (previous action), (previous reward); together [*, I]
        actor:  inputs → core → MLP → head: distribution of actions [*, A]
        critic: inputs → core → MLP → value [*]

    What an environment remembers is one vector [M], zero at the first observation of an episode:

        (previous action) | (previous reward) | state of the actor's core | state of the critic's, unless both share one

    `masks` [*, L] say which discrete actions are allowed; None: all are.

    `forward` is the one gradient path. It takes observations as `prepare` returns them, once a rollout.

    Args:
        obs_space: of one environment, vectors [D] or records of bytes.
        action_space: a single environment's, Discrete, MultiDiscrete, MultiBinary or Box.
        prev_action, prev_reward: whether the cores are told the action before, discrete ones as one-hot, and what it
            earned.
        norm_obs, norm_reward: normalise by running statistics; else `obs_normalizer`, `reward_normalizer` is None.

    Raises:
        TypeError: an action space without a distribution.
    """

    def __init__(
        self,
        obs_space: Box,
        action_space: Space,
        rnn_type: str = "lstm",
        rnn_hidden_size: int = 64,
        rnn_layers: int = 1,
        shared_core: bool = False,
        encoder_sizes: Sequence[int] = (),
        hidden_sizes: Sequence[int] = (64,),
        activation: str = "tanh",
        prev_action: bool = False,
        prev_reward: bool = False,
        log_std: float = 0.0,
        norm_obs: bool = False,
        norm_reward: bool = False,
        frame_stack: int = 1,
        cnn_features: int = 512,
    ) -> None:
        super().__init__()
        self.head = make_head(action_space, log_std)
        self.prev_action, self.prev_reward = prev_action, prev_reward
        self.num_prev = prev_action * self.head.encoded_size + prev_reward
        self.encoder = make_encoder(obs_space, frame_stack, cnn_features)
        self.frame_stack = frame_stack
        self.obs_shape = (frame_stack, *obs_space.shape) if frame_stack > 1 else obs_space.shape
        self.obs_dtype = torch.float32 if self.encoder is None else torch.uint8
        self.rows_at_once = None if self.encoder is None else 1024  # of a rollout; None: all
        num_features = obs_space.shape[0] if self.encoder is None else self.encoder.num_features
        core = (rnn_type, num_features + self.num_prev, rnn_hidden_size, rnn_layers, encoder_sizes, activation)
        self.actor_core = RecurrentCore(*core)
        self.critic_core = None if shared_core else RecurrentCore(*core)
        self.actor = MLP(rnn_hidden_size, self.head.size, hidden_sizes, activation, gain=0.01)
        self.critic = MLP(rnn_hidden_size, 1, hidden_sizes, activation, gain=1.0)
        self.obs_normalizer = make_normalizer(obs_space) if norm_obs else None
        self.reward_normalizer = RewardNormalizer() if norm_reward else None
        self.state_size = self.actor_core.state_size
        self.memory_size = self.num_prev + self.state_size * (1 if shared_core else 2)  # M

    def forward(self, batch: Batch) -> Outputs:
        """Prepared observations `obs` [B, ...], `actions` [B, A] → log π(a|s), entropy, value; each [B].

        The rows are sequences, as `layout` says; what the cores' states were before the first of each is `states`, and
        `previous` [B, ...] the part of the memory that they are told in each row.
        """
        return self.forward_from_features(self.features(batch.obs), batch)

    def forward_from_features(self, features: Tensor, batch: Batch) -> Outputs:
        """`forward` from features [B, ...] on."""
        inputs, states = self.inputs(features, batch.previous), batch.states
        features = values = self.actor_core(inputs, states[:, : self.state_size], batch.layout)  # [B, H]
        if self.critic_core is not None:
            values = self.critic_core(inputs, states[:, self.state_size :], batch.layout)
        params, masks = self.actor(features), batch.columns.get("masks")
        logprobs, entropy = self.head.logprob_and_entropy(params, batch.actions, masks)
        return Outputs(logprobs, entropy, self.critic(values).squeeze(-1))

    def prepare(self, obs: Tensor) -> Tensor:
        """Observations [*, D] or [*, R] as the networks take them."""
        return obs if self.obs_normalizer is None else normalized(self.obs_normalizer, obs)

    def features(self, obs: Tensor) -> Tensor:
        """Inputs of the cores, from prepared observations."""
        return obs if self.encoder is None else self.encoder(obs)

    def inputs(self, features: Tensor, previous: Tensor) -> Tensor:
        """Features [*, ...] with the action and the reward before → what the cores take, [*, I]."""
        return torch.cat((features, previous), -1) if self.num_prev else features

    def previous(self, memory: Tensor) -> Tensor:
        """Part of memories [*, M] that holds the previous action and reward, if the cores take them."""
        return memory[..., : self.num_prev]

    def states(self, memory: Tensor) -> Tensor:
        """Part of memories [*, M] that holds the cores' states."""
        return memory[..., self.num_prev :]

    def act(self, obs: Tensor, memory: Tensor, noise: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws actions [N, A] at raw observations [N, ...], from noise of `head.noise`; and the states after."""
        features, states = self._step(obs, memory)
        return self.head.sample(self.actor(features), noise, masks), states

    def greedy(self, obs: Tensor, memory: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The most likely actions [N, A] at raw observations [N, ...]; and the cores' states after."""
        features, states = self._step(obs, memory)
        return self.head.mode(self.actor(features), masks), states

    def remember(self, actions: Tensor, rewards: Tensor, states: Tensor) -> Tensor:
        """The memory [N, M] after a step with `actions` [N, A] and `rewards` [N] that left the cores in `states`."""
        parts = [self.head.encode(actions)] if self.prev_action else []
        parts += [rewards[:, None]] if self.prev_reward else []
        return torch.cat((*parts, states), -1) if parts else states

    def value(self, obs: Tensor, memory: Tensor) -> Tensor:
        """V [N] at raw observations [N, ...], with the memory of the step before."""
        return self.prepared_value(self.prepare(obs), memory)

    def prepared_value(self, obs: Tensor, memory: Tensor) -> Tensor:
        """V [N] at prepared observations [N, ...], with the memory of the step before."""
        inputs, states = self.inputs(self.features(obs), self.previous(memory)), self.states(memory)
        if self.critic_core is None:
            return self.critic(self.actor_core.step(inputs, states)[0]).squeeze(-1)
        return self.critic(self.critic_core.step(inputs, states[:, self.state_size :])[0]).squeeze(-1)

    def _step(self, obs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The actor's features [N, H], and the states of all cores after this step."""
        inputs = self.inputs(self.features(self.prepare(obs)), self.previous(memory))
        states = self.states(memory)
        features, after = self.actor_core.step(inputs, states[:, : self.state_size])
        if self.critic_core is None:
            return features, after
        return features, torch.cat((after, self.critic_core.step(inputs, states[:, self.state_size :])[1]), -1)


def make_agent(args: Any, envs: Any) -> RecurrentPPOAgent:
    """The agent that `args` describe, for these environments."""
    return RecurrentPPOAgent(
        envs.single_observation_space,
        envs.single_action_space,
        args.rnn_type,
        args.rnn_hidden_size,
        args.rnn_layers,
        args.shared_core,
        args.encoder_sizes,
        args.hidden_sizes,
        args.activation,
        args.prev_action,
        args.prev_reward,
        args.log_std_init,
        args.norm_obs,
        args.norm_reward,
        args.frame_stack,
        args.cnn_features,
    )
