"""Action distributions as heads of a network: the formulas alone, without objects in the hot path.

A head turns `params` [*, size], the output of the actor's last layer, into actions [*, A], and says how likely actions
are. Randomness comes from outside as `noise`, drawn for a whole rollout at once, so that sampling is
a plain function of tensors.

Heads of discrete actions take masks, bool [*, L]: which choices are allowed, those of one variable after those of the
other (`envs.spaces.mask_choices`). An action that is not allowed has probability 0, and never is drawn; probabilities
and entropy are those of the distribution over the others (Huang and Ontañón 2022, arXiv:2006.14171, Section 4).
"""

import math

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Space
from torch import Tensor, nn
from torch.nn import functional as F

UNLIKELY = -1e8  # logit of what has probability 0; finite, so that 0 times it is 0


class CategoricalHead(nn.Module):
    """A independent categorical variables: Discrete (A = 1) and MultiDiscrete. Actions are indices, int64."""

    dtype = torch.int64

    def __init__(self, choices: list[int]) -> None:
        super().__init__()
        self.num_actions, self.size, self.most = len(choices), sum(choices), max(choices)
        self.encoded_size = self.num_actions * self.most
        self.choices, self.uneven = list(choices), len(set(choices)) > 1

    def sample(self, params: Tensor, noise: Tensor, masks: Tensor | None = None) -> Tensor:
        """Gumbel-max: argmax(logits + Gumbel noise) is distributed as softmax(logits)."""
        scores = self._logits(params, masks) + noise
        if masks is not None:  # noise has no largest value
            scores = scores.masked_fill(~self._by_variable(masks, False), -torch.inf)
        return scores.argmax(-1)

    def mode(self, params: Tensor, masks: Tensor | None = None) -> Tensor:
        return self._logits(params, masks).argmax(-1)

    def logprob_and_entropy(
        self, params: Tensor, actions: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log π(a) = Σ_i log softmax(logits_i)[a_i] and H = −Σ_i Σ_k p_ik log p_ik, both [*]."""
        log_probs = F.log_softmax(self._logits(params, masks), dim=-1)  # [*, A, most]
        chosen = log_probs.gather(-1, actions[..., None])
        return chosen.sum((-1, -2)), -(log_probs.exp() * log_probs).sum((-1, -2))

    def encode(self, actions: Tensor) -> Tensor:
        """Actions [*, A] as a network takes them: one-hot, [*, encoded_size]."""
        zeros = torch.zeros(*actions.shape, self.most, device=actions.device)
        return zeros.scatter(-1, actions[..., None], 1.0).flatten(-2)  # F.one_hot looks at values

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard Gumbel noise: −log(E) with E exponential; [*, A, most]."""
        drawn = torch.empty(*shape, self.num_actions, self.most, device=generator.device)
        return -drawn.exponential_(generator=generator).log()

    def _logits(self, params: Tensor, masks: Tensor | None = None) -> Tensor:
        """[*, size] → [*, A, most]; what is not allowed, or pads variables with fewer choices, gets probability 0."""
        if masks is None and not self.uneven:
            return params.view(*params.shape[:-1], self.num_actions, self.most)
        params = params.to(torch.promote_types(params.dtype, torch.float32))  # half precision does not have -1e8
        return self._by_variable(params if masks is None else params.masked_fill(~masks, UNLIKELY), UNLIKELY)

    def _by_variable(self, choices: Tensor, padding: float) -> Tensor:
        """[*, size] → [*, A, most]"""
        if not self.uneven:
            return choices.view(*choices.shape[:-1], self.num_actions, self.most)
        variables = choices.split(self.choices, -1)  # a scatter's backward pass would have to wait for a GPU
        return torch.stack([F.pad(each, (0, self.most - each.shape[-1]), value=padding) for each in variables], -2)


class BernoulliHead(nn.Module):
    """A independent bits: MultiBinary. Actions are 0 or 1, float32."""

    dtype = torch.float32

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.num_actions = self.size = self.encoded_size = num_actions

    def sample(self, params: Tensor, noise: Tensor, masks: Tensor | None = None) -> Tensor:
        """logit + logistic noise > 0 has probability σ(logit)."""
        return (self._logits(params + noise, masks) > 0).float()  # masked last, as noise has no largest value

    def mode(self, params: Tensor, masks: Tensor | None = None) -> Tensor:
        return (self._logits(params, masks) > 0).float()

    def logprob_and_entropy(
        self, params: Tensor, actions: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log π(a) = Σ_i a_i l_i − log(1 + e^l_i) and H = Σ_i log(1 + e^l_i) − l_i σ(l_i), both [*]."""
        params = self._logits(params, masks)
        softplus = F.softplus(params)
        return (actions * params - softplus).sum(-1), (softplus - params * params.sigmoid()).sum(-1)

    def encode(self, actions: Tensor) -> Tensor:
        """Actions as a network takes them: as they are."""
        return actions

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard logistic noise: the difference of two Gumbels."""
        drawn = torch.empty(2, *shape, self.num_actions, device=generator.device)
        first, second = drawn.exponential_(generator=generator).log()
        return first - second

    def _logits(self, params: Tensor, masks: Tensor | None) -> Tensor:
        """[*, A]; `masks` [*, 2 A] hold for each bit whether it may be 0, and whether it may be 1."""
        if masks is None:
            return params
        params = params.to(torch.promote_types(params.dtype, torch.float32))  # half precision does not have -1e8
        may_be_0, may_be_1 = masks.unflatten(-1, (-1, 2)).unbind(-1)
        return params.masked_fill(~may_be_1, UNLIKELY).masked_fill(~may_be_0, -UNLIKELY)


class NormalHead(nn.Module):
    """A independent normal variables with a standard deviation that is learned but does not depend on the state: Box.

    There are no masks. Actions are float32 and unbounded; whoever passes them to an environment clips them.
    """

    dtype = torch.float32

    def __init__(self, num_actions: int, log_std: float = 0.0) -> None:
        super().__init__()
        self.num_actions = self.size = self.encoded_size = num_actions
        self.log_std = nn.Parameter(torch.full((num_actions,), log_std))

    def sample(self, params: Tensor, noise: Tensor, masks: Tensor | None = None) -> Tensor:
        return torch.addcmul(params, self.log_std.exp(), noise)

    def mode(self, params: Tensor, masks: Tensor | None = None) -> Tensor:
        return params

    def logprob_and_entropy(
        self, params: Tensor, actions: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log π(a) = Σ_i −(a_i − μ_i)²/2σ_i² − log σ_i − log √2π, and H = Σ_i 1/2 + log √2π + log σ_i; both [*].

        Finite for |log σ| < 44.
        """
        squares = F.mse_loss(params, actions, reduction="none")
        log_scale = self.log_std.sum()
        constant = self.num_actions * 0.5 * math.log(2 * math.pi)
        entropy = log_scale + (constant + 0.5 * self.num_actions)
        exponents = -0.5 * (squares * (-2 * self.log_std).exp()).sum(-1)
        return exponents - log_scale - constant, entropy.expand(params.shape[:-1])

    def encode(self, actions: Tensor) -> Tensor:
        """Actions as a network takes them: as they were drawn, which is not clipped."""
        return actions

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, self.num_actions, generator=generator, device=generator.device)


class TanhNormalHead(nn.Module):
    """A normal variables squashed by tanh into (−1, 1), with a deviation that depends on the state: bounded Box for
    off-policy algorithms (Haarnoja et al. 2018, arXiv:1812.05905v2, Appendix C).

    `params` [*, 2 A] are means and logarithms of deviations; these are clamped, as in the authors' code.
    """

    dtype = torch.float32

    def __init__(self, num_actions: int, log_std_min: float = -20.0, log_std_max: float = 2.0) -> None:
        super().__init__()
        self.num_actions, self.size = num_actions, 2 * num_actions
        self.log_std_min, self.log_std_max = log_std_min, log_std_max

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """a = tanh(μ + σ ε), [*, A]."""
        mean, log_std = params.chunk(2, -1)
        return torch.tanh(mean + log_std.clamp(self.log_std_min, self.log_std_max).exp() * noise)

    def mode(self, params: Tensor) -> Tensor:
        """tanh(μ): the median, and what everybody calls the greedy action."""
        return torch.tanh(params[..., : self.num_actions])

    def sample_with_logprob(self, params: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """a = tanh(u) with u = μ + σ ε, and

            log π(a) = Σ_i −ε_i²/2 − log σ_i − log √2π − log(1 − tanh²(u_i)).

        The last term is written 2 (log 2 − log(e^u + e^−u)), which is exact also where tanh has saturated.
        Differentiable in `params` through both (reparametrisation); [*, A] and [*].
        """
        mean, log_std = params.to(torch.promote_types(params.dtype, torch.float32)).chunk(2, -1)
        log_std = log_std.clamp(self.log_std_min, self.log_std_max)
        u = mean + log_std.exp() * noise
        terms = 2.0 * torch.logaddexp(u, -u) - log_std - 0.5 * noise.square()
        constant = self.num_actions * (0.5 * math.log(2 * math.pi) + 2.0 * math.log(2.0))
        return torch.tanh(u), terms.sum(-1) - constant

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, self.num_actions, generator=generator, device=generator.device)


Head = CategoricalHead | BernoulliHead | NormalHead


def make_head(space: Space, log_std: float = 0.0) -> Head:
    """The head for a single action space.

    Raises:
        TypeError: the space is none of Discrete, MultiDiscrete, MultiBinary and Box.
    """
    if isinstance(space, Discrete):
        return CategoricalHead([int(space.n)])
    if isinstance(space, MultiDiscrete):
        return CategoricalHead([int(n) for n in space.nvec.reshape(-1)])
    if isinstance(space, MultiBinary):
        return BernoulliHead(int(np.prod(space.shape)))
    if isinstance(space, Box):
        return NormalHead(int(np.prod(space.shape)), log_std)
    raise TypeError(f"no distribution for the action space {space}")
