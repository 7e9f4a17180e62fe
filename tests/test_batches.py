"""Minibatches: each row once an epoch, of a fixed shape, weighed and normalised as one rank with all rows would."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fabricrl.data import Batch, minibatches, shuffled, with_moments
from tests.conftest import SINGLE, on_ranks


def rollout(rows: int, skipped: float = 0.0, seed: int = 0) -> Batch:
    """Rows that carry their number, of which some do not count; theirs hold what nobody must see."""
    rng = torch.Generator().manual_seed(seed)
    data = Batch(
        obs=torch.arange(float(rows))[:, None],
        actions=torch.arange(rows)[:, None],
        advantages=3 + 5 * torch.randn(rows, generator=rng, dtype=torch.float64),
        valid=(torch.rand(rows, generator=rng) >= skipped).double() if skipped else None,
    )
    if skipped:
        data.advantages[data.valid == 0] = 1e6
    return data


def rng(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("skipped", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_row_is_in_one_minibatch_of_each_epoch(count: int, skipped: float) -> None:
    data = rollout(24, skipped)
    epochs = shuffled(SINGLE, data, 5, count, rng())
    assert epochs.rows.shape == (5, count, 24 // count)
    for epoch in epochs:
        assert sorted(epoch.rows.flatten().tolist()) == list(range(24))
    assert len({tuple(epoch.rows.flatten().tolist()) for epoch in epochs}) == 5
    if data.valid is not None:  # those that do not count are dealt out evenly
        shares = data.valid[epochs.rows].sum(-1)
        assert (shares.amax(-1) - shares.amin(-1) <= 1).all()


def test_a_generator_says_how_rows_are_shuffled() -> None:
    data = rollout(24, 0.3)
    assert torch.equal(shuffled(SINGLE, data, 2, 3, rng(1)).rows, shuffled(SINGLE, data, 2, 3, rng(1)).rows)
    assert not torch.equal(shuffled(SINGLE, data, 2, 3, rng(1)).rows, shuffled(SINGLE, data, 2, 3, rng(2)).rows)


def test_rows_of_all_columns_belong_together_and_observations_come_from_where_they_are() -> None:
    data = rollout(24)
    for epoch in shuffled(SINGLE, data, 2, 4, rng()):
        for rows, batch in zip(epoch.rows, minibatches(data, epoch, norm_adv=False), strict=True):
            assert batch.obs[:, 0].long().tolist() == batch.actions[:, 0].tolist() == rows.tolist()
            assert torch.equal(batch.advantages, data.advantages[rows])
            assert batch.weights is None
            assert set(batch.columns) == {"obs", "actions", "advantages", "weights"}


def test_advantages_of_a_minibatch_have_mean_zero_and_deviation_one() -> None:
    data = Batch(obs=torch.zeros(8, 1), advantages=torch.tensor([1.0, 2.0, 3.0, 6.0, 10, 10, 20, 20]), valid=None)
    epochs = with_moments(SINGLE, data, torch.arange(8).view(1, 2, 4))
    first, second = minibatches(data, epochs[0], norm_adv=True)
    # Row 0: mean 3, unbiased deviation √((4 + 1 + 0 + 9)/3) = √(14/3); row 1: mean 15, √(4 · 25/3)
    torch.testing.assert_close(first.advantages, (data.advantages[:4] - 3) / (14 / 3) ** 0.5)
    torch.testing.assert_close(second.advantages, (data.advantages[4:] - 15) / (100 / 3) ** 0.5)
    data.advantages.fill_(3.0)
    epochs = with_moments(SINGLE, data, torch.arange(8).view(1, 2, 4))
    for batch in minibatches(data, epochs[0], norm_adv=True):
        assert torch.equal(batch.advantages, torch.zeros(4))  # no 0/0


def test_rows_that_do_not_count_are_in_no_mean() -> None:
    data = rollout(24, 0.4)
    (epoch,) = shuffled(SINGLE, data, 1, 3, rng())
    for rows, batch in zip(epoch.rows, minibatches(data, epoch, norm_adv=True), strict=True):
        real = data.valid[rows] > 0
        assert 0 < real.sum() < len(rows)
        expected = data.advantages[rows][real]
        expected = (expected - expected.mean()) / (expected.std() + 1e-8)
        torch.testing.assert_close(batch.advantages[real], expected)
        torch.testing.assert_close(batch.weights, real.double() / real.sum())


@pytest.mark.parametrize("skipped", [0.0, 0.4])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_average_over_ranks_is_the_mean_over_the_real_rows_of_all(world_size: int, skipped: float) -> None:
    """Written out: a minibatch of the world is what the ranks have in theirs, of which each has as many real rows as
    chance has given it; the mean of its advantages is zero, their deviation one, and each real row weighs the same."""
    shares = [rollout(24, skipped and skipped + 0.2 * rank, seed=rank) for rank in range(world_size)]

    def drawn(fabric: Any) -> list[tuple[Tensor, Batch]]:
        data, found = shares[fabric.global_rank], []
        for epoch in shuffled(fabric, data, 2, 3, rng(fabric.global_rank)):
            found += zip(epoch.rows, minibatches(data, epoch, norm_adv=True), strict=True)
        return found

    for world in zip(*on_ranks(world_size, drawn), strict=True):
        raw, ours, values, means = [], [], [], []
        for share, (rows, batch) in zip(shares, world, strict=True):
            real = torch.ones(len(rows), dtype=torch.bool) if share.valid is None else share.valid[rows] > 0
            value = share.obs[rows, 0].double().square()  # any number of a row
            weights = torch.full((len(rows),), 1 / len(rows)).double() if batch.weights is None else batch.weights
            means.append((value * weights).sum())  # as a loss weighs it
            raw.append(share.advantages[rows][real])
            ours.append(batch.advantages[real])
            values.append(value[real])
        everything = torch.cat(raw)
        expected = (everything - everything.mean()) / (everything.std() + 1e-8)
        torch.testing.assert_close(torch.cat(ours), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.stack(means).mean(), torch.cat(values).mean(), rtol=1e-6, atol=1e-6)
        if skipped:
            assert len({len(part) for part in raw}) > 1, "all ranks have as many real rows"


def test_a_rank_without_a_real_row_in_a_minibatch_adds_nothing() -> None:
    def drawn(fabric: Any) -> Batch:
        data = rollout(4)
        if fabric.global_rank == 1:
            data.advantages.fill_(1e6)
            data = data.with_columns(valid=torch.zeros(4).double())
        else:
            data = data.with_columns(valid=torch.ones(4).double())
        (epoch,) = with_moments(fabric, data, torch.arange(4).view(1, 1, 4))
        (batch,) = minibatches(data, epoch, norm_adv=True)
        return batch

    first, second = on_ranks(2, drawn)
    advantages = rollout(4).advantages
    torch.testing.assert_close(first.advantages, (advantages - advantages.mean()) / advantages.std(), rtol=1e-6, atol=0)
    assert torch.equal(second.weights, torch.zeros(4).double())
    torch.testing.assert_close(first.weights, torch.full((4,), 0.5).double())  # the average over both is 1/4 a row


def test_a_batch_is_rows_and_columns_and_a_tree_to_whoever_flattens_it() -> None:
    batch = Batch(a=torch.arange(6).view(3, 2), b=torch.arange(3.0))
    assert len(batch) == 3
    assert torch.equal(batch[1:].a, batch.a[1:])
    assert [row.b.item() for row in batch] == [0, 1, 2]
    more = batch.with_columns(b=None, c=batch.b)
    assert more.b is None
    assert torch.equal(batch.b, more.c)
    leaves, structure = pytree.tree_flatten((batch, 3))
    assert [leaf if isinstance(leaf, int) else leaf.shape for leaf in leaves] == [(3, 2), (3,), 3]
    again, number = pytree.tree_unflatten(leaves, structure)
    assert again.a is batch.a
    assert number == 3
    with pytest.raises(AttributeError, match="a batch of a, b has no c"):
        batch.c  # noqa: B018
