"""Replay and schedule of updates, which SAC and DroQ share."""

from fabricrl.algos.off_policy.replay import make_buffer, restore_replay
from fabricrl.algos.off_policy.updates import SampleAndTrain, make_schedule

__all__ = ["SampleAndTrain", "make_buffer", "make_schedule", "restore_replay"]
