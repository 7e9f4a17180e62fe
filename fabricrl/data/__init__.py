"""Rollouts, replay, and the batches that are drawn from them."""

from fabricrl.data import buffers
from fabricrl.data.batches import minibatches, shuffled, with_moments
from fabricrl.data.buffers import *  # noqa: F403
from fabricrl.data.frames import FrameStack, StackedFrames
from fabricrl.utils.batch import Batch

__all__ = ["Batch", "FrameStack", "StackedFrames", "minibatches", "shuffled", "with_moments"]
__all__ += buffers.__all__
