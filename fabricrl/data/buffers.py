"""All buffers, each in a module of its own: on-policy rollouts, and off-policy replay.

RolloutBuffer, RecurrentRolloutBuffer               rollout.py         T steps, in the computer's memory
DeviceRolloutBuffer, DeviceRecurrentRolloutBuffer   device_rollout.py  T steps of environments that are tensors
ReplayBuffer, NewestSteps                           replay.py          a ring of transitions, in memory or a file
DeviceReplayBuffer                                  device_replay.py   a ring on the device that trains
TensorReplayBuffer                                  tensor_replay.py   a ring of what tensor environments give
"""

from fabricrl.data.device_replay import DeviceReplayBuffer
from fabricrl.data.device_rollout import DeviceRecurrentRolloutBuffer, DeviceRolloutBuffer
from fabricrl.data.replay import NewestSteps, ReplayBuffer
from fabricrl.data.rollout import RecurrentRolloutBuffer, RolloutBuffer
from fabricrl.data.tensor_replay import TensorReplayBuffer

Replay = ReplayBuffer | DeviceReplayBuffer

__all__ = [
    "DeviceRecurrentRolloutBuffer",
    "DeviceReplayBuffer",
    "DeviceRolloutBuffer",
    "NewestSteps",
    "RecurrentRolloutBuffer",
    "Replay",
    "ReplayBuffer",
    "RolloutBuffer",
    "TensorReplayBuffer",
]
