"""Networks and the running normaliser."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gymnasium.spaces import Box
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional

from fabricrl.utils.errors import ConfigError
from fabricrl.utils.model import orthogonal_init
from fabricrl.utils.ranks import all_gather
from fabricrl.utils.records import Records, floats_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh_,  # in place where the gradient needs the result alone: a layer's output is nobody else's
    "relu": torch.relu_,
    "elu": functional.elu_,
    "silu": functional.silu,
}


def _tanh_slope(grad: Tensor, result: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward.grad_input(grad, result, grad_input=grad)


def _relu_slope(grad: Tensor, result: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad)


def _elu_slope(grad: Tensor, result: Tensor) -> Tensor:
    return torch.ops.aten.elu_backward.grad_input(grad, 1, 1, 1, True, result, grad_input=grad)


def _silu_slope(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


# What a gradient becomes behind an activation, in place, from the argument of that: its result where it is in place too
SLOPES = {"tanh": _tanh_slope, "relu": _relu_slope, "elu": _elu_slope, "silu": _silu_slope}
# From the gradient of a network's outputs to those of its parameters, in their order, or to that of its inputs
Pullback = Callable[[Tensor], list[Tensor]]


class MLP(nn.Module):
    """[*, inputs] → hidden layers with activation → [*, outputs]; orthogonal weights, zero bias.

    Args:
        gain: of the last layer; the hidden ones have √2 (Engstrom et al. 2020, arXiv:2005.12729).
    """

    def __init__(
        self, inputs: int, outputs: int, hidden_sizes: Sequence[int], activation: str = "tanh", gain: float = 1.0
    ) -> None:
        super().__init__()
        self.activation, self.slope, self.inputs = ACTIVATIONS[activation], SLOPES[activation], inputs
        sizes = [inputs, *hidden_sizes]
        pairs = itertools.pairwise(sizes)
        self.hidden = nn.ModuleList(orthogonal_init(nn.Linear(a, b), math.sqrt(2)) for a, b in pairs)
        self.out = orthogonal_init(nn.Linear(sizes[-1], outputs), gain)
        # Calling modules and looking their parameters up costs as much as the products do at the widths of policies
        self._layers = [(layer.weight, layer.bias) for layer in (*self.hidden, self.out)]

    def forward(self, x: Tensor, tape: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Notes on the tape, if there is one, the inputs of every layer, and behind hidden ones what SLOPES takes."""
        *hidden, last = self._layers
        for weight, bias in hidden:
            inputs, x = x, functional.linear(x, weight, bias)
            if tape is not None:
                tape.append((inputs, x))
            x = self.activation(x)
        if tape is not None:
            tape.append((x, x))
        return functional.linear(x, *last)

    @torch.no_grad()
    def vjp(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """The outputs [B, outputs] at x [B, inputs], and the way from their gradient to those of the parameters.

        The vector-Jacobian product that automatic differentiation would find, without its bookkeeping, which at the
        widths of policies takes a fifth of an update. Go that way before the parameters change.
        """
        tape: list[tuple[Tensor, Tensor]] = []
        outputs = self.forward(x, tape)

        def pullback(grad: Tensor) -> list[Tensor]:
            with torch.no_grad():
                grads: list[Tensor] = []
                for i in reversed(range(len(tape))):
                    inputs, _ = tape[i]
                    grads += (grad.sum(0), torch.mm(grad.t(), inputs))
                    if i > 0:
                        before = tape[i - 1][1]
                        grad = self.slope(torch.mm(grad, self._layers[i][0]).to(before.dtype), before)
                return grads[::-1]

        return outputs, pullback


class NatureCNN(nn.Module):
    """Images [B, C, H, W], uint8 → [B, features]: the network of Mnih et al. 2015, Nature 518, orthogonal weights.

    Bytes until here; scaled to [0, 1] by the weights of the first layer, which spares a pass over the images.

    Args:
        channels: C, those of all frames together.
        sides: H and W, of 36 or more.
        features: width of the linear layer at the end.
    """

    def __init__(self, channels: int, sides: tuple[int, int], features: int = 512) -> None:
        super().__init__()
        gain = math.sqrt(2)
        sizes = ((channels, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))  # channels in and out, kernel, stride
        first, *others = (orthogonal_init(nn.Conv2d(*size), gain) for size in sizes)
        self.first, self.others = first, nn.ModuleList(others)
        height, width = sides
        for *_, kernel, stride in sizes:
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        self.out = orthogonal_init(nn.Linear(64 * height * width, features), gain)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first
        # Channels last, as convolutions want them: forward and backward take two thirds of the time on a CPU
        x = images.to(torch.float32, memory_format=torch.channels_last)
        x = functional.conv2d(x, first.weight / 255, first.bias, first.stride).relu_()
        for conv in self.others:
            x = conv(x).relu_()
        return self.out(x.flatten(1)).relu_()


class RecordEncoder(nn.Module):
    """Records (see `utils/records.py`) with images and vectors → features [*, F], one encoder for each part.

        image:  its last S frames, as channels → NatureCNN → [*, cnn_features]
        vector: of the newest frame alone → linear, tanh → [*, 64]

    Args:
        space: of a single record.
        frame_stack: S; observations are [*, S, R], or [*, R] if S is 1.
    """

    VECTOR_FEATURES = 64

    def __init__(self, space: Records, frame_stack: int = 1, cnn_features: int = 512) -> None:
        super().__init__()
        self.space, self.frame_stack = space, frame_stack
        self.cnns, self.layers = nn.ModuleList(), nn.ModuleList()
        for image in space.images.values():
            channels, height, width = image.sizes
            self.cnns.append(NatureCNN(frame_stack * channels, (height, width), cnn_features))
        for size in space.vectors.values():
            self.layers.append(orthogonal_init(nn.Linear(size, self.VECTOR_FEATURES), math.sqrt(2)))
        self.num_features = len(self.cnns) * cnn_features + len(self.layers) * self.VECTOR_FEATURES  # F

    def forward(self, obs: Tensor) -> Tensor:
        batch = obs.shape[: -2 if self.frame_stack > 1 else -1]
        records = obs.reshape(-1, self.frame_stack, obs.shape[-1])  # [B, S, R]
        parts = []
        for cnn, image in zip(self.cnns, self.space.images.values(), strict=True):
            parts.append(cnn(image.of(records).flatten(1, 2)))  # [B, S C, H, W] →
        vectors = floats_of(records[:, -1], self.space.num_floats).split(list(self.space.vectors.values()), -1)
        for layer, vector in zip(self.layers, vectors, strict=False):
            parts.append(torch.tanh(layer(vector)))
        return torch.cat(parts, -1).view(*batch, -1)


def make_encoder(space: Box, frame_stack: int, cnn_features: int) -> RecordEncoder | None:
    """What looks at observations with images; None for vectors, which need none."""
    return RecordEncoder(space, frame_stack, cnn_features) if isinstance(space, Records) else None


class EnsembleMLP(nn.Module):
    """C networks of one shape, evaluated together: [B, inputs] → [C, B], each layer as one batched product.

        hidden layer: Linear → (Dropout) → (LayerNorm) → activation (Hiraoka et al. 2022, arXiv:2110.02034v2, Fig. 1)

    Args:
        dropout: share of a hidden layer's outputs that are set to zero, wherever `forward` is given which.
        layer_norm: whether hidden layers are normalised, with a scale and a shift that are learned.
    """

    def __init__(
        self,
        count: int,
        inputs: int,
        hidden_sizes: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.activation, self.slope = ACTIVATIONS[activation], SLOPES[activation]
        self.dropout, self.layer_norm = dropout, layer_norm
        sizes = [inputs, *hidden_sizes, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in itertools.pairwise(sizes):
            gain = 1.0 if b == 1 else math.sqrt(2)
            layers = [orthogonal_init(nn.Linear(a, b), gain) for _ in range(count)]
            self.weights.append(torch.stack([layer.weight.detach().T for layer in layers]))  # [C, a, b]
            self.biases.append(torch.stack([layer.bias.detach()[None] for layer in layers]))  # [C, 1, b]
        norms = hidden_sizes if layer_norm else ()
        self.scales = nn.ParameterList(torch.ones(count, 1, width) for width in norms)
        self.shifts = nn.ParameterList(torch.zeros(count, 1, width) for width in norms)
        self.hidden_weights = list(self.weights)[:-1]
        self._layers = list(zip(self.weights, self.biases, strict=True))  # looking them up costs as in MLP
        self._norms = list(zip(self.scales, self.shifts, strict=True))

    def forward(self, x: Tensor, dropped: Sequence[Tensor] = (), tape: list[Any] | None = None) -> Tensor:
        """The ensemble's outputs.

        Args:
            dropped: for each hidden layer, which of its outputs, as C × B × H in one row, dropout sets to zero.
            tape: is given the inputs of every layer, what its norm was given and found, and what its activation was.
        """
        *hidden, last = self._layers
        x = x.expand(len(last[0]), *x.shape)
        for i, (weight, bias) in enumerate(hidden):
            inputs, x = x, torch.baddbmm(bias, x, weight)  # [C, B, H]
            norm: tuple[Tensor, ...] = ()
            eps, keep = 1e-5, 1.0 - self.dropout
            if dropped:
                x.view(-1).index_fill_(0, dropped[i], 0.0)
                if self.layer_norm:  # whatever divides x by `keep` is divided out again, but for ε
                    eps *= keep**2
                else:
                    x.div_(keep)
            if self.layer_norm:
                scale, shift = self._norms[i]
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                norm = (x, *torch.native_layer_norm(x, x.shape[-1:], None, None, eps))
                x = torch.addcmul(shift, norm[1], scale)
            if tape is not None:
                tape.append((inputs, norm, x))
            x = self.activation(x)
        if tape is not None:
            tape.append((x, (), x))
        return torch.baddbmm(last[1], x, last[0]).squeeze(-1)

    @torch.no_grad()
    def vjp(self, x: Tensor, dropped: Sequence[Tensor] = (), of_inputs: bool = False) -> tuple[Tensor, Pullback]:
        """As MLP's: the outputs [C, B] at x [B, inputs], and the way from their gradient to those of the parameters.

        Args:
            of_inputs: to that of x instead, added up over networks, [B, inputs]; those of the parameters are not found.
        """
        tape: list[tuple[Tensor, tuple[Tensor, ...], Tensor]] = []
        outputs = self.forward(x, dropped, tape)

        def pullback(grad: Tensor) -> list[Tensor]:
            with torch.no_grad():
                grad = grad.unsqueeze(-1)  # [C, B, 1]
                weights, biases, scales, shifts = [], [], [], []
                for i in reversed(range(len(tape))):
                    inputs, norm, before = tape[i]
                    if i < len(tape) - 1:
                        grad = self.slope(grad.to(before.dtype), before)
                        if norm:
                            shifts.append(grad.sum(1, True))
                            scales.append((grad * norm[1]).sum(1, True))
                            grad = _layer_norm_slope(grad * self._norms[i][0], *norm)
                        if dropped:
                            grad.view(-1).index_fill_(0, dropped[i], 0.0)
                            grad = grad if norm else grad.div_(1.0 - self.dropout)
                    if not of_inputs:
                        weights.append(torch.bmm(inputs.mT, grad))
                        biases.append(grad.sum(1, True))
                    if i > 0 or of_inputs:
                        back = self._layers[i][0].mT
                        grad = torch.bmm(grad, back) if grad.shape[-1] > 1 else grad * back  # [C, B, inputs]
                return [grad.sum(0)] if of_inputs else [*weights[::-1], *biases[::-1], *scales[::-1], *shifts[::-1]]

        return outputs, pullback


def _layer_norm_slope(grad: Tensor, x: Tensor, normed: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """What a gradient becomes behind a layer norm of x, from what that has found."""
    given = (x, x.shape[-1:], mean, deviation, None, None, (True, False, False))
    return torch.ops.aten.native_layer_norm_backward(grad, *given)[0]


def draw_dropped(
    rate: float, layers: int, units: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Which of the `units` outputs of each of `layers` layers dropout sets to zero, each with probability `rate`.

    Draws the gaps from one to the next, which are geometric: exact, and the cost is that of the share dropped, where a
    draw for each output takes longer than the layer's product does.
    """
    total = layers * units
    draws = math.ceil(total * rate + 6 * math.sqrt(total * rate) + 16)
    positions = torch.zeros(1, dtype=torch.float64)
    while positions[-1] <= total:  # nearly always once
        gaps = torch.empty(draws, dtype=torch.float64).geometric_(rate, generator=generator)
        positions = torch.cat((positions, positions[-1] + gaps.cumsum(0)))
    positions = positions[1:].long() - 1
    ends = torch.searchsorted(positions, torch.arange(1, layers + 1) * units)  # [layers]
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return list((positions[: ends[-1]] % units).to(device).split(counts))


class RunningNormalizer(nn.Module):
    """Running mean and variance of vectors, merged batch by batch and over ranks (Chan et al. 1979).

    Its statistics are buffers: saved with the module, and the same on every rank. They change in `update` alone.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    center: Tensor
    deviation: Tensor

    def __init__(self, size: int, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        # What acting needs at every step, in the precision of the networks; made anew whenever the statistics change
        self.register_buffer("center", torch.zeros(size), persistent=False)
        self.register_buffer("deviation", torch.ones(size), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)  # a function of the module, so that copies refresh themselves

    def forward(self, x: Tensor) -> Tensor:
        """(x − mean) / σ, clipped to ±clip; [*, size]."""
        return ((x - self.center) / self.deviation).clamp(-self.clip, self.clip)

    def scale(self, x: Tensor) -> Tensor:
        """x / σ, clipped to ±clip: for rewards, whose sign must stay."""
        return (x / self.deviation).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, x: Tensor, fabric: Fabric | None = None) -> None:
        """Adds a batch [*, size]. Given a Fabric, adds those of all ranks, which must call it together."""
        x = x.reshape(-1, self.mean.shape[0]).double()
        count = x.new_tensor(len(x))
        mean, square = x.mean(0), x.var(0, correction=0)
        moments = torch.cat((mean, square, count[None]))[None]  # [1, 2 size + 1]
        if fabric is not None:
            moments = all_gather(fabric, moments[0])  # [W, 2 size + 1]
        for part in moments:
            mean, square = part[:-1].chunk(2)
            self._merge(mean, square, part[-1])
        self.refresh()

    def _merge(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        # M2 = M2_a + M2_b + δ² n_a n_b / n, with M2 = n Var
        m2 = self.var * self.count + var * count + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.var.copy_(m2 / total)
        self.count.copy_(total)

    def refresh(self) -> None:
        """Takes over `mean` and `var`, after they have changed, for what acting needs."""
        self.center.copy_(self.mean)
        self.deviation.copy_((self.var + 1e-8).sqrt())


def _refresh(normalizer: RunningNormalizer, _: object) -> None:
    normalizer.refresh()


def make_normalizer(space: Box) -> RunningNormalizer:
    """For vectors, or for the numbers in records, whose images are not normalised.

    Raises:
        ConfigError: there are only images.
    """
    if isinstance(space, Records) and not space.num_floats:
        raise ConfigError("--norm-obs is set: it can be for numbers, and there are only images among the observations")
    return RunningNormalizer(space.num_floats if isinstance(space, Records) else space.shape[0])


def normalized(normalizer: RunningNormalizer, obs: Tensor) -> Tensor:
    """Vectors [*, D], or records [*, R] with their numbers, normalised."""
    if obs.dtype != torch.uint8:
        return normalizer(obs)
    records = obs.clone()
    numbers = floats_of(records, len(normalizer.mean))
    numbers.copy_(normalizer(numbers))
    return records
