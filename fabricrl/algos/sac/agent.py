"""Actor, critics, target critics and temperature of SAC: a plain module that knows neither Fabric nor environments."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fabricrl.models.distributions import TanhNormalHead
from fabricrl.models.models import MLP, EnsembleMLP, RunningNormalizer


class SACAgent(nn.Module):
    """A squashed normal policy and an ensemble of critics over vector observations.

        actor:   obs [*, D] → (normalise) → MLP → μ, log σ → tanh(μ + σ ε): actions [*, A] in (−1, 1)
        critics: obs [B, D] → (normalise), actions [B, A] → ensemble of C → Q values [C, B]

    `policy` and `critics` are what learning evaluates. Both take observations as `prepare` returns them.

    Args:
        obs_size, num_actions: D, A.
        alpha: the first temperature; it is a parameter if `autotune`.
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
        self.obs_normalizer = RunningNormalizer(obs_size) if norm_obs else None

    def prepare(self, obs: Tensor) -> Tensor:
        """Observations as the networks take them: real numbers, normalised."""
        return obs.float() if self.obs_normalizer is None else self.obs_normalizer(obs)

    def policy(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Prepared observations [*, D] and noise of `head.noise` → actions [*, A] and log π(a|s) [*]."""
        return self.head.sample_with_logprob(self.actor(inputs), noise)

    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Draws actions [N, A] at raw observations [N, D]. Only what acting needs."""
        return self.head.sample(self.actor.forward(self.prepare(obs)), noise)

    def greedy(self, obs: Tensor) -> Tensor:
        """The actions without noise, [N, A], at raw observations [N, D]."""
        return self.head.mode(self.actor(self.prepare(obs)))

    @property
    def alpha(self) -> Tensor:
        """The temperature, a scalar without gradient."""
        return self.log_alpha.detach().exp()
