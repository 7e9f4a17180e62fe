"""Memory: the recurrent core, and how rollouts are cut into the sequences that it is trained on.

Shapes: T steps, N environments, B rows of a minibatch in S sequences of up to L steps, I inputs, H hidden units.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fabricrl.models.models import ACTIVATIONS, MLP
from fabricrl.utils.device import to_device
from fabricrl.utils.recording import is_recording

CORES: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class Layout(NamedTuple):
    """Places of a minibatch's rows when its sequences lie side by side as [L, S], the shorter ones padded.

    Its tensors have fixed shapes, however the sequences fall.

    Attributes:
        first: [B] the row that each of the S sequences begins with; what follows those is of no matter.
        place: [B] where each row stands among L × S.
        size: L, of the longest sequence, and S, [2] on the CPU; or two numbers, not below these, that a CUDA graph is
            made for.
        resets: [B] rows before which memory is zeroed, as of `FixedSequences`; None: a sequence has none.
    """

    first: Tensor
    place: Tensor
    size: Tensor | tuple[int, int]
    resets: Tensor | None = None

    def sized_by_tensor(self) -> "Layout":
        """With a tensor for its size: numbers would become part of what is compiled."""
        return self._replace(size=torch.as_tensor(self.size))

    def to(self, device: torch.device) -> "Layout":
        return self._replace(first=to_device(self.first, device), place=to_device(self.place, device))


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
        """A minibatch [B, I] whose sequences begin in `states` [B, state_size], of which the first S count → [B, H].

        One call of the kernel takes all sequences through time, unless there are resets within them. Padding follows
        the last step of a sequence, so that nothing real ever sees it, and nothing of it is returned.
        """
        x = self._encode(x)
        core = self._weights, self.parts, self.num_layers
        if not is_recording():
            return _through_time(x, states, layout.place, layout.size, *core, layout.resets)
        return _opaque_forward(x, states, layout.place, layout.size, *core, layout.resets)[0]

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: inputs [N, I] and states [N, state_size] → outputs [N, H] and the states after it."""
        return _step(self._encode(x), state, self._weights, self.parts, self.num_layers)

    @property
    def _weights(self) -> list[Tensor]:
        """Weights and biases, four of each layer."""
        return [*itertools.chain(*self.rnn.all_weights)]

    def _encode(self, x: Tensor) -> Tensor:
        return x if self.encoder is None else self.activation(self.encoder(x))


def _through_time(
    x: Tensor,
    states: Tensor,
    place: Tensor,
    size: Tensor | tuple[int, int],
    weights: list[Tensor],
    parts: int,
    layers: int,
    resets: Tensor | None = None,
) -> Tensor:
    """The core's outputs [B, H]; two parts make an LSTM, one a GRU."""
    length, count = size.tolist() if isinstance(size, Tensor) else size
    padded = x.new_zeros(length * count, x.shape[-1]).index_copy(0, place, x).view(length, count, -1)
    if resets is not None:
        kept = states.new_ones(length * count).index_copy(0, place, 1.0 - resets.to(states.dtype))
        steps, state = [], states[:count]
        for row, keep in zip(padded, kept.view(length, count, 1), strict=True):
            output, state = _step(row, keep * state, weights, parts, layers)
            steps.append(output)
        return torch.cat(steps).index_select(0, place)
    h, *c = states[:count].view(count, parts, layers, -1).permute(1, 2, 0, 3).contiguous()  # [layers, S, H] each
    settings = True, layers, 0.0, torch.is_grad_enabled(), False, False  # biases; neither dropout nor two directions
    with torch.autocast(x.device.type, enabled=False):  # which has cuDNN compute in float16, whatever is asked for
        if c:
            outputs, *_ = torch.lstm(padded.to(h.dtype), (h, *c), weights, *settings)
        else:
            outputs, _ = torch.gru(padded.to(h.dtype), h, weights, *settings)
    return outputs.flatten(0, 1).index_select(0, place)


def _step(x: Tensor, state: Tensor, weights: list[Tensor], parts: int, layers: int) -> tuple[Tensor, Tensor]:
    """One step of the core: inputs [N, ...] and states [N, state_size] → outputs [N, H] and the states after it."""
    before = state.chunk(parts * layers, -1)  # outputs of all layers, then their cells
    after = list(before)
    for layer in range(layers):
        cell, own = layers + layer, weights[4 * layer : 4 * layer + 4]
        if parts == 2:
            x, after[cell] = torch.lstm_cell(x, (before[layer], before[cell]), *own)
        else:
            x = torch.gru_cell(x, before[layer], *own)
        after[layer] = x
    return x, torch.cat(after, -1)


# A compiler sees two operations of fixed shapes, and not the time steps inside, of which there are as many as there are

_tapes: dict[int, tuple[Tensor, list[Tensor]]] = {}  # what the backward pass needs of the forward passes before it
_MOST_TAPES = 8
_numbers = itertools.count()


def _autograd_again() -> AbstractContextManager[Any]:
    """Undoes that PyTorch has put autograd aside before it calls an operation."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


@torch.library.custom_op("fabricrl::through_time", mutates_args=())
def _opaque_forward(
    x: Tensor,
    states: Tensor,
    place: Tensor,
    size: Tensor,
    weights: list[Tensor],
    parts: int,
    layers: int,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`_through_time`, and the number of its tape."""
    with _autograd_again(), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *weights)]
        outputs = _through_time(leaves[0], states.detach(), place, size, leaves[1:], parts, layers, resets)
    number = next(_numbers)
    _tapes[number] = outputs, leaves
    while len(_tapes) > _MOST_TAPES:
        del _tapes[next(iter(_tapes))]
    return outputs.detach().clone(), torch.tensor([number])


@torch.library.custom_op("fabricrl::back_through_time", mutates_args=())
def _opaque_backward(grad: Tensor, number: Tensor, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The gradients of x and the weights; `number` is that of the tape.

    Raises:
        RuntimeError: there have been too many forward passes since.
    """
    if int(number) not in _tapes:
        kept = f"with --compile the last {_MOST_TAPES} passes through recurrent cores are kept for a backward pass"
        raise RuntimeError(f"{kept}: this is of an earlier one, or of one that has had its backward pass")
    outputs, leaves = _tapes.pop(int(number))
    with _autograd_again():
        grads = torch.autograd.grad(outputs, leaves, grad)
    return [part.clone(memory_format=torch.contiguous_format) for part in grads]  # cuDNN's are views of one vector


@_opaque_forward.register_fake
def _(x, states, place, size, weights, parts, layers, resets):  # type: ignore[no-untyped-def]
    return x.new_empty(len(x), weights[1].shape[-1]), torch.empty(1, dtype=torch.int64)


@_opaque_backward.register_fake
def _(grad, number, x, weights):  # type: ignore[no-untyped-def]
    return [torch.empty_like(tensor) for tensor in (x, *weights)]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, _, _, _, weights, *_ = inputs
    ctx.save_for_backward(output[1], x, *weights)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    number, x, *weights = ctx.saved_tensors
    grad_x, *grads = _opaque_backward(grad, number, x, weights)
    return grad_x, None, None, None, grads, None, None, None


_opaque_forward.register_autograd(_backward, setup_context=_keep)


class Sequences:
    """A rollout cut into sequences: behind the end of each episode, and after every `length` steps.

    Rows are counted environment by environment: step t of environment n is row n T + t. Steps that belong to no episode
    are sequences of their own.

    Args:
        dones: [T, N], whether an episode ended with that step.

    Attributes:
        ends: [N T], bool: rows that no sequence goes beyond, of whatever length; an episode or a rollout ends there.
    """

    def __init__(self, dones: Tensor, length: int) -> None:
        begins = np.ones((dones.shape[1], dones.shape[0]), dtype=bool)  # [N, T]
        begins[:, 1:] = dones.numpy().T[:, :-1]
        self.ends = torch.from_numpy(np.append(begins.reshape(-1)[1:], True))
        rows = np.arange(begins.size)
        since = rows - np.maximum.accumulate(np.where(begins.reshape(-1), rows, 0))
        self._begins = since % length == 0
        self._shape, self._length, self._longest = dones.shape, length, min(length, len(dones))
        self.first = np.flatnonzero(self._begins)
        self.lengths = np.diff(self.first, append=begins.size)

    @staticmethod
    def cut(dones: Tensor, length: int, count: int, stays: bool) -> "Sequences":
        """Sequences for `count` minibatches; of one length if nothing of the rollout may leave its device (`stays`)."""
        return FixedSequences(dones, length, count) if stays else Sequences(dones, length)

    def of_all_sizes(self, few_sizes: bool) -> Iterator["Sequences"]:
        """Sequences of one step, two, four and so on, as `minibatches` has few sizes; if not, these."""
        steps = torch.arange(1, self._shape[0] + 1)[:, None]
        if not few_sizes:
            yield self
            return
        for doubled in range(self._longest.bit_length() + 1):
            yield Sequences((steps % 2**doubled == 0).expand(self._shape), self._length)

    def in_order(self) -> Layout:
        """All rows as one minibatch."""
        return _lay_out(self._begins)

    def minibatches(self, count: int, rng: torch.Generator, few_sizes: bool = False) -> tuple[Tensor, list[Layout]]:
        """The sequences in random order, divided into minibatches of equal size.

        One that lies across a border is cut there, since a sequence can begin at any row: all states are stored.

        Args:
            few_sizes: whether layouts get one of a few sizes, as many as their sequences might be long, and a power of
                two of them; a CUDA graph is made for each.

        Returns:
            the rows of each minibatch [M, B], and how each is laid out.
        """
        order = torch.randperm(len(self.first), generator=rng).numpy()
        first, lengths = self.first[order], self.lengths[order]
        places = np.cumsum(lengths) - lengths  # where each sequence begins in the new order
        rows = np.repeat(first - places, lengths) + np.arange(len(self._begins))
        begins = np.zeros((count, len(rows) // count), dtype=bool)  # [M, B]
        begins.reshape(-1)[places] = True
        begins[:, 0] = True
        longest = self._longest if few_sizes else None
        return torch.from_numpy(rows.reshape(count, -1)), [_lay_out(minibatch, longest) for minibatch in begins]


def _lay_out(begins: np.ndarray, longest: int | None = None) -> Layout:
    """Sequences that lie one after another, side by side, in few sizes if a longest is given.

    `begins` [B]: whether a row is the first of one.
    """
    starts, rows = np.flatnonzero(begins), np.arange(len(begins))
    sequence = np.cumsum(begins) - 1
    step = rows - starts[sequence]
    first = np.zeros_like(rows)
    first[: len(starts)] = starts
    count = len(starts) if longest is None else min(1 << (len(starts) - 1).bit_length(), len(begins))
    place, length = torch.from_numpy(step * count + sequence), int(step.max()) + 1
    size = torch.tensor([length, count]) if longest is None else (min(longest, len(begins)), count)
    return Layout(torch.from_numpy(first), place, size)


def common_length(steps: int, envs: int, count: int, most: int) -> int:
    """The largest length up to `most` that divides both T = `steps` and the rows of each of `count` minibatches."""
    common = math.gcd(steps, steps * envs // count)
    return max(length for length in range(1, min(most, common) + 1) if common % length == 0)


class FixedSequences(Sequences):
    """A rollout cut into sequences of one length, on its own device: nothing asks where episodes end.

    Sequences go on over the ends of episodes, and memory is zeroed there, through which no gradient flows either. Rows
    are counted as in `Sequences`.

    Args:
        dones: [T, N], whether an episode ended with that step.
        length: the most steps of a sequence; they have as many as divide both T and the rows of a minibatch.
        count: M, minibatches.
    """

    def __init__(self, dones: Tensor, length: int, count: int) -> None:
        # Without that of `Sequences`, whose tables are made on the CPU: nothing here may ask for a tensor's values
        (steps, envs), self._device = dones.shape, dones.device
        self.length = common_length(steps, envs, count, length)
        ends, resets = torch.ones_like(dones), torch.zeros_like(dones)
        ends[:-1] = resets[1:] = dones[:-1]
        self.ends, self._resets = ends.T.flatten(), resets.T.flatten()  # [N T]

    def of_all_sizes(self, few_sizes: bool) -> Iterator[Sequences]:
        """These: there are no others."""
        yield self

    def in_order(self) -> Layout:
        """All rows as one minibatch."""
        return self._lay_out(torch.arange(len(self._resets), device=self._device))

    def minibatches(self, count: int, rng: torch.Generator, few_sizes: bool = False) -> tuple[Tensor, list[Layout]]:
        """The sequences in random order, drawn on the device, divided into minibatches of equal size.

        Returns:
            the rows of each minibatch [M, B], and how each is laid out.
        """
        order = torch.randperm(len(self._resets) // self.length, generator=rng, device=self._device)
        rows = self.length * order[:, None] + torch.arange(self.length, device=self._device)
        rows = rows.view(count, -1)  # [M, B]
        return rows, [self._lay_out(minibatch) for minibatch in rows]

    def _lay_out(self, rows: Tensor) -> Layout:
        """Sequences that lie one after another, side by side."""
        numbers, count = torch.arange(len(rows), device=self._device), len(rows) // self.length
        first = torch.where(numbers < count, self.length * numbers, 0)
        place = numbers % self.length * count + numbers // self.length
        return Layout(first, place, (self.length, count), self._resets[rows])
