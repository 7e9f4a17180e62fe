"""DroQ's agent: SAC's actor and temperature, with critics of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fabricrl.algos.sac.agent import SACAgent
from fabricrl.models.models import draw_dropped


class DroQAgent(SACAgent):
    """SAC's agent with critics of Linear → Dropout → LayerNorm → activation (Hiraoka et al. 2022, arXiv:2110.02034v2).

    Dropout is active wherever critics are asked in training, in targets and in the actor's loss too. What it drops
    comes from outside, as noise does: see `drop`.
    """

    def drop(self, passes: int, rows: int, generator: torch.Generator) -> list[Sequence[Tensor]]:
        """For each of so many forward passes of the critics over batches of so many rows, what it drops."""
        rate, device = self.critics.dropout, self.log_alpha.device
        units = [layer.shape[0] * layer.shape[2] * rows for layer in self.critics.hidden_weights]
        if rate == 0 or not units:
            return [()] * passes
        return list(zip(*(draw_dropped(rate, passes, count, generator, device) for count in units), strict=True))
