"""Memory: the recurrent core, and how rollouts are cut into the sequences that it is trained on.

Shapes: T steps, N environments, B rows of a minibatch in S sequences of up to L steps, I inputs, H hidden units.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fabricrl.models.models import ACTIVATIONS, MLP

CORES: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class Layout(NamedTuple):
    """Where the rows of a minibatch stand when its sequences lie side by side as [L, S], the shorter ones padded.

    Attributes:
        first: [S] the row that each sequence begins with.
        place: [B] where each row stands among L × S.
        length: L, of the longest sequence.
    """

    first: Tensor
    place: Tensor
    length: int

    def to(self, device: torch.device) -> "Layout":
        return Layout(self.first.to(device), self.place.to(device), self.length)


class RecurrentCore(nn.Module):
    """Inputs → (MLP) → LSTM (Hochreiter and Schmidhuber 1997) or GRU (Cho et al. 2014, arXiv:1406.1078) → [*, H].

    A state is one vector [state_size]: the outputs of all layers, then, of an LSTM, their cells. Orthogonal weights,
    zero bias.

    Args:
        kind: lstm or gru.
        encoder_sizes: layers before the core, each with activation; none: inputs reach the core as they are.
    """

    def __init__(
        self,
        kind: str,
        inputs: int,
        hidden_size: int,
        num_layers: int = 1,
        encoder_sizes: Sequence[int] = (),
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.activation, self.inputs = ACTIVATIONS[activation], inputs
        self.num_layers, self.hidden_size = num_layers, hidden_size
        *hidden, width = encoder_sizes or (inputs,)
        self.encoder = MLP(inputs, width, hidden, activation, gain=math.sqrt(2)) if encoder_sizes else None
        self.rnn = CORES[kind](width, hidden_size, num_layers)
        for name, parameter in self.rnn.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)
        # cuDNN wants its weights in an order of its own; as the optimizer steps one vector, it copies them, and says so
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        self.parts = 2 if kind == "lstm" else 1
        self.state_size = self.parts * num_layers * hidden_size

    def forward(self, x: Tensor, states: Tensor, layout: Layout) -> Tensor:
        """A minibatch [B, I] whose sequences begin in `states` [S, state_size] → [B, H].

        One call of the kernel takes all sequences through time. Padding follows the last step of a sequence, so that
        nothing real ever sees it, and nothing of it is returned.
        """
        x = self._encode(x)
        padded = x.new_zeros(layout.length * len(states), x.shape[-1]).index_copy(0, layout.place, x)
        shape = (len(states), self.parts, self.num_layers, self.hidden_size)
        h, *c = states.view(shape).permute(1, 2, 0, 3).contiguous()  # [layers, S, H] each
        outputs, _ = self.rnn(padded.view(layout.length, len(states), -1), (h, *c) if c else h)
        return outputs.reshape(-1, self.hidden_size)[layout.place]

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: inputs [N, I] and states [N, state_size] → outputs [N, H] and the states after it."""
        x = self._encode(x)
        h, *c = state.view(len(state), self.parts, self.num_layers, self.hidden_size).unbind(1)
        after: list[list[Tensor]] = [[] for _ in range(self.parts)]
        for layer in range(self.num_layers):
            names = (f"{name}_l{layer}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            weights = [getattr(self.rnn, name) for name in names]
            if c:
                x, cell = torch.lstm_cell(x, (h[:, layer], c[0][:, layer]), *weights)
                after[1].append(cell)
            else:
                x = torch.gru_cell(x, h[:, layer], *weights)
            after[0].append(x)
        return x, torch.cat([part for parts in after for part in parts], -1)

    def _encode(self, x: Tensor) -> Tensor:
        return x if self.encoder is None else self.activation(self.encoder(x))


class Sequences:
    """A rollout cut into sequences: behind the end of each episode, and after every `length` steps.

    Rows are counted environment by environment: step t of environment n is row n T + t. Steps that belong to no episode
    are sequences of their own.

    Args:
        dones: [T, N], whether an episode ended with that step.
    """

    def __init__(self, dones: Tensor, length: int) -> None:
        begins = np.ones((dones.shape[1], dones.shape[0]), dtype=bool)  # [N, T]
        begins[:, 1:] = dones.numpy().T[:, :-1]
        rows = np.arange(begins.size)
        since = rows - np.maximum.accumulate(np.where(begins.reshape(-1), rows, 0))
        self._begins = since % length == 0
        self.first = np.flatnonzero(self._begins)
        self.lengths = np.diff(self.first, append=begins.size)

    def in_order(self) -> Layout:
        """All rows as one minibatch."""
        return _lay_out(self._begins)

    def minibatches(self, count: int, rng: torch.Generator) -> tuple[Tensor, list[Layout]]:
        """The sequences in random order, divided into minibatches of equal size.

        One that lies across a border is cut there, since a sequence can begin at any row: all states are stored.

        Returns:
            the rows of each minibatch [M, B], and how each is laid out.
        """
        order = torch.randperm(len(self.first), generator=rng).numpy()
        first, lengths = self.first[order], self.lengths[order]
        places = np.cumsum(lengths) - lengths  # where each sequence begins in the new order
        rows = np.repeat(first - places, lengths) + np.arange(len(self._begins))
        begins = np.isin(np.arange(len(rows)), places).reshape(count, -1)  # [M, B]
        begins[:, 0] = True
        return torch.from_numpy(rows.reshape(count, -1)), [_lay_out(minibatch) for minibatch in begins]


def _lay_out(begins: np.ndarray) -> Layout:
    """Sequences that lie one after another, side by side; `begins` [B]: whether a row is the first of one."""
    first, rows = np.flatnonzero(begins), np.arange(len(begins))
    sequence = np.cumsum(begins) - 1
    step = rows - first[sequence]
    place = torch.from_numpy(step * len(first) + sequence)
    return Layout(torch.from_numpy(first), place, int(step.max()) + 1)
