"""Helpers that act on the parameters of any module."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def orthogonal_init(layer: Layer, gain: float) -> Layer:
    """Orthogonal weights (Saxe et al. 2014) scaled by `gain`, zero bias; in place."""
    nn.init.orthogonal_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def parameter_hash(module: nn.Module) -> Tensor:
    """Eight bytes of the SHA-256 of all parameters and buffers, as an int64 scalar: equal if and only if they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.ndim
            else tensor.detach().cpu().numpy().tobytes()
        )
    return torch.tensor(int.from_bytes(digest.digest()[:8], "big", signed=True))


class AsIs:
    """Tensors by name, for what Fabric has wrapped: it does not look inside.

    In bf16-mixed it would round every tensor that it finds to eight bits, targets and old log-probabilities, too.
    Autocast rounds what goes into products, and nothing else.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]


class VectorAdam(torch.optim.Adam):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) of one vector.

    `update` does what `step` does by one call of PyTorch's fused kernel, where there is one for the vector's device;
    `step` takes three times as long over it on a CPU.
    """

    def __init__(self, vector: nn.Parameter, lr: float) -> None:
        super().__init__([vector], lr=lr, fused=vector.device.type in ("cpu", "cuda"))
        self._vector = vector

    @torch.no_grad()
    def update(self) -> None:
        (group,), vector = self.param_groups, self._vector
        state, grad = self.state[vector], vector.grad
        if not state or grad is None or not group["fused"]:
            self.step()
            return
        tensors = [grad], [state["exp_avg"]], [state["exp_avg_sq"]]
        state["step"] += 1
        beta1, beta2 = group["betas"]
        settings = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": 0.0}
        torch._fused_adam_([vector], *tensors, [], [state["step"]], **settings, amsgrad=False, maximize=False)


class FlatParameters:
    """All parameters of a module as one vector: they become views of it, and it is what an optimizer steps.

    An optimizer, a norm, an average or a message costs one operation instead of one for each parameter, which at the
    widths of control policies is most of its time. Gradients that autograd has left in each parameter, averaged over
    ranks if the module is wrapped by DDP, are put together by `collect_gradients`; others by `set_gradients`.

    Make it once the module is on its device, and load state into the module in place (`load_state_dict` does).
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.vector = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in self._parameters]))  # [P]
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, part in zip(self._parameters, self.vector.data.split(sizes), strict=True):
            parameter.data = part.view_as(parameter)

    def collect_gradients(self) -> None:
        """Moves the parameters' gradients into `vector.grad`; they are None afterwards, ready for the next backward."""
        self.set_gradients([parameter.grad for parameter in self._parameters])  # type: ignore[misc]
        for parameter in self._parameters:
            parameter.grad = None

    def set_gradients(self, grads: Sequence[Tensor]) -> None:
        """Makes `vector.grad` of one gradient for each parameter, in their order.

        Raises:
            RuntimeError: there are more or fewer numbers than in the vector.
        """
        self.vector.grad = torch.cat([grad.reshape(-1) for grad in grads]).to(self.vector.dtype)

    def clip_gradients(self, max_norm: float) -> None:
        """Scales the collected gradients down to the norm `max_norm` if theirs is larger; without waiting for a GPU."""
        grad = self.vector.grad
        assert grad is not None
        grad.mul_((max_norm / (torch.linalg.vector_norm(grad) + 1e-6)).clamp_(max=1.0))
