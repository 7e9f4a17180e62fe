"""DroQ's agent: SAC's actor and temperature, with critics of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fabricrl.algos.sac.agent import SACAgent
from fabricrl.models.models import draw_dropped


class DroQAgent(SACAgent):
    """SAC's agent with critics of Linear → Dropout → LayerNorm → activation (Hiraoka et al. 2022, arXiv:2110.02034v2).

    Dropout is active wherever critics are asked in training, in targets and in the actor's loss too. What it drops
    comes from outside, as noise does: see `drop`.

    Args:
        dropout: share of the critics' hidden units that is dropped.
        layer_norm: whether their hidden layers are normalised.
    """

    def __init__(self, *args: Any, dropout: float = 0.01, layer_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, dropout=dropout, layer_norm=layer_norm, **kwargs)

    def drop(self, passes: int, rows: int, generator: torch.Generator) -> list[Sequence[Tensor]]:
        """For each of so many forward passes of the critics over batches of so many rows, what it drops."""
        widths = [weight.shape[2] for weight in self.critics.weights[:-1]]
        count = len(self.critics.weights[0])
        if not self.critics.dropout:
            return [()] * passes
        layers = [draw_dropped(self.critics.dropout, passes, count * rows * width, generator) for width in widths]
        return list(zip(*layers, strict=True))
