"""Training in 16-bit floats: a loss that is scaled so that its gradient neither underflows nor overflows."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.precision import MixedPrecision
from torch import Tensor

from fabricrl.utils.errors import CheckpointError

NUMBERS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
LARGEST = 2.0**127  # finite in float32


class LossScale:
    """Scale of the loss (Micikevicius et al. 2018, arXiv:1710.03740), as `torch.amp.GradScaler` has it.

    It is halved at each gradient that is not finite, whose step is left out, and doubled after 2000 steps in a row with
    one that is. In contrast to torch's it asks no tensor for its value, so that an update can be captured, and looks at
    the gradient after it has been averaged over ranks, which therefore keep the same scale.

    Attributes:
        scale_factor, growth_tracker: the factor, and steps since it has changed; scalars that change in place.
    """

    growth_factor, backoff_factor, growth_interval = 2.0, 0.5, 2000

    def __init__(self, device: torch.device | str) -> None:
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.scale_factor = torch.full((), 2.0**16, device=device)

    def to(self, device: torch.device) -> None:
        """Moves the scale to the device that trains, which is known once ranks have been launched."""
        self.growth_tracker, self.scale_factor = self.growth_tracker.to(device), self.scale_factor.to(device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss that goes into the backward pass."""
        return loss * self.scale_factor.to(loss.device)

    def unscale(self, gradient: Tensor) -> Tensor:
        """The gradient of the loss itself."""
        return gradient / self.scale_factor.to(gradient.device)

    @torch.no_grad()
    def overflows(self, gradient: Tensor) -> Tensor:
        """1.0 if the gradient is not finite, else 0.0; the next loss is scaled accordingly."""
        overflow = 1.0 - gradient.isfinite().all().float()
        tracked = (self.growth_tracker + 1) * (1 - overflow).int()
        grows = tracked >= self.growth_interval
        shrunk = torch.where(overflow > 0, self.backoff_factor, 1.0)
        self.scale_factor.mul_(torch.where(grows, self.growth_factor, shrunk)).clamp_(max=LARGEST)
        self.growth_tracker.copy_(tracked * (~grows).int())
        return overflow

    def tensors(self) -> list[Tensor]:
        return [self.scale_factor, self.growth_tracker]

    def state_dict(self) -> dict[str, Any]:
        """The state, as that of `torch.amp.GradScaler`."""
        values = self.scale_factor.item(), self.growth_factor, self.backoff_factor, self.growth_interval
        return dict(zip(NUMBERS, (*values, self.growth_tracker.item()), strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores scale and steps, in place.

        Raises:
            CheckpointError: they cannot be.
        """
        scale, steps = state["scale"], state["_growth_tracker"]
        if not (0 < scale < float("inf") and 0 <= steps < self.growth_interval):
            raise CheckpointError(f"the scale of the loss cannot be {scale}, unchanged for {steps} steps")
        self.scale_factor.fill_(scale)
        self.growth_tracker.fill_(steps)


class HalfPrecision(MixedPrecision):
    """Fabric's 16-mixed, with this scale of the loss; steps are those of our `Adam`, which deals with the scale."""

    scaler: LossScale  # type: ignore[assignment]

    def __init__(self, device: str) -> None:
        super().__init__("16-mixed", device, scaler=LossScale(device))  # type: ignore[arg-type]

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        return optimizer.step(**kwargs)
