"""Minibatches: their rows, and the moments that normalise their advantages."""

from collections.abc import Iterator

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fabricrl.utils.batch import Batch
from fabricrl.utils.device import to_device
from fabricrl.utils.ranks import all_gather


def shuffled(fabric: Fabric, data: Batch, epochs: int, num_minibatches: int, rng: torch.Generator) -> Batch:
    """Draws the minibatches of all epochs: each row once an epoch, in random order.

    Rows that are not valid (`data.valid` is 0; None: all are valid) are dealt out evenly, so that minibatches have a
    fixed shape.

    Returns:
        `with_moments` of the rows drawn.
    """
    orders = torch.stack(
        [torch.randperm(len(data.advantages), generator=rng, device=rng.device) for _ in range(epochs)]
    )
    if data.valid is None:
        return with_moments(fabric, data, orders.view(epochs, num_minibatches, -1))
    orders = _valid_first(to_device(orders, data.valid.device), data.valid)
    return with_moments(fabric, data, orders.view(epochs, -1, num_minibatches).mT)  # a row to each minibatch in turn


def _valid_first(orders: Tensor, valid: Tensor) -> Tensor:
    """Moves valid rows to the front of each order [E, T N]; both groups keep their order."""
    valid = valid[orders] > 0
    behind = valid.sum(1, keepdim=True) + (~valid).cumsum(1) - 1
    places = torch.where(valid, valid.cumsum(1) - 1, behind)  # where each row goes
    return torch.empty_like(orders).scatter_(1, places, orders)


@torch.no_grad()
def with_moments(fabric: Fabric, data: Batch, rows: Tensor) -> Batch:
    """The rows [E, M, B] of minibatches with the moments of their advantages over all ranks, in one collective.

    Over all ranks, so that W ranks with B rows each compute the update of one rank with W B rows.

    Returns:
        rows; mean and deviation; and total, how many rows of a minibatch are valid on the average rank; [E, M, 1].
    """
    rows = to_device(rows, data.advantages.device)
    values = data.advantages[rows]  # [E, M, B]
    valid = torch.ones_like(values) if data.valid is None else data.valid[rows]
    totals = valid.sum(-1)  # [E, M]
    means = (values * valid).sum(-1) / totals.clamp(min=1.0)
    squares = ((values - means[..., None]).square() * valid).sum(-1)
    totals, means, squares = all_gather(fabric, torch.stack((totals, means, squares))).unbind(1)  # [W, E, M] each
    total = totals.sum(0).clamp(min=1.0)  # never 0: a minibatch may have no valid row
    mean = (totals * means).sum(0) / total
    square = (squares + totals * (means - mean).square()).sum(0)  # Chan et al. 1979
    moments = {
        "mean": mean,
        "deviation": (square / (total - 1).clamp(min=1.0)).sqrt(),
        "total": total / fabric.world_size,
    }
    return Batch(rows=rows, **{name: moment[..., None] for name, moment in moments.items()})


def minibatches(data: Batch, epoch: Batch, norm_adv: bool) -> Iterator[Batch]:
    """The minibatches [B, ...] of an epoch, with the weight of each row in a mean; None: all weigh the same.

    Args:
        epoch: of `with_moments`: rows [M, B] and moments [M, 1].
        norm_adv: normalise advantages.
    """
    later = ("obs", "states", "valid")
    there = {name: column for name, column in data.columns.items() if column is not None and name not in later}
    columns = {name: column[epoch.rows] for name, column in there.items()}
    if norm_adv:
        columns["advantages"] = (columns["advantages"] - epoch.mean) / (epoch.deviation + 1e-8)
    if data.valid is not None:
        columns["weights"] = data.valid[epoch.rows] / epoch.total
    for rows, batch in zip(epoch.rows, Batch(**columns), strict=True):
        # One minibatch at a time: images stay in the caches
        yield batch.with_columns(obs=data.obs[rows], weights=batch.columns.get("weights"))
