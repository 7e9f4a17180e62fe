"""Adam over one vector: at the widths of control policies an optimizer step costs calls, not arithmetic."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabricrl.utils.errors import CheckpointError
from fabricrl.utils.precision import LossScale
from fabricrl.utils.ranks import mean_over_ranks
from fabricrl.utils.recording import is_recording


class FlatState:
    """Parameters, their gradient and their moments as vectors [P]; the parameters become views of `vector`."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.sizes = [parameter.numel() for parameter in parameters]
        self.exp_avg = self.exp_avg_sq = torch.zeros(sum(self.sizes))
        self.steps = torch.zeros(len(parameters))  # that each parameter has taken
        self.equal_steps = True
        self.grad: Tensor | None = None
        self.part_size = sum(self.sizes)  # of what a step moves at once
        self.join()

    @torch.no_grad()
    def join(self) -> None:
        """Makes the parameters views of one vector, where they are now: modules move to devices and change types."""
        self.vector = torch.cat([parameter.reshape(-1) for parameter in self.parameters])
        for parameter, part in zip(self.parameters, self.vector.split(self.sizes), strict=True):
            parameter.data = part.view_as(parameter)
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]
        if self.vector.device.type == "cuda":  # which gives each multiprocessor 65 536 numbers of a tensor
            self.part_size = max(1024, math.ceil(len(self.vector) / 32 / 1024) * 1024)
        self.exp_avg, self.exp_avg_sq = (
            moment.to(self.vector, copy=True) for moment in (self.exp_avg, self.exp_avg_sq)
        )
        self.steps = self.steps.to(self.vector.device, copy=True)

    @property
    def is_joined(self) -> bool:
        return [parameter.data_ptr() for parameter in self.parameters] == self._addresses

    @torch.no_grad()
    def load(self, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor) -> None:
        """Loads moments [P], and steps: one number, or one for each parameter."""
        self.exp_avg.copy_(exp_avg)
        self.exp_avg_sq.copy_(exp_avg_sq)
        self.steps.copy_(steps)
        self.compare_steps()

    def compare_steps(self) -> None:
        """Finds out whether all parameters have taken as many steps, once these have been changed."""
        self.equal_steps = bool((self.steps == self.steps[0]).all())

    def gather(self) -> Tensor:
        """The gradients that autograd has left, as one vector; zero where there is none."""
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)
        return torch.cat([grad.reshape(-1) for grad in grads]).to(self.vector.dtype)


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1), which steps all parameters as one vector.

        m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,  θ ← θ − lr · m / (1 − β₁ᵗ) / ( √(v / (1 − β₂ᵗ)) + ε )

    It behaves like `torch.optim.Adam`: it takes the gradients that autograd leaves in `parameter.grad`, and a
    parameter without one keeps its value and its moments. The learning rate,
    `param_groups[0]["lr"]`, is a tensor to be changed in place: a compiled step would not notice another number.

    Attributes:
        scaler: the scale of the losses whose gradients it takes, if they are scaled: with a gradient that is not finite
            then, a step changes nothing.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        super().__init__(trained, {"lr": torch.tensor(lr), "betas": betas, "eps": eps})
        self.flat = FlatState(trained)
        self.scaler: LossScale | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        for parameter in self.flat.parameters:
            parameter.grad = None
        self.flat.grad = None

    @property
    def gradient(self) -> Tensor:
        """The gradient [P], to be changed in place between backward and step."""
        if self.flat.grad is None:
            self.flat.grad = self.flat.gather()
            if self.scaler is not None:
                self.flat.grad = self.scaler.unscale(self.flat.grad)
        return self.flat.grad

    def follow(self) -> None:
        """Follows parameters that have been moved to another device or type."""
        if not self.flat.is_joined:
            self.flat.join()
        group = self.param_groups[0]
        if group["lr"].device != self.flat.vector.device:
            group["lr"] = group["lr"].to(self.flat.vector.device)

    @torch.no_grad()
    def clip_gradient(self, max_norm: float) -> None:
        """Scales the gradient down to the norm `max_norm` if it is larger; 0: never."""
        if max_norm > 0:
            norm = torch.linalg.vector_norm(self.gradient)
            self.gradient.div_(norm.add_(1e-6).div_(max_norm).clamp_(min=1.0))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        self.follow()
        flat = self.flat
        used = [parameter.grad is not None for parameter in flat.parameters]
        flat.equal_steps = flat.equal_steps and all(used)
        columns = flat.vector, self.gradient, flat.exp_avg, flat.exp_avg_sq
        overflow = None if self.scaler is None else self.scaler.overflows(self.gradient)
        taken = 1.0 if overflow is None else 1.0 - overflow
        if flat.equal_steps:
            flat.steps += taken
            size = len(flat.vector) if is_recording() else flat.part_size
            parts = [list(column.split(size)) for column in columns]
            self._move(parts, [flat.steps[0]] * len(parts[0]), overflow)
        else:
            split = [column.split(flat.sizes) for column in columns] + [flat.steps.unbind()]
            *parts, steps = ([part for part, u in zip(column, used, strict=True) if u] for column in split)
            torch._foreach_add_(steps, taken)
            self._move(parts, steps, overflow)
        flat.grad = None

    step.hooked = True  # type: ignore[attr-defined]  # or PyTorch wraps it for its profiler, which costs as much

    def _move(self, parts: list[list[Tensor]], steps: list[Tensor], overflow: Tensor | None = None) -> None:
        """The equations above, for parts (θ, g, m, v) that have counted their step; nothing where `overflow` is 1."""
        group = self.param_groups[0]
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        if not is_recording() and self.flat.vector.device.type in ("cpu", "cuda"):
            settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": 0.0}
            rest = {"amsgrad": False, "maximize": False, "found_inf": overflow}
            torch._fused_adam_(*parts, [], steps, **settings, **rest)  # type: ignore[call-overload]
            return
        kept: Tensor | float = 1.0
        rate1, rate2 = 1 - beta1, 1 - beta2
        if overflow is not None:
            kept = 1.0 - overflow
            rate1, rate2 = rate1 * kept, rate2 * kept
            parts[1] = [torch.where(overflow > 0, 0.0, grad) for grad in parts[1]]
            steps = [step.clamp(min=1.0) for step in steps]
        # Elementary operations, which a compiler fuses
        for vector, grad, exp_avg, exp_avg_sq, step in zip(*parts, steps, strict=True):
            exp_avg.lerp_(grad, rate1)
            exp_avg_sq.mul_(1 - rate2).add_(grad * grad * rate2)
            denominator = (exp_avg_sq.sqrt() / (1 - beta2**step).sqrt()).add_(eps)
            vector.sub_(exp_avg / denominator * (lr * kept / (1 - beta1**step)))

    def state_dict(self) -> dict[str, Any]:
        """The moments as vectors, and the steps: one number, or one for each parameter where they differ."""
        flat = self.flat
        steps = flat.steps[0] if flat.equal_steps else flat.steps
        state = {"step": steps, "exp_avg": flat.exp_avg, "exp_avg_sq": flat.exp_avg_sq}
        group = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        group["lr"] = group["lr"].item()
        has_stepped = self.scaler is not None or flat.steps.any()  # with a scale, all steps may have overflowed so far
        return {"state": {0: state} if has_stepped else {}, "param_groups": [group | {"params": [0]}]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores moments and steps, in place; the learning rate is what the arguments say.

        Raises:
            CheckpointError: they are those of other parameters.
        """
        flat, zeros = self.flat, torch.zeros_like(self.flat.vector)
        state, groups = state_dict["state"], state_dict["param_groups"]
        if not set(state) <= {0} or [group["params"] for group in groups] != [[0]]:
            raise CheckpointError("the optimizer has other groups of parameters there than here")
        for name in ("betas", "eps"):
            if (there := groups[0][name]) != (here := self.param_groups[0][name]):
                raise CheckpointError(f"the optimizer's {name} is {there} in the checkpoint, {here} now")
        stored = state.get(0, {"exp_avg": zeros, "exp_avg_sq": zeros, "step": torch.zeros(())})
        if stored.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise CheckpointError(f"the optimizer's state has {', '.join(map(str, stored))}")
        for name, value in stored.items():
            ours, theirs = flat.steps.shape if name == "step" else flat.vector.shape, value.shape
            if theirs != ours and not (name == "step" and theirs == ()):
                raise CheckpointError(f"the optimizer's {name} is {tuple(theirs)} in the checkpoint, {tuple(ours)} now")
            if not (value.is_floating_point() and value.isfinite().all()) or (name != "exp_avg" and (value < 0).any()):
                raise CheckpointError(f"the optimizer's {name} cannot be: not finite, or negative")
        flat.load(stored["exp_avg"], stored["exp_avg_sq"], stored["step"])

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes."""
        flat, scaler = self.flat, [] if self.scaler is None else self.scaler.tensors()
        return [flat.vector, flat.exp_avg, flat.exp_avg_sq, flat.steps, *scaler]


def average_gradients(fabric: Fabric, optimizer: Adam, metrics: Tensor) -> Tensor:
    """Averages the gradient over ranks, in place, and `metrics` [K] with it, in one collective; the same bits on all.

    Takes the place of DistributedDataParallel's hooks, buckets and further collectives, which cost small networks more
    than their backward pass does.

    Returns:
        the metrics averaged, detached.
    """
    metrics = metrics.detach()
    if fabric.world_size == 1:
        return metrics
    gradient = optimizer.gradient
    parts = mean_over_ranks(fabric, torch.cat((gradient, metrics.to(gradient.dtype))))
    gradient.copy_(parts[: len(gradient)])
    return parts[len(gradient) :].to(metrics.dtype)


def anneal(initial: float, progress: float, enabled: bool) -> float:
    """`initial` scaled linearly to zero as `progress` goes from 0 to 1, or left alone."""
    return initial * (1.0 - progress) if enabled else initial
