"""Rollouts, replay, and the batches that are drawn from them."""

from fabricrl.data.batches import minibatches, shuffled, with_moments
from fabricrl.data.buffers import NewestSteps, RecurrentRolloutBuffer, ReplayBuffer, RolloutBuffer, StackedFrames
from fabricrl.utils.batch import Batch

__all__ = [
    "Batch",
    "NewestSteps",
    "RecurrentRolloutBuffer",
    "ReplayBuffer",
    "RolloutBuffer",
    "StackedFrames",
    "minibatches",
    "shuffled",
    "with_moments",
]
