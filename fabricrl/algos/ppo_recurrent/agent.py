"""Actor and critic of PPO with memory: a plain module that knows neither Fabric nor environments."""

from collections.abc import Sequence

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from fabricrl.models.distributions import make_head
from fabricrl.models.models import MLP, RunningNormalizer
from fabricrl.models.recurrent import Layout, RecurrentCore


class RecurrentPPOAgent(nn.Module):
    """Policy and value that remember, over vector observations.

        inputs: obs [*, D] → (normalise), beside (previous action), (previous reward); together [*, I]
        actor:  inputs → core → MLP → head: distribution of actions [*, A]
        critic: inputs → core → MLP → value [*]

    What an environment remembers is one vector [M], zero at the first observation of an episode:

        (previous action) | (previous reward) | state of the actor's core | state of the critic's, unless both share one

    `forward` is the one gradient path. It takes inputs as `inputs` returns them, once a rollout.

    Args:
        obs_size: D.
        action_space: a single environment's, Discrete, MultiDiscrete, MultiBinary or Box.
        prev_action, prev_reward: whether the cores are told the action before, discrete ones as one-hot, and what it
            earned.
        norm_obs, norm_reward: whether there are running statistics; None stands where there are not.

    Raises:
        TypeError: an action space without a distribution.
    """

    def __init__(
        self,
        obs_size: int,
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
    ) -> None:
        super().__init__()
        self.head = make_head(action_space, log_std)
        self.prev_action, self.prev_reward = prev_action, prev_reward
        self.num_prev = prev_action * self.head.encoded_size + prev_reward
        core = (rnn_type, obs_size + self.num_prev, rnn_hidden_size, rnn_layers, encoder_sizes, activation)
        self.actor_core = RecurrentCore(*core)
        self.critic_core = None if shared_core else RecurrentCore(*core)
        self.actor = MLP(rnn_hidden_size, self.head.size, hidden_sizes, activation, gain=0.01)
        self.critic = MLP(rnn_hidden_size, 1, hidden_sizes, activation, gain=1.0)
        self.obs_normalizer = RunningNormalizer(obs_size) if norm_obs else None
        self.reward_normalizer = RunningNormalizer(1) if norm_reward else None
        self.state_size = self.actor_core.state_size
        self.memory_size = self.num_prev + self.state_size * (1 if shared_core else 2)  # M

    def forward(self, inputs: Tensor, actions: Tensor, states: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [B, I], actions [B, A] → log π(a|s), entropy, value; each [B].

        The rows are sequences, as `layout` says; what the cores' states were before the first of each is `states`.
        """
        features = values = self.actor_core(inputs, states[:, : self.state_size], layout)  # [B, H]
        if self.critic_core is not None:
            values = self.critic_core(inputs, states[:, self.state_size :], layout)
        logprobs, entropy = self.head.evaluate(self.actor(features), actions)
        return logprobs, entropy, self.critic(values).squeeze(-1)

    def inputs(self, obs: Tensor, memory: Tensor) -> Tensor:
        """Raw observations [*, D] with the memory [*, M] that was there → what the cores take, [*, I]."""
        prepared = obs if self.obs_normalizer is None else self.obs_normalizer(obs)
        return torch.cat((prepared, memory[..., : self.num_prev]), -1) if self.num_prev else prepared

    def states(self, memory: Tensor) -> Tensor:
        """The part of memories [*, M] that is the cores'."""
        return memory[..., self.num_prev :]

    def act(self, obs: Tensor, memory: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws actions [N, A] at raw observations [N, D], from noise of `head.noise`; and the cores' states after."""
        features, states = self._step(obs, memory)
        return self.head.sample(self.actor(features), noise), states

    def greedy(self, obs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely actions [N, A] at raw observations [N, D]; and the cores' states after."""
        features, states = self._step(obs, memory)
        return self.head.mode(self.actor(features)), states

    def remember(self, actions: Tensor, rewards: Tensor, states: Tensor) -> Tensor:
        """The memory [N, M] after a step with `actions` [N, A] and `rewards` [N] that left the cores in `states`."""
        parts = [self.head.encode(actions)] if self.prev_action else []
        parts += [rewards[:, None]] if self.prev_reward else []
        return torch.cat((*parts, states), -1) if parts else states

    def value(self, obs: Tensor, memory: Tensor) -> Tensor:
        """V [N] at raw observations [N, D], with the memory of the step before."""
        inputs, states = self.inputs(obs, memory), self.states(memory)
        if self.critic_core is None:
            return self.critic(self.actor_core.step(inputs, states)[0]).squeeze(-1)
        return self.critic(self.critic_core.step(inputs, states[:, self.state_size :])[0]).squeeze(-1)

    @torch.no_grad()
    def scale_rewards(self, rewards: Tensor) -> Tensor:
        """Rewards as the critic learns them: divided by the running deviation of the discounted return."""
        return rewards if self.reward_normalizer is None else self.reward_normalizer.scale(rewards)

    def _step(self, obs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The actor's features [N, H], and the states of all cores after this step."""
        inputs, states = self.inputs(obs, memory), self.states(memory)
        features, after = self.actor_core.step(inputs, states[:, : self.state_size])
        if self.critic_core is None:
            return features, after
        return features, torch.cat((after, self.critic_core.step(inputs, states[:, self.state_size :])[1]), -1)
