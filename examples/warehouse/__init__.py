"""An environment of one's own. Importing this package registers it, as `--env-id examples.warehouse:Warehouse-v0` does.

- Warehouse-v0: reward for the delivery alone.
- ShapedWarehouse-v0: also for every cell that the robot gets nearer, by a wrapper that the registration names.
- OilyWarehouse-v0: and the robot slips, on a floor that a function makes, which can wrap as it likes.
"""

from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import WrapperSpec

from examples.warehouse.env import Warehouse
from examples.warehouse.wrappers import ShapeReward, Slip

# A name for messages, where the wrapper is found, and all of its arguments
SHAPED = WrapperSpec("ShapeReward", "examples.warehouse.wrappers:ShapeReward", {"scale": 0.05})


def oily_warehouse(slip: float = 0.1, **kwargs: Any) -> gym.Env:
    """A warehouse with both wrappers. What is given as --env-kwargs arrives here, and so does `render_mode`."""
    return ShapeReward(Slip(Warehouse(**kwargs), slip))


# A battery lasts for 50 moves, so the limit ends an episode only where --env-kwargs give the robot a larger one
LIMIT = 100
gym.register("Warehouse-v0", entry_point=Warehouse, max_episode_steps=LIMIT)
gym.register("ShapedWarehouse-v0", entry_point=Warehouse, max_episode_steps=LIMIT, additional_wrappers=(SHAPED,))
gym.register("OilyWarehouse-v0", entry_point=oily_warehouse, max_episode_steps=LIMIT)
