"""Networks and the running normaliser."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from gymnasium.spaces import Box
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional

from fabricrl.utils.device import to_device
from fabricrl.utils.errors import ConfigError
from fabricrl.utils.model import orthogonal_init
from fabricrl.utils.ranks import all_gather
from fabricrl.utils.records import Records, floats_of
from fabricrl.utils.returns import discounted_returns

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh_,  # in place where the gradient needs the result alone: a layer's output is nobody else's
    "relu": torch.relu_,
    "elu": functional.elu_,
    "silu": functional.silu,
}


class MLP(nn.Module):
    """[*, inputs] → hidden layers with activation → [*, outputs]; orthogonal weights, zero bias.

    Args:
        gain: of the last layer; the hidden ones have √2 (Engstrom et al. 2020, arXiv:2005.12729).
    """

    def __init__(
        self, inputs: int, outputs: int, hidden_sizes: Sequence[int], activation: str = "tanh", gain: float = 1.0
    ) -> None:
        super().__init__()
        self.activation, self.inputs = ACTIVATIONS[activation], inputs
        sizes = [inputs, *hidden_sizes]
        pairs = itertools.pairwise(sizes)
        self.hidden = nn.ModuleList(orthogonal_init(nn.Linear(a, b), math.sqrt(2)) for a, b in pairs)
        self.out = orthogonal_init(nn.Linear(sizes[-1], outputs), gain)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = self.activation(linear(layer, x))
        return linear(self.out, x)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, whatever that is: a plain linear layer without a module's call, which takes a quarter of acting."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if hooks or type(layer) is not nn.Linear:
        return layer(x)
    return functional.linear(x, layer._parameters["weight"], layer._parameters["bias"])  # type: ignore[arg-type]


class NatureCNN(nn.Module):
    """Images [B, C, H, W], uint8 → [B, features]: the network of Mnih et al. 2015, Nature 518, orthogonal weights.

    Bytes until here; scaled to [0, 1] by the weights of the first layer, which spares a pass over the images.

    Args:
        channels: C, those of all frames together.
        sides: H and W, of 36 or more.
        features: width of the linear layer at the end.
        layer_norm: end in Linear → LayerNorm → tanh, as encoders that critics train do (Yarats et al. 2019,
            arXiv:1910.01741, Appendix B), in place of Linear → ReLU.
    """

    def __init__(self, channels: int, sides: tuple[int, int], features: int = 512, layer_norm: bool = False) -> None:
        super().__init__()
        gain = math.sqrt(2)
        sizes = ((channels, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))  # channels in and out, kernel, stride
        first, *others = (orthogonal_init(nn.Conv2d(*size), gain) for size in sizes)
        self.first, self.others = first, nn.ModuleList(others)
        height, width = sides
        for *_, kernel, stride in sizes:
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        self.out = orthogonal_init(nn.Linear(64 * height * width, features), 1.0 if layer_norm else gain)
        self.norm = nn.LayerNorm(features) if layer_norm else None

    def forward(self, images: Tensor) -> Tensor:
        first = self.first
        # Channels last, as convolutions want them: forward and backward take two thirds of the time on a CPU
        x = images.to(torch.float32, memory_format=torch.channels_last)
        x = functional.conv2d(x, first.weight / 255, first.bias, first.stride).relu_()
        for conv in self.others:
            x = conv(x).relu_()
        x = self.out(x.flatten(1))
        return x.relu_() if self.norm is None else self.norm(x).tanh()


class RecordEncoder(nn.Module):
    """Records (see `utils/records.py`) with images and vectors → features [*, F], one encoder for each part.

        image:  its last S frames, as channels → NatureCNN → [*, cnn_features]
        vector: of the newest frame alone → linear, tanh → [*, 64]

    Args:
        space: of a single record.
        frame_stack: S; observations are [*, S, R], or [*, R] if S is 1.
        layer_norm: of the features of images, which are in [−1, 1] then.
    """

    VECTOR_FEATURES = 64

    def __init__(self, space: Records, frame_stack: int = 1, cnn_features: int = 512, layer_norm: bool = False) -> None:
        super().__init__()
        self.space, self.frame_stack = space, frame_stack
        self.cnns, self.layers = nn.ModuleList(), nn.ModuleList()
        for image in space.images.values():
            channels, height, width = image.sizes
            self.cnns.append(NatureCNN(frame_stack * channels, (height, width), cnn_features, layer_norm))
        for size in space.vectors.values():
            self.layers.append(orthogonal_init(nn.Linear(size, self.VECTOR_FEATURES), math.sqrt(2)))
        self.num_features = len(self.cnns) * cnn_features + len(self.layers) * self.VECTOR_FEATURES  # F

    def forward(self, obs: Tensor) -> Tensor:
        batch = obs.shape[: -2 if self.frame_stack > 1 else -1]
        records = obs.reshape(-1, self.frame_stack, obs.shape[-1])  # [B, S, R]
        images = [image.of(records).flatten(1, 2) for image in self.space.images.values()]  # [B, S C, H, W] each
        return self.encode(images, floats_of(records[:, -1], self.space.num_floats)).view(*batch, -1)

    def encode(self, images: Sequence[Tensor], numbers: Tensor) -> Tensor:
        """Encodes records: images [B, S C, H, W], and the numbers of all vectors [B, V] → [B, F]."""
        parts = [cnn(image) for cnn, image in zip(self.cnns, images, strict=True)]
        if len(self.layers):
            vectors = numbers.split(list(self.space.vectors.values()), -1)
            parts += [torch.tanh(layer(vector)) for layer, vector in zip(self.layers, vectors, strict=True)]
        return torch.cat(parts, -1)


def make_encoder(space: Box, frame_stack: int, cnn_features: int, layer_norm: bool = False) -> RecordEncoder | None:
    """Encoder of observations with images; None for vectors, which need none."""
    return RecordEncoder(space, frame_stack, cnn_features, layer_norm) if isinstance(space, Records) else None


class EnsembleMLP(nn.Module):
    """C networks of one shape, evaluated together: [B, inputs] → [C, B], each layer as one batched product.

        hidden layer: Linear → (Dropout) → (LayerNorm) → activation (Hiraoka et al. 2022, arXiv:2110.02034v2, Fig. 1)

    Args:
        dropout: share of a hidden layer's outputs that are set to zero, wherever `forward` is given masks.
        layer_norm: whether hidden layers are normalised, with a scale and a shift that are learned.
    """

    ones: Tensor

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
        self.activation, self.count, self.inputs = ACTIVATIONS[activation], count, inputs
        self.hidden_sizes, self.dropout, self.layer_norm = tuple(hidden_sizes), dropout, layer_norm
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in itertools.pairwise([inputs, *hidden_sizes, 1]):
            gain = 1.0 if b == 1 else math.sqrt(2)
            layers = [orthogonal_init(nn.Linear(a, b), gain) for _ in range(count)]
            self.weights.append(torch.stack([layer.weight.detach().T for layer in layers]))  # [C, a, b]
            self.biases.append(torch.stack([layer.bias.detach()[None] for layer in layers]))  # [C, 1, b]
        norms = hidden_sizes if layer_norm else ()
        self.scales = nn.ParameterList(torch.ones(count, 1, width) for width in norms)
        self.shifts = nn.ParameterList(torch.zeros(count, 1, width) for width in norms)
        self.register_buffer("ones", torch.ones(max(norms, default=0)), persistent=False)

    def forward(self, *inputs: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
        """The ensemble's outputs [C, B] at inputs that are concatenated, such as observations and actions.

        Args:
            kept: for each hidden layer, masks [C, B, H] of `DropoutMasks`; none: no dropout.
        """
        x = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        x = x.expand(self.count, *x.shape)
        for layer in range(len(self.hidden_sizes)):
            x = torch.baddbmm(self.biases[layer], x, self.weights[layer])  # [C, B, H]
            x = self.activation(self._regularised(x, layer, kept))
        # As a sum of products: a CPU takes six times as long for a batched product with a single column
        return (x * self.weights[-1].mT).sum(-1) + self.biases[-1].squeeze(-1)

    def _regularised(self, x: Tensor, layer: int, kept: Sequence[Tensor]) -> Tensor:
        """Dropout and layer norm, as far as they are wanted."""
        keep = 1.0 - self.dropout if kept else 1.0
        if kept:
            x = x.mul_(kept[layer].to(x.dtype))  # in place: nobody else has the product
        if not self.layer_norm:
            return x / keep if kept else x
        x, width = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1]
        # What divides x by `keep` is divided out again, but for ε. Without a scale, PyTorch does not vectorise it
        x = functional.layer_norm(x, (width,), self.ones[:width], eps=1e-5 * keep**2)
        return (x * self.scales[layer]).add_(self.shifts[layer])  # addcmul's backward pass would read x once more


class DropoutMasks:
    """Masks of dropout, drawn again and again: 0 with probability `rate` above 0, else 1; float32.

    Numbers, since a compiler does not vectorise what it fuses with a mask of truth values.

    On the CPU it draws the gaps from one zero to the next, which are geometric: exact, and the cost is that of the
    share dropped, where a draw for each element takes longer than the layer's product does. For the same reason the
    masks drawn last become the next ones, once their zeros are ones again.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._masks, self._zeros = torch.ones(0), torch.empty(0, dtype=torch.int64)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """A mask [count] on the generator's device; on the CPU it holds until the next one is drawn."""
        if generator.device.type != "cpu":
            return torch.empty(count, device=generator.device).bernoulli_(1 - self.rate, generator=generator)
        if len(self._masks) <= count:  # one more, which takes all zeros that lie behind the end
            self._masks = torch.ones(count + 1)
        else:
            self._masks.index_fill_(0, self._zeros, 1.0)
        draws = math.ceil(count * self.rate + 6 * math.sqrt(count * self.rate) + 16)
        places = torch.zeros(1, dtype=torch.float64)
        while places[-1] <= count:  # nearly always once
            gaps = torch.empty(draws, dtype=torch.float64).geometric_(self.rate, generator=generator)
            places = torch.cat((places, places[-1] + gaps.cumsum(0)))
        self._zeros = places[1:].clamp_(max=count + 1).long() - 1
        return self._masks.index_fill_(0, self._zeros, 0.0)[:count]


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
        return (x - self.center).div_(self.deviation).clamp_(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, x: Tensor, fabric: Fabric | None = None, valid: Tensor | None = None) -> None:
        """Adds a batch [*, size]. Given a Fabric, adds those of all ranks, which must call it together.

        `valid` [*]: 0 for rows that are left out, 1 for others; None: all are valid.
        """
        x = x.reshape(-1, self.mean.shape[0]).double()
        if valid is None:
            count = x.new_full((), len(x))
            mean, square = x.mean(0), x.var(0, correction=0)
        else:
            weights, count = valid.reshape(-1, 1), valid.sum().double()
            mean = (x * weights).sum(0) / count.clamp(min=1.0)
            square = ((x - mean).square() * weights).sum(0) / count.clamp(min=1.0)
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


class RewardNormalizer(RunningNormalizer):
    """Divides rewards by the running deviation of the discounted return, so that critics learn numbers of order one.

    The discounted return so far of each environment is not saved with the agent: a run that is resumed begins new
    episodes, unless its environments tell their state.
    """

    def __init__(self, clip: float = 10.0) -> None:
        super().__init__(1, clip)
        self.discounted: Tensor | None = None  # [N]

    @torch.no_grad()
    def scale(self, rewards: Tensor, dones: Tensor, valid: Tensor | None, gamma: float, fabric: Fabric) -> Tensor:
        """Rewards [T, N] of a rollout, scaled and clipped to ±clip, once the statistics have them; on this device.

        `valid` [T N]: 0 for steps that belong to no episode, else 1; None: all do. All ranks must call it together.
        """
        if self.discounted is None:
            self.discounted = torch.zeros_like(rewards[0])
        returns, self.discounted = discounted_returns(rewards, dones, self.discounted, gamma)
        self.update(to_device(returns, self.mean.device), fabric, valid)
        return (to_device(rewards, self.mean.device) / self.deviation).clamp(-self.clip, self.clip)


def make_normalizer(space: Box) -> RunningNormalizer:
    """For vectors, or for the numbers in records, whose images are not normalised.

    Raises:
        ConfigError: there are only images.
    """
    if isinstance(space, Records) and not space.num_floats:
        raise ConfigError("--norm-obs is set: it normalises numbers, but all observations are images")
    return RunningNormalizer(space.num_floats if isinstance(space, Records) else space.shape[0])


def normalized(normalizer: RunningNormalizer, obs: Tensor) -> Tensor:
    """Vectors [*, D], or records [*, R] with their numbers, normalised."""
    if obs.dtype != torch.uint8:
        return normalizer.forward(obs)  # calling the module would take twice as long
    records = obs.clone()
    numbers = floats_of(records, len(normalizer.mean))
    numbers.copy_(normalizer(numbers))
    return records
