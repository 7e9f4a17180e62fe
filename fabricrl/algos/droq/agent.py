"""DroQ's agent: SAC's actor and temperature, with critics of its own."""

from typing import Any

import torch
from torch import Tensor

from fabricrl.algos.sac.agent import ACTION_SPACES, SACAgent
from fabricrl.algos.sac.agent import make_agent as make_sac_agent
from fabricrl.models.models import DropoutMasks

__all__ = ["ACTION_SPACES", "DroQAgent", "make_agent"]


class DroQAgent(SACAgent):
    """SAC's agent with critics of Linear → Dropout → LayerNorm → activation (Hiraoka et al. 2022, arXiv:2110.02034v2).

    Dropout is active wherever critics are asked in training, in targets and in the actor's loss too. Its masks
    come from outside, as noise does: see `dropout_masks`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.masks = DropoutMasks(self.ensemble.dropout)

    def dropout_masks(self, passes: int, rows: int, generator: torch.Generator) -> list[list[Tensor]]:
        """Draws the dropout masks of several forward passes of the critics over batches of `rows`.

        Returns:
            for each pass, a mask [C, B, H] for each hidden layer: 1 where an output is kept, 0 where it is dropped. On
            the CPU they hold until the next draw.
        """
        critics, device = self.ensemble, self.log_alpha.device
        if critics.dropout == 0 or not critics.hidden_sizes:
            return [[] for _ in range(passes)]
        shapes = [(critics.count, rows, width) for width in critics.hidden_sizes]
        sizes = [count * rows * width for count, rows, width in shapes] * passes
        drawn = iter(self.masks.draw(sum(sizes), generator).to(device).split(sizes))
        return [[next(drawn).view(shape) for shape in shapes] for _ in range(passes)]


def make_agent(args: Any, envs: Any) -> DroQAgent:
    """The agent that `args` describe, for these environments."""
    agent = make_sac_agent(args, envs, DroQAgent, dropout=args.dropout, layer_norm=args.layer_norm)
    assert isinstance(agent, DroQAgent)
    return agent
