"""Action heads against torch.distributions: densities, entropies, gradients, and frequencies of what is drawn."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from fabricrl.models.distributions import TanhNormalHead, make_head


class Several:
    """Independent categorical variables with different numbers of choices."""

    def __init__(self, params: Tensor, choices: list[int]) -> None:
        self.parts = [Categorical(logits=logits) for logits in params.split(choices, -1)]

    def log_prob(self, actions: Tensor) -> Tensor:
        return sum(part.log_prob(actions[..., i]) for i, part in enumerate(self.parts))

    def entropy(self) -> Tensor:
        return sum(part.entropy() for part in self.parts)


def normal(params: Tensor) -> Distribution:
    return Independent(Normal(params, torch.full_like(params, -0.5).exp()), 1)


CASES: dict[str, tuple[Space, int, Callable[[Tensor], Distribution | Several]]] = {
    "discrete": (Discrete(4), 4, lambda params: Several(params, [4])),
    "discrete with start": (Discrete(3, start=7), 3, lambda params: Several(params, [3])),
    "even multi-discrete": (MultiDiscrete([3, 3]), 6, lambda params: Several(params, [3, 3])),
    "uneven multi-discrete": (MultiDiscrete([2, 5, 3]), 10, lambda params: Several(params, [2, 5, 3])),
    "matrix of discretes": (MultiDiscrete([[2, 3], [4, 2]]), 11, lambda params: Several(params, [2, 3, 4, 2])),
    "multi-binary": (MultiBinary(3), 3, lambda params: Independent(Bernoulli(logits=params), 1)),
    "matrix of bits": (MultiBinary((2, 2)), 4, lambda params: Independent(Bernoulli(logits=params), 1)),
    "box": (Box(-1, 1, (3,)), 3, normal),
    "matrix box": (Box(-1, 1, (2, 2)), 4, normal),
}


def each_case(function: Callable) -> Callable:
    return pytest.mark.parametrize(("space", "size", "reference"), CASES.values(), ids=CASES.keys())(function)


@each_case
def test_log_probability_entropy_and_their_gradients_are_those_of_torch(
    space: Space, size: int, reference: Callable[[Tensor], Distribution | Several]
) -> None:
    head = make_head(space, -0.5).double()
    assert head.size == size
    generator = torch.Generator().manual_seed(5)
    params = 2 * torch.randn(7, 3, size, generator=generator, dtype=torch.float64)  # two leading dimensions
    actions = head.sample(params, head.noise((7, 3), generator).double()).detach()
    actions = actions.double() if actions.is_floating_point() else actions
    assert actions.shape == (7, 3, head.num_actions)
    ours, theirs = params.clone().requires_grad_(), params.clone().requires_grad_()
    logprobs, entropy = head.logprob_and_entropy(ours, actions)
    distribution = reference(theirs)
    torch.testing.assert_close(logprobs, distribution.log_prob(actions))
    torch.testing.assert_close(entropy.expand(7, 3), distribution.entropy())
    weights = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    (weights * logprobs + entropy).sum().backward()
    (weights * distribution.log_prob(actions) + distribution.entropy()).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.isfinite().all()


@each_case
def test_the_mode_is_the_most_likely_action(
    space: Space, size: int, reference: Callable[[Tensor], Distribution | Several]
) -> None:
    head = make_head(space, -0.5)
    generator = torch.Generator().manual_seed(6)
    params = torch.randn(size, generator=generator)
    best = head.logprob_and_entropy(params, head.mode(params))[0]
    drawn = head.sample(params.expand(500, -1), head.noise((500,), generator))
    assert (head.logprob_and_entropy(params.expand(500, -1), drawn)[0] <= best + 1e-6).all()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def draw(space: Space, params: list[float], number: int, log_std: float = 0.0) -> np.ndarray:
    head = make_head(space, log_std)
    noise = head.noise((number,), torch.Generator().manual_seed(7))
    return head.sample(torch.tensor(params).expand(number, -1), noise).detach().numpy()


# The bounds are the 99.9 % quantile of χ² with so many degrees of freedom; the seed is fixed, so they cannot flicker.
CHI_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 7: 24.32}


def test_categorical_frequencies_are_softmax() -> None:
    logits = [0.0, 1.0, -1.0, 0.5]
    drawn = draw(Discrete(4), logits, 20_000)[:, 0]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert chi_square(np.bincount(drawn, minlength=4), probabilities) < CHI_999[3]


def test_uneven_multi_discrete_draws_each_variable_on_its_own_and_nothing_of_the_padding() -> None:
    logits = [0.0, 1.0, 0.3, -0.7, 0.1]  # two choices, then three
    drawn = draw(MultiDiscrete([2, 3]), logits, 20_000)
    assert drawn[:, 0].max() == 1
    assert drawn[:, 1].max() == 2
    first, second = np.exp(logits[:2]), np.exp(logits[2:])
    joint = np.outer(first / first.sum(), second / second.sum()).reshape(-1)  # independent: the product
    assert chi_square(np.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=6), joint) < CHI_999[5]


def test_bits_are_drawn_independently_with_probability_sigmoid() -> None:
    logits = np.array([0.0, 1.5, -1.0])
    drawn = draw(MultiBinary(3), logits.tolist(), 20_000).astype(int)
    p = 1 / (1 + np.exp(-logits))
    bits = np.array([[code >> i & 1 for i in range(3)] for code in range(8)])
    joint = np.where(bits, p, 1 - p).prod(1)
    assert chi_square(np.bincount(drawn @ [1, 2, 4], minlength=8), joint) < CHI_999[7]


def test_normal_draws_have_the_asked_mean_and_deviation_and_are_independent() -> None:
    drawn = draw(Box(-1, 1, (2,)), [1.0, -2.0], 20_000, log_std=-1.0)
    sigma = np.exp(-1.0)
    np.testing.assert_allclose(drawn.mean(0), [1.0, -2.0], atol=4 * sigma / 20_000**0.5)
    np.testing.assert_allclose(drawn.std(0), [sigma, sigma], rtol=4 / 40_000**0.5)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 4 / 20_000**0.5
    z = (drawn[:, 0] - 1.0) / sigma
    counts = np.histogram(z, [-np.inf, -0.8416, -0.2533, 0.2533, 0.8416, np.inf])[0]  # quintiles of the normal
    assert chi_square(counts, np.full(5, 0.2)) < CHI_999[4]


def test_draws_of_different_rows_are_independent() -> None:
    drawn = draw(Discrete(2), [0.0, 0.0], 20_000)[:, 0]
    pairs = np.bincount(drawn[:-1] * 2 + drawn[1:], minlength=4)
    assert chi_square(pairs, np.full(4, 0.25)) < CHI_999[3]


def test_extreme_logits_stay_finite() -> None:
    for space, params in (
        (Discrete(3), [200.0, -200.0, 0.0]),
        (MultiDiscrete([2, 3]), [300.0, -300.0, 0.0, 200.0, -200.0]),
        (MultiBinary(2), [200.0, -200.0]),
    ):
        head = make_head(space)
        x = torch.tensor([params], requires_grad=True)
        logprobs, entropy = head.logprob_and_entropy(x, head.mode(x))
        (logprobs + entropy).sum().backward()
        assert logprobs.isfinite().all()
        assert entropy.isfinite().all()
        assert x.grad.isfinite().all()
        assert abs(logprobs.item()) < 1e-6
        assert abs(entropy.item()) < 1e-6


def test_the_deviation_of_a_box_is_one_learned_number_per_action() -> None:
    head = make_head(Box(-1, 1, (3,)), -0.5)
    assert head.log_std.tolist() == [-0.5, -0.5, -0.5]
    params, actions = torch.randn(6, 3), torch.randn(6, 3)
    logprobs, entropy = head.logprob_and_entropy(params, actions)
    (logprobs.sum() + entropy.sum()).backward()
    # d log π / d log σ = z² − 1, d H / d log σ = 1 for each of the six rows
    z = (actions - params) / np.exp(-0.5)
    torch.testing.assert_close(head.log_std.grad, (z.square() - 1 + 1).sum(0))


def test_a_space_without_a_distribution_is_refused() -> None:
    with pytest.raises(TypeError, match="Dict"):
        make_head(Dict({"a": Discrete(2)}))


def squashed(params: Tensor, low: float = -20.0, high: float = 2.0) -> TransformedDistribution:
    """The squashed normal of torch, which takes logarithms of 1 − tanh² of what it has drawn itself."""
    mean, log_std = params.chunk(2, -1)
    normal = Normal(mean, log_std.clamp(low, high).exp())
    return TransformedDistribution(normal, [TanhTransform(cache_size=1)])


def exact_logprob(mean: list[float], log_std: list[float], noise: list[float]) -> float:
    """log π(tanh u), u = μ + σ ε, with log(1 − tanh² u) = log 4 − 2 |u| − 2 log(1 + e^(−2 |u|)), in float64."""
    total = 0.0
    for m, s, e in zip(mean, log_std, noise, strict=True):
        u = abs(m + math.exp(s) * e)
        squash = math.log(4) - 2 * u - 2 * math.log1p(math.exp(-2 * u))
        total += -0.5 * e * e - s - 0.5 * math.log(2 * math.pi) - squash
    return total


def squashed_params(generator: torch.Generator, *shape: int) -> Tensor:
    """Means up to ±3 or so, and log-deviations of which some lie beyond both of the bounds −20 and 2."""
    mean = 1.5 * torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    log_std = -0.5 + torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    log_std[..., 0, 0], log_std[..., 1, 1] = 2.7, -23.0
    return torch.cat((mean, log_std), -1)


def test_squashed_log_probability_and_its_gradients_are_those_of_torch() -> None:
    head, generator = TanhNormalHead(3), torch.Generator().manual_seed(5)
    params = squashed_params(generator, 6, 4)  # two leading dimensions
    noise = head.noise((6, 4), generator).double()
    ours, theirs = params.clone().requires_grad_(), params.clone().requires_grad_()
    actions, logprobs = head.sample_with_logprob(ours, noise)
    distribution = squashed(theirs)
    mean, log_std = theirs.chunk(2, -1)
    drawn = distribution.transforms[0](mean + log_std.clamp(-20, 2).exp() * noise)
    expected = distribution.log_prob(drawn).sum(-1)
    assert actions.shape == (6, 4, 3)
    assert logprobs.shape == (6, 4)
    torch.testing.assert_close(actions, drawn)
    # Theirs loses seven digits where σ is e^-20 and ε = (u − μ)/σ is computed back
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-7)
    weights = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    pulls = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64)
    ((weights * logprobs).sum() + (pulls * actions).sum()).backward()
    ((weights * expected).sum() + (pulls * drawn).sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)
    for grad in (ours.grad, theirs.grad):  # no pull on what is clamped
        assert not grad[..., 0, 3].any()
        assert not grad[..., 1, 4].any()
    assert ours.grad[..., 0, 0].all()  # but on the mean beside it


def test_squashed_log_probability_of_actions_that_have_saturated() -> None:
    head = TanhNormalHead(2)
    for u in (0.0, 1e-3, 1.0, 5.0, 9.0, 9.9, 10.1, 15.0, 20.0, 25.0, 60.0, 400.0):
        for sign in (1.0, -1.0):
            mean, log_std, noise = [sign * u, 0.3], [-1.0, 0.5], [0.0, -1.2]
            exact = exact_logprob(mean, log_std, noise)
            actions, logprob = head.sample_with_logprob(
                torch.tensor([mean + log_std], dtype=torch.float64), torch.tensor([noise], dtype=torch.float64)
            )
            assert logprob.item() == pytest.approx(exact, rel=1e-9, abs=1e-8), u
            actions, logprob = head.sample_with_logprob(torch.tensor([mean + log_std]), torch.tensor([noise]))
            assert logprob.item() == pytest.approx(exact, rel=1e-6, abs=2e-6), u  # float32, where 1 − tanh² is 0
            assert actions.abs().max() <= 1


def test_squashed_gradients_equal_finite_differences() -> None:
    head, generator = TanhNormalHead(3), torch.Generator().manual_seed(8)
    params = squashed_params(generator, 3, 2).requires_grad_()
    noise, function = head.noise((3, 2), generator).double(), head.sample_with_logprob
    assert torch.autograd.gradcheck(lambda p: function(p, noise), (params,), atol=1e-7)
    assert torch.autograd.gradcheck(lambda p: function(p, noise)[0], (params,), atol=1e-7)  # one of the outputs alone
    assert torch.autograd.gradcheck(lambda p: function(p, noise)[1], (params,), atol=1e-7)
    saturated = torch.tensor([[25.0, -40.0, 8.0, -1.0, -0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: function(p, noise), (saturated,), atol=1e-7)
    # There log π grows as 2 |u|: ∂/∂μ = ±2 and ∂/∂log σ = ±2 σ ε − 1
    function(saturated, noise)[1].sum().backward()
    sigma = math.exp(-1.0)
    assert saturated.grad[0, 0].item() == pytest.approx(2.0)
    assert saturated.grad[0, 1].item() == pytest.approx(-2.0)
    assert saturated.grad[0, 3].item() == pytest.approx(2 * sigma * 0.5 - 1)


def test_log_deviations_are_clamped_to_the_given_bounds() -> None:
    head = TanhNormalHead(1, log_std_min=-1.0, log_std_max=0.5)
    noise = torch.tensor([[0.7]])
    for given, used in ((-3.0, -1.0), (-0.5, -0.5), (2.0, 0.5)):
        inside = head.sample_with_logprob(torch.tensor([[0.2, used]]), noise)
        for ours, theirs in zip(head.sample_with_logprob(torch.tensor([[0.2, given]]), noise), inside, strict=True):
            assert torch.equal(ours, theirs)
        u = 0.2 + math.exp(used) * 0.7
        assert inside[0].item() == pytest.approx(math.tanh(u), rel=1e-6)
        assert head.sample(torch.tensor([[0.2, given]]), noise).item() == pytest.approx(math.tanh(u), rel=1e-6)


def test_a_squashed_density_integrates_to_one() -> None:
    head = TanhNormalHead(1)
    for mean, log_std in ((0.0, -0.5), (0.8, -1.0), (-1.5, 0.0)):
        noise = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
        params = torch.tensor([mean, log_std], dtype=torch.float64).expand(len(noise), -1)
        actions, logprobs = head.sample_with_logprob(params, noise)
        mass = torch.trapezoid(logprobs.exp(), actions[:, 0])
        assert mass.item() == pytest.approx(1.0, abs=1e-5)


def test_squashed_actions_are_the_same_with_and_without_log_probability_and_the_mode_has_no_noise() -> None:
    head, generator = TanhNormalHead(3), torch.Generator().manual_seed(9)
    assert head.size == 6
    params = squashed_params(generator, 5, 2).float()
    noise = head.noise((5, 2), generator)
    assert noise.shape == (5, 2, 3)
    assert torch.equal(head.sample(params, noise), head.sample_with_logprob(params, noise)[0])
    torch.testing.assert_close(head.mode(params), params[..., :3].tanh())
    assert torch.equal(head.mode(params), head.sample(params, torch.zeros(5, 2, 3)))


def test_squashed_log_probabilities_of_half_precision_are_computed_in_full() -> None:
    head, generator = TanhNormalHead(3), torch.Generator().manual_seed(9)
    params, noise = squashed_params(generator, 5, 2).bfloat16().requires_grad_(), head.noise((5, 2), generator)
    for ours, theirs in zip(
        head.sample_with_logprob(params, noise), head.sample_with_logprob(params.float(), noise), strict=True
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    head.sample_with_logprob(params, noise)[1].sum().backward()
    assert params.grad.dtype == torch.bfloat16


def test_squashed_draws_have_the_quantiles_of_the_normal_and_are_independent() -> None:
    head = TanhNormalHead(2)
    params = torch.tensor([0.3, -0.5, -1.0, 0.2])
    drawn = head.sample(params.expand(20_000, -1), head.noise((20_000,), torch.Generator().manual_seed(7))).numpy()
    quintiles = np.array([-np.inf, -0.8416, -0.2533, 0.2533, 0.8416, np.inf])
    cells = []
    for i, (mean, log_std) in enumerate(((0.3, -1.0), (-0.5, 0.2))):
        cells.append(np.searchsorted(np.tanh(mean + math.exp(log_std) * quintiles[1:-1]), drawn[:, i]))
        assert chi_square(np.bincount(cells[-1], minlength=5), np.full(5, 0.2)) < CHI_999[4]
    assert chi_square(np.bincount(cells[0] * 5 + cells[1], minlength=25), np.full(25, 0.04)) < 51.2
