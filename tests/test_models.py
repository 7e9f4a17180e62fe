"""Networks, the running normalisers, and dropout."""

import copy
import math
import pickle
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fabricrl.models import models
from fabricrl.models.models import ACTIVATIONS, MLP, DropoutMasks, EnsembleMLP, RewardNormalizer, RunningNormalizer
from fabricrl.utils import model
from fabricrl.utils.model import frozen, parameter_hash, polyak_update
from fabricrl.utils.optimizer import Adam
from tests.conftest import SINGLE, on_ranks

MODULES = [("relu", nn.ReLU), ("tanh", nn.Tanh), ("silu", nn.SiLU), ("elu", nn.ELU)]


def batches(seed: int, *sizes: int) -> list[torch.Tensor]:
    """Batches whose mean and spread drift, far from zero, where naive formulas cancel."""
    generator = torch.Generator().manual_seed(seed)
    return [1000 + i + (1 + i) * torch.randn(n, 3, generator=generator) for i, n in enumerate(sizes)]


def test_running_statistics_equal_numpy_over_all_batches_together() -> None:
    normalizer, parts = RunningNormalizer(3), batches(1, 5, 40, 1, 17)
    for i, part in enumerate(parts):
        normalizer.update(part)
        seen = torch.cat(parts[: i + 1]).double().numpy()
        np.testing.assert_allclose(normalizer.mean, seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(normalizer.var, seen.var(0), rtol=1e-9, atol=1e-9)
        assert normalizer.count.item() == len(seen)


def test_running_statistics_take_batches_with_several_leading_dimensions() -> None:
    whole, folded = RunningNormalizer(3), RunningNormalizer(3)
    (batch,) = batches(2, 24)
    whole.update(batch)
    folded.update(batch.view(4, 6, 3))
    assert torch.equal(whole.mean, folded.mean)
    assert torch.equal(whole.var, folded.var)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_to_the_last_bit_and_equal_numpy_over_all_their_batches(world_size: int) -> None:
    shares = [batches(10 + rank, 8, 30) for rank in range(world_size)]

    def normalize(fabric: Any) -> RunningNormalizer:
        normalizer = RunningNormalizer(3)
        for batch in shares[fabric.global_rank]:
            normalizer.update(batch, fabric)
        return normalizer

    normalizers = on_ranks(world_size, normalize)
    seen = torch.cat([batch for share in shares for batch in share]).double().numpy()
    for normalizer in normalizers:
        np.testing.assert_allclose(normalizer.mean, seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(normalizer.var, seen.var(0), rtol=1e-9)
        assert normalizer.count.item() == len(seen)
        assert parameter_hash(normalizer) == parameter_hash(normalizers[0])


def test_normalising_subtracts_the_mean_divides_by_the_deviation_and_clips() -> None:
    normalizer = RunningNormalizer(2)
    normalizer.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # means 2 and 20, deviations 1 and 10
    torch.testing.assert_close(normalizer(torch.tensor([[4.0, 5.0]])), torch.tensor([[2.0, -1.5]]))
    assert normalizer(torch.tensor([[100.0, -1e6]])).tolist() == [[10.0, -10.0]]


def test_before_the_first_batch_and_for_constant_numbers_the_output_is_finite() -> None:
    normalizer = RunningNormalizer(2)
    torch.testing.assert_close(normalizer(torch.tensor([[0.5, -0.5]])), torch.tensor([[0.5, -0.5]]))
    normalizer.update(torch.full((10, 2), 7.0))
    assert normalizer(torch.tensor([[7.0, 7.0]])).tolist() == [[0.0, 0.0]]


def test_statistics_are_saved_with_the_module_and_change_in_update_alone() -> None:
    normalizer, fresh = RunningNormalizer(3), RunningNormalizer(3)
    normalizer.update(batches(3, 9)[0])
    before = parameter_hash(normalizer)
    normalizer(torch.randn(5, 3))
    assert parameter_hash(normalizer) == before
    nn.ModuleDict({"inside": fresh}).load_state_dict(nn.ModuleDict({"inside": normalizer}).state_dict())
    assert parameter_hash(fresh) == before
    x = 1000 + torch.randn(5, 3)  # what is loaded also takes effect
    assert torch.equal(fresh(x), normalizer(x))


def rollout(seed: int, steps: int = 6, envs: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, dones and skipped steps, [T, N] each; a step that only resets comes behind an end, and counts as one."""
    rng = torch.Generator().manual_seed(seed)
    rewards, dones = torch.randn(steps, envs, generator=rng), torch.rand(steps, envs, generator=rng) < 0.3
    skipped = torch.zeros_like(dones)
    skipped[1:] = dones[:-1]
    return rewards * ~skipped, dones | skipped, skipped


def test_rewards_are_divided_by_the_deviation_of_the_discounted_returns_of_all_rollouts() -> None:
    normalizer, running, returns = RewardNormalizer(), np.zeros(2), []
    for seed in range(3):
        rewards, dones, skipped = rollout(seed)
        scaled = normalizer.scale(rewards, dones, ~skipped, 0.9, SINGLE)
        for t in range(len(rewards)):
            running = rewards[t].double().numpy() + 0.9 * running
            returns += running[~skipped[t].numpy()].tolist()
            running *= ~dones[t].numpy()
        np.testing.assert_allclose(scaled, (rewards / np.std(returns)).clamp(-10, 10), rtol=1e-5)
    assert normalizer.count.item() == len(returns)


def test_scaled_rewards_are_clipped_and_keep_their_sign() -> None:
    normalizer, never = RewardNormalizer(), torch.zeros(50, 1, dtype=torch.bool)
    rewards = torch.zeros(50, 1)
    rewards[3], rewards[40] = 1e3, -1e-3
    scaled = normalizer.scale(rewards, ~never, None, 0.9, SINGLE)
    assert scaled[3].item() == pytest.approx(1 / (0.02 * 0.98) ** 0.5, rel=1e-3)  # the deviation of one in fifty
    assert scaled[40].item() == pytest.approx(-1e-6 / (0.02 * 0.98) ** 0.5, rel=1e-3)
    normalizer.var.fill_(1e-6)
    normalizer.count.fill_(1e12)
    assert normalizer.scale(rewards, ~never, None, 0.9, SINGLE)[3].item() == 10.0


def test_ranks_scale_rewards_as_one_rank_with_all_environments() -> None:
    rewards, dones, skipped = rollout(5, envs=6)
    parts = on_ranks(
        3,
        lambda fabric: RewardNormalizer().scale(
            *(column.chunk(3, 1)[fabric.global_rank] for column in (rewards, dones, ~skipped)), 0.9, fabric
        ),
    )
    torch.testing.assert_close(torch.cat(parts, 1), RewardNormalizer().scale(rewards, dones, ~skipped, 0.9, SINGLE))


def test_the_discounted_return_so_far_is_not_stored() -> None:
    normalizer, fresh = RewardNormalizer(), RewardNormalizer()
    normalizer.scale(*rollout(6), 0.9, SINGLE)
    fresh.load_state_dict(normalizer.state_dict())
    assert fresh.discounted is None
    assert parameter_hash(fresh) == parameter_hash(normalizer)


@pytest.mark.parametrize("gain", [0.01, 1.0])
def test_layers_start_orthogonal_with_their_gains_and_zero_biases(gain: float) -> None:
    network = MLP(6, 3, (16, 16), gain=gain)
    for layer, expected in [*((layer, math.sqrt(2)) for layer in network.hidden), (network.out, gain)]:
        weight = layer.weight.detach().double()
        short = weight if weight.shape[0] <= weight.shape[1] else weight.T  # its rows are orthogonal
        identity = torch.eye(len(short), dtype=torch.float64)
        torch.testing.assert_close(short @ short.T, expected**2 * identity, atol=1e-5, rtol=1e-5)
        assert not layer.bias.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_network_is_layers_with_activations_between_but_not_after(activation: str) -> None:
    network = MLP(4, 2, (5, 7), activation)
    modules = {"tanh": nn.Tanh(), "relu": nn.ReLU(), "elu": nn.ELU(), "silu": nn.SiLU()}
    first, second = network.hidden
    plain = nn.Sequential(first, modules[activation], second, modules[activation], network.out)
    x = 3 * torch.randn(8, 4)
    torch.testing.assert_close(network(x), plain(x))


def separate(ensemble: EnsembleMLP, member: int, activation: type[nn.Module], norm: bool = False) -> nn.Sequential:
    """One network of an ensemble, made of torch's layers with copies of its parameters."""
    layers: list[nn.Module] = []
    for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
        linear = nn.Linear(*weight.shape[1:])
        linear.weight.data.copy_(weight[member].T)
        linear.bias.data.copy_(bias[member, 0])
        layers.append(linear)
        if i == len(ensemble.hidden_sizes):
            return nn.Sequential(*layers)
        if norm:
            layers.append(nn.LayerNorm(weight.shape[2]))
            layers[-1].weight.data.copy_(ensemble.scales[i][member, 0])
            layers[-1].bias.data.copy_(ensemble.shifts[i][member, 0])
        layers.append(activation())
    raise AssertionError("an ensemble has an output layer")


def gradients(ensemble: EnsembleMLP, member: int) -> list[torch.Tensor]:
    """Those of one network, as `separate` orders its parameters."""
    found = []
    for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
        found += [weight.grad[member].T, bias.grad[member, 0]]
        if i < len(ensemble.scales):
            found += [ensemble.scales[i].grad[member, 0], ensemble.shifts[i].grad[member, 0]]
    return found


def shaken(ensemble: EnsembleMLP) -> EnsembleMLP:
    """With parameters that have nothing special: no zero biases, no unit scales."""
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return ensemble


def test_layers_are_called_as_what_has_become_of_them() -> None:
    network, x, seen = MLP(3, 2, (4, 4)), torch.randn(5, 3), []
    before = network(x)
    network.hidden[0].register_forward_hook(lambda layer, inputs, output: seen.append(output) or output + 1)
    network.out.register_full_backward_hook(lambda layer, inputs, outputs: seen.append(outputs))
    after = network(x)
    assert len(seen) == 1
    assert not torch.equal(after, before)
    after.sum().backward()
    assert len(seen) == 2
    nn.utils.parametrizations.weight_norm(network.out)
    torch.testing.assert_close(network(x), after)
    network.out.parametrizations.weight.original0.data.mul_(2)
    torch.testing.assert_close(network(x), 2 * after)
    network.out = nn.Identity()
    assert network(x).shape == (5, 4)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "layer norm"])
@pytest.mark.parametrize(("activation", "module"), MODULES)
@pytest.mark.parametrize(("count", "hidden"), [(1, (7,)), (3, (8, 5)), (2, ())])
def test_an_ensemble_is_so_many_separate_networks_in_outputs_and_gradients(
    count: int, hidden: tuple[int, ...], activation: str, module: type[nn.Module], norm: bool
) -> None:
    ensemble = shaken(EnsembleMLP(count, 4, hidden, activation, layer_norm=norm))
    x = torch.randn(6, 4, requires_grad=True)
    weights = torch.randn(count, 6)  # so that no two outputs pull alike
    given = x.detach().clone()
    outputs = ensemble(x)
    outputs.backward(weights)
    assert torch.equal(x, given)  # activations work in place
    assert outputs.shape == (count, 6)
    input_gradient = torch.zeros(6, 4)
    for member in range(count):
        plain, y = separate(ensemble, member, module, norm), x.detach().requires_grad_()
        output = plain(y)[:, 0]
        torch.testing.assert_close(outputs[member], output)
        (weights[member] * output).sum().backward()
        input_gradient += y.grad
        for ours, theirs in zip(gradients(ensemble, member), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, input_gradient, rtol=1e-4, atol=1e-5)


def test_inputs_of_an_ensemble_may_come_in_parts() -> None:
    ensemble, obs, actions = shaken(EnsembleMLP(3, 6, (8,))), torch.randn(5, 4), torch.randn(5, 2)
    assert torch.equal(ensemble(obs, actions), ensemble(torch.cat((obs, actions), -1)))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "layer norm"])
def test_through_a_frozen_ensemble_inputs_have_a_gradient_found_without_one_of_a_weight(norm: bool) -> None:
    ensemble, seen = shaken(EnsembleMLP(3, 4, (8, 5), layer_norm=norm)), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if "bmm" in function.name():
                seen.add(tuple(result.shape))
            return result

    x, weights, found = torch.randn(6, 4, requires_grad=True), {tuple(w.shape) for w in ensemble.weights[:-1]}, []
    for freezes in (True, False):
        seen.clear()
        with frozen(ensemble) if freezes else nullcontext():
            outputs = ensemble(x)
        with Watch():
            outputs.sum().backward()
        assert seen & weights == (set() if freezes else weights)
        assert all((parameter.grad is None) == freezes for parameter in ensemble.parameters())
        found.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*found)


def test_thawing_leaves_alone_what_was_frozen_before_and_happens_after_an_error_too() -> None:
    network = MLP(3, 2, (4,))
    network.out.bias.requires_grad_(False)

    def fail() -> None:
        with frozen(network):
            assert not any(parameter.requires_grad for parameter in network.parameters())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["out.bias"]


def test_targets_move_towards_their_source_by_tau() -> None:
    target, source = MLP(3, 2, (4,)), MLP(3, 2, (4,))
    expected = [0.9 * a + 0.1 * b for a, b in zip(target.parameters(), source.parameters(), strict=True)]
    before = parameter_hash(source)
    polyak_update(target, source, 0.1)
    for parameter, value in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)
    assert parameter_hash(source) == before
    polyak_update(target, source, 1.0)
    assert parameter_hash(target) == before


def test_targets_move_in_parts_as_they_do_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Conv2d(4, 3, 3), nn.Linear(3, 7), nn.Linear(1, 1)
    source = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    source.register_parameter("scalar", nn.Parameter(torch.tensor(0.5)))
    whole, divided = (shaken(copy.deepcopy(source)) for _ in range(2))
    divided.load_state_dict(whole.state_dict())
    Adam(source.parameters(), 0.1)  # which lays its parameters out otherwise than those of their targets
    polyak_update(whole, source, 0.1)
    monkeypatch.setattr(model, "_go_in_parts", lambda parameter: True)
    monkeypatch.setattr(model, "PART", 5)
    polyak_update(divided, source, 0.1)
    for (name, one), other in zip(whole.named_parameters(), divided.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "layer norm"])
def test_dropout_is_a_mask_behind_the_product_and_what_stays_is_scaled_up(norm: bool) -> None:
    rate, rows, count = 0.2, 5, 2
    ensemble = shaken(EnsembleMLP(count, 4, (8, 6), "relu", rate, norm))
    x, masks = torch.randn(rows, 4, requires_grad=True), [torch.rand(count, rows, width) >= rate for width in (8, 6)]
    pulls = torch.randn(count, rows)
    outputs = ensemble(x, kept=masks)
    outputs.backward(pulls)
    ours = [gradients(ensemble, member) for member in range(count)]
    input_gradient = torch.zeros(rows, 4)
    for member in range(count):
        y = x.detach().requires_grad_()
        network, hidden = separate(ensemble, member, nn.ReLU, norm), y
        layers = iter(network)
        for mask in masks:  # Linear → Dropout → (LayerNorm) → ReLU
            hidden = next(layers)(hidden) * mask[member] / (1 - rate)
            hidden = next(layers)(hidden) if norm else hidden
            hidden = next(layers)(hidden)
        output = next(layers)(hidden)[:, 0]
        torch.testing.assert_close(outputs[member], output)
        (pulls[member] * output).sum().backward()
        input_gradient += y.grad
        for gradient, parameter in zip(ours[member], network.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, input_gradient, rtol=1e-4, atol=1e-5)
    plain_outputs = ensemble(x)  # nothing is dropped unless it is said what
    assert not torch.allclose(plain_outputs, outputs)
    torch.testing.assert_close(plain_outputs[0], separate(ensemble, 0, nn.ReLU, norm)(x)[:, 0])


def test_gradients_through_dropout_and_layer_norm_are_those_of_finite_differences() -> None:
    ensemble = shaken(EnsembleMLP(2, 3, (5, 4), "tanh", 0.3, layer_norm=True)).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    masks = DropoutMasks(0.3).draw(2 * 6 * 9, torch.Generator().manual_seed(3))
    kept = [mask.view(2, 6, -1) for mask in masks.split([60, 48])]
    assert all(0 < mask.mean() < 1 for mask in kept)
    assert torch.autograd.gradcheck(lambda x, *_: ensemble(x, kept=kept), (x, *ensemble.parameters()))


def test_the_networks_of_an_ensemble_start_differently_each_as_an_mlp_does() -> None:
    ensemble = EnsembleMLP(3, 16, (16, 16), layer_norm=True)
    identity = torch.eye(16)
    for weight in ensemble.weights[:2]:
        for member in weight.detach():
            torch.testing.assert_close(member @ member.T, 2 * identity, atol=1e-5, rtol=1e-5)  # gain √2
        assert not torch.allclose(weight[0], weight[1], atol=0.1)
    torch.testing.assert_close(ensemble.weights[2].detach().square().sum(1), torch.ones(3, 1))
    assert not any(bias.any() for bias in ensemble.biases)
    assert all((scale == 1).all() for scale in ensemble.scales)
    assert not any(shift.any() for shift in ensemble.shifts)


def test_a_copy_of_an_ensemble_has_parameters_of_its_own() -> None:
    ensemble = shaken(EnsembleMLP(2, 4, (8,), layer_norm=True))
    twin, x = copy.deepcopy(ensemble), torch.randn(5, 4)
    before = ensemble(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter *= 1.5
    assert torch.equal(ensemble(x), before)
    assert not torch.allclose(twin(x), before)
    ensemble.load_state_dict(twin.state_dict())
    assert torch.equal(ensemble(x), twin(x))


def dropped(masks: DropoutMasks, count: int, generator: torch.Generator) -> np.ndarray:
    """1 where a new mask is 0, which is where units are dropped."""
    mask = masks.draw(count, generator)
    assert mask.shape == (count,)
    assert mask.dtype == torch.float32
    return 1 - mask.numpy().astype(int)


# Bounds of four to five standard deviations; the seeds are fixed, so they cannot flicker.
@pytest.mark.parametrize(("rate", "layers", "units"), [(0.01, 40, 5000), (0.5, 20, 1000), (0.9, 10, 2000)])
def test_every_unit_is_dropped_with_the_rate_independently_of_the_others(rate: float, layers: int, units: int) -> None:
    total, variance = layers * units, rate * (1 - rate)
    mask = dropped(DropoutMasks(rate), total, torch.Generator().manual_seed(1)).reshape(layers, units)
    assert mask.mean() == pytest.approx(rate, abs=4 * (variance / total) ** 0.5)
    # Counts of layers and of positions vary as those of independent units do
    for counts, trials in ((mask.sum(1), units), (mask.sum(0), layers)):
        expected = trials * variance
        ratio = ((counts - trials * rate) ** 2).mean() / expected
        assert ratio == pytest.approx(1.0, abs=5 * (max(2.0, 1 / expected) / len(counts)) ** 0.5)
    centred = mask - rate
    flat = centred.reshape(-1)
    for lag in (1, 2, 3, units):  # neighbours, across the borders of layers, and the same unit of the next layer
        correlation = (flat[:-lag] * flat[lag:]).mean() / variance
        assert abs(correlation) < 4.5 / (total - lag) ** 0.5, lag


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5, 0.99])
def test_dropping_from_tiny_layers_is_as_likely_as_it_should_be(rate: float) -> None:
    generator, times, drawn = torch.Generator().manual_seed(2), 4000, DropoutMasks(rate)
    masks = np.stack([dropped(drawn, 4, generator) for _ in range(times)])
    bits = np.array([[code >> i & 1 for i in range(4)] for code in range(16)])
    expected = times * np.where(bits, rate, 1 - rate).prod(1)
    counts = np.bincount(masks @ [1, 2, 4, 8], minlength=16)
    assert (abs(counts - expected) < 4.5 * expected**0.5 + 2).all()


def test_where_one_draw_does_not_reach_the_end_another_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.math, "ceil", lambda number: 3)  # gaps at a time
    mask = dropped(DropoutMasks(0.2), 2000, torch.Generator().manual_seed(4))
    for half in (mask[:1000], mask[1000:]):
        assert half.mean() == pytest.approx(0.2, abs=4 * (0.16 / 1000) ** 0.5)


@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_masks_depend_on_the_generator_alone_and_not_on_those_before(rate: float) -> None:
    """They are drawn in the memory of the last ones, of which nothing may be left, whatever their size was."""
    masks, rng, twin = DropoutMasks(rate), torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for count in (400, 400, 30, 5000, 5000, 5000):
        assert torch.equal(masks.draw(count, rng), DropoutMasks(rate).draw(count, twin))
    first, second = (masks.draw(5000, rng).clone() for _ in range(2))
    assert (first != second).any()


def test_networks_can_be_pickled() -> None:
    for network in (MLP(3, 2, (4,), "silu"), EnsembleMLP(2, 3, (4,), "elu")):
        twin, x = pickle.loads(pickle.dumps(network)), torch.randn(5, 3)
        assert torch.equal(twin(x), network(x))


def test_hash_tells_any_parameter_or_buffer_apart() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    same = copy.deepcopy(network)
    assert parameter_hash(network) == parameter_hash(same)
    with torch.no_grad():
        same[0].weight[0, 0] = torch.nextafter(same[0].weight[0, 0], torch.tensor(9.0))
    assert parameter_hash(network) != parameter_hash(same)
    same = copy.deepcopy(network)
    same[1].running_mean[1] = 0.5
    assert parameter_hash(network) != parameter_hash(same)
    same = copy.deepcopy(network)
    same[1].num_batches_tracked += 1
    assert parameter_hash(network) != parameter_hash(same)
