"""Actor, critics, target critics and temperature of SAC: a plain module that knows neither Fabric nor environments."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from fabricrl.models.distributions import TanhNormalHead
from fabricrl.models.models import MLP, EnsembleMLP, RunningNormalizer
from fabricrl.utils.batch import Batch

ACTION_SPACES = (Box,)


class SACAgent(nn.Module):
    """A squashed normal policy and an ensemble of critics over vector observations.

        actor:   obs [*, D] → (normalise) → MLP → μ, log σ → tanh(μ + σ ε): actions [*, A] in (−1, 1)
        critics: obs [B, D] → (normalise), actions [B, A] → ensemble of C → Q values [C, B]

    `actor` and `critics` are what learning evaluates. Both take observations as `prepare` returns them.

    Args:
        obs_size, num_actions: D, A.
        alpha: the first temperature, which learns if `autotune`, and else stays, whatever a checkpoint says;
            target_entropy: what it aims at; None: −A.
        norm_obs: whether there are running statistics; None stands where there are not.
        dropout, layer_norm: of the critics and their targets (DroQ).
    """

    def __init__(
        self,
        obs_size: int,
        num_actions: int,
        hidden_sizes: Sequence[int] = (256, 256),
        activation: str = "relu",
        num_critics: int = 2,
        alpha: float = 1.0,
        autotune: bool = True,
        target_entropy: float | None = None,
        norm_obs: bool = False,
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.head = TanhNormalHead(num_actions)
        self.actor = MLP(obs_size, self.head.size, hidden_sizes, activation)
        self.critics = EnsembleMLP(num_critics, obs_size + num_actions, hidden_sizes, activation, dropout, layer_norm)
        self.target_critics = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)), requires_grad=autotune)
        self.target_entropy = -float(num_actions) if target_entropy is None else target_entropy
        self.obs_normalizer = RunningNormalizer(obs_size) if norm_obs else None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes parameters and statistics, but for a fixed temperature: that is an argument."""
        kept = {} if self.log_alpha.requires_grad else {"log_alpha": self.log_alpha.detach()}
        return super().load_state_dict({**state_dict, **kept}, strict, assign)

    def prepare(self, obs: Tensor) -> Tensor:
        """Observations as the networks take them: real numbers, normalised."""
        return obs.float() if self.obs_normalizer is None else self.obs_normalizer(obs)

    def prepared(self, batch: Batch) -> Batch:
        """A batch of replay with its observations as the networks take them."""
        return batch.with_columns(obs=self.prepare(batch.obs), next_obs=self.prepare(batch.next_obs))

    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Draws actions [N, A] at raw observations [N, D]. Only what acting needs."""
        return self.head.sample(self.actor(self.prepare(obs)), noise)

    def greedy(self, obs: Tensor) -> Tensor:
        """The actions without noise, [N, A], at raw observations [N, D]."""
        return self.head.mode(self.actor(self.prepare(obs)))

    @property
    def alpha(self) -> Tensor:
        """The temperature, a scalar without gradient."""
        return self.log_alpha.detach().exp()


def make_agent(args: Any, envs: Any, kind: type[SACAgent] = SACAgent, **more: Any) -> SACAgent:
    """The agent that `args` describe, for these environments; `more` is what its `kind` needs besides."""
    (obs_size,) = envs.single_observation_space.shape
    num_actions = int(np.prod(envs.single_action_space.shape))
    return kind(
        obs_size,
        num_actions,
        args.hidden_sizes,
        args.activation,
        args.num_critics,
        args.alpha,
        args.autotune,
        args.target_entropy,
        args.norm_obs,
        **more,
    )
