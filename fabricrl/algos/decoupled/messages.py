"""Declaration of what players and trainers exchange."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fabricrl.utils.decoupled import (
    TRAIN,
    Answer,
    Order,
    State,
)
from fabricrl.utils.optimizer import Adam


class Messages:
    """Declaration of what the two ends exchange; both make one.

    Args:
        data: what a trainer is sent in an iteration, a NamedTuple; its values do not matter.
        metrics: tags of the losses.
        agent: what is trained.
        acting: the optimizer of the parameters that the policy acts with, which come back after each update.
        others: the other optimizers.
        bulk: the record in which data of several iterations travel together, if there are such.
        max_iterations: that travel together.
        extra_parameters: those that other optimizers train and the policy acts with as well, such as an encoder's.

    Attributes:
        full_precision: weights travel to players as they are; else rounded, and a checkpoint brings those that are not.
    """

    full_precision = True

    def __init__(
        self,
        data: Any,
        metrics: tuple[str, ...],
        agent: nn.Module,
        acting: Adam,
        *others: Adam,
        bulk: Any = None,
        max_iterations: int = 1,
        extra_parameters: Iterable[nn.Parameter] = (),
    ) -> None:
        self._extra_parameters = list(extra_parameters)
        self.metrics, self.agent, self.acting, self.max_iterations = metrics, agent, acting, max_iterations
        self._data = {False: data} if bulk is None else {False: data, True: bulk}
        self.optimizers = (acting, *others)
        for optimizer in self.optimizers:
            optimizer.follow()
        trained = {id(parameter) for optimizer in self.optimizers for parameter in optimizer.flat.parameters}
        self._targets = [parameter for parameter in agent.parameters() if id(parameter) not in trained]

    @property
    def weights(self) -> Tensor:
        """The parameters that the policy acts with, [P]; a view if they are those of a single optimizer."""
        vector = self.acting.flat.vector
        extra = [parameter.detach().flatten() for parameter in self._extra_parameters]
        return torch.cat((vector, *extra)) if extra else vector

    @property
    def learned(self) -> list[Tensor]:
        """Tensors that training changes besides: parameters, moments, and what follows parameters, as targets do."""
        vector, *moments = self.acting.tensors()
        others = [tensor for other in self.optimizers[1:] for tensor in other.tensors()]
        return moments + others + self._targets + ([] if self.full_precision else [vector])

    @torch.no_grad()
    def load_weights(self, weights: Tensor) -> None:
        """Takes the parameters [P] that the policy is to act with."""
        owns = [self.acting.flat.vector, *self._extra_parameters]
        for own, part in zip(owns, weights.split([own.numel() for own in owns]), strict=True):
            own.copy_(part.view_as(own))

    @torch.no_grad()
    def load(self, learned: list[Tensor]) -> None:
        """Takes what the other end has learned."""
        for own, sent in zip(self.learned, learned, strict=True):
            own.copy_(sent)
        for optimizer in self.optimizers:
            optimizer.flat.compare_steps()

    @torch.no_grad()
    def round_weights(self) -> None:
        """Rounds the parameters of a player to those that it would have been sent."""
        if not self.full_precision:
            self.load_weights(self.weights.bfloat16())

    def orders(self) -> dict[bool, Order]:
        """The Order of each kind: False, of one iteration; True, of several."""
        return {bulk: Order(TRAIN, 0, 0, 0, False, False, False, data) for bulk, data in self._data.items()}

    def answer(self) -> Answer:
        weights = self.weights if self.full_precision else self.weights.bfloat16()
        return Answer(0, 0, 0.0, 0.0, torch.zeros(2, len(self.metrics), dtype=torch.float64), weights)

    def state(self, count: int) -> State:
        return State(torch.zeros(count, 2, *torch.get_rng_state().shape, dtype=torch.uint8), self.learned)
