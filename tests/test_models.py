"""Networks, the running normaliser, and the flat view of parameters."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fabricrl.models.models import ACTIVATIONS, MLP, RunningNormalizer
from fabricrl.utils.model import FlatParameters, parameter_hash
from tests.conftest import on_ranks


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
    torch.testing.assert_close(normalizer.scale(torch.tensor([[4.0, -5.0]])), torch.tensor([[4.0, -0.5]]))
    assert normalizer(torch.tensor([[100.0, -1e6]])).tolist() == [[10.0, -10.0]]
    assert normalizer.scale(torch.tensor([[100.0, -1e6]])).tolist() == [[10.0, -10.0]]


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
    normalizer.scale(torch.randn(5, 3))
    assert parameter_hash(normalizer) == before
    nn.ModuleDict({"inside": fresh}).load_state_dict(nn.ModuleDict({"inside": normalizer}).state_dict())
    assert parameter_hash(fresh) == before
    x = 1000 + torch.randn(5, 3)  # what is loaded also takes effect
    assert torch.equal(fresh(x), normalizer(x))
    assert torch.equal(fresh.scale(x), normalizer.scale(x))


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


def small_network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def test_stepping_the_vector_equals_stepping_the_parameters_one_by_one() -> None:
    network, plain = small_network(), small_network()
    flat = FlatParameters(network)
    ours = torch.optim.Adam([flat.vector], lr=0.01, eps=1e-5)
    theirs = torch.optim.Adam(plain.parameters(), lr=0.01, eps=1e-5)
    for i in range(5):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(i))
        network(x).square().sum().backward()
        flat.collect_gradients()
        nn.utils.clip_grad_norm_([flat.vector], 0.5)
        ours.step()
        theirs.zero_grad()
        plain(x).square().sum().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        theirs.step()
        for a, b in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_making_the_vector_changes_no_value() -> None:
    network, plain = small_network(), small_network()
    flat = FlatParameters(network)
    assert parameter_hash(network) == parameter_hash(plain)
    assert torch.equal(flat.vector.detach(), nn.utils.parameters_to_vector(plain.parameters()))


def test_gradients_are_collected_in_order_and_cleared() -> None:
    network = small_network()
    flat = FlatParameters(network)
    network(torch.randn(6, 3)).sum().backward()
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in network.parameters()])
    flat.collect_gradients()
    assert torch.equal(flat.vector.grad, expected)
    assert all(parameter.grad is None for parameter in network.parameters())
    network(torch.randn(6, 3)).sum().backward()  # nothing of the first backward is left
    second = torch.cat([parameter.grad.reshape(-1) for parameter in network.parameters()])
    flat.collect_gradients()
    assert torch.equal(flat.vector.grad, second)


def test_frozen_parameters_stay_outside_the_vector() -> None:
    network = small_network()
    network[0].bias.requires_grad_(False)
    flat = FlatParameters(network)
    assert flat.vector.numel() == 3 * 8 + 8 * 2 + 2
    before = network[0].bias.clone()
    with torch.no_grad():
        flat.vector += 1
    assert torch.equal(network[0].bias, before)


def test_loading_state_keeps_the_parameters_views_of_the_vector() -> None:
    network, other = small_network(), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    flat = FlatParameters(network)
    network.load_state_dict(other.state_dict())
    assert torch.equal(flat.vector.detach(), nn.utils.parameters_to_vector(other.parameters()))
    with torch.no_grad():
        flat.vector += 1
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs + 1)


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
