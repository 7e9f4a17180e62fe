"""What DroQ's script and evaluation share."""

from typing import Any

from gymnasium.vector import VectorEnv

from fabricrl.algos.droq.agent import DroQAgent
from fabricrl.algos.sac.utils import (
    ACTION_SPACES,
    UpdateSchedule,
    check_room,
    make_buffer,
    make_policy,
    restore_buffer,
)
from fabricrl.algos.sac.utils import make_agent as make_sac_agent

__all__ = [
    "ACTION_SPACES",
    "UpdateSchedule",
    "check_room",
    "make_agent",
    "make_buffer",
    "make_policy",
    "restore_buffer",
]


def make_agent(args: Any, envs: VectorEnv) -> DroQAgent:
    """The agent that `args` describe, for these environments."""
    agent = make_sac_agent(args, envs, DroQAgent, dropout=args.dropout, layer_norm=args.layer_norm)
    assert isinstance(agent, DroQAgent)
    return agent
