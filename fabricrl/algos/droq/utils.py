"""What DroQ's script and evaluation share."""

from typing import Any

from gymnasium.vector import VectorEnv

from fabricrl.algos.droq.agent import DroQAgent
from fabricrl.algos.sac.utils import ACTION_SPACES, make_policy
from fabricrl.algos.sac.utils import make_agent as make_sac_agent

__all__ = ["ACTION_SPACES", "make_agent", "make_policy"]  # what evaluate.py looks for


def make_agent(args: Any, envs: VectorEnv) -> DroQAgent:
    """The agent that `args` describe, for these environments."""
    agent = make_sac_agent(args, envs, DroQAgent, dropout=args.dropout, layer_norm=args.layer_norm)
    assert isinstance(agent, DroQAgent)
    return agent
