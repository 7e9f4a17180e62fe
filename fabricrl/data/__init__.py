"""Rollouts, replay, and the batches that are drawn from them."""

from fabricrl.data.batches import minibatches, shuffled, with_moments
from fabricrl.data.device_buffer import DeviceReplayBuffer
from fabricrl.data.device_rollout import DeviceRecurrentRolloutBuffer, DeviceRolloutBuffer
from fabricrl.data.frames import FrameStack, StackedFrames
from fabricrl.data.replay import NewestSteps, ReplayBuffer
from fabricrl.data.rollout import RecurrentRolloutBuffer, RolloutBuffer
from fabricrl.data.tensor_buffer import TensorReplayBuffer
from fabricrl.utils.batch import Batch

Replay = ReplayBuffer | DeviceReplayBuffer

__all__ = [
    "Batch",
    "DeviceRecurrentRolloutBuffer",
    "DeviceReplayBuffer",
    "DeviceRolloutBuffer",
    "FrameStack",
    "NewestSteps",
    "RecurrentRolloutBuffer",
    "Replay",
    "ReplayBuffer",
    "RolloutBuffer",
    "StackedFrames",
    "TensorReplayBuffer",
    "minibatches",
    "shuffled",
    "with_moments",
]
