"""An environment that answers in many forms, right and wrong. Its processes start without torch unless they need it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Text, Tuple

from tests.envs import ODD_SPACES


def tensor(values: Any, dtype: str | None = None, requires_grad: bool = False) -> Any:
    import torch

    return torch.tensor(values, dtype=getattr(torch, dtype) if dtype else None, requires_grad=requires_grad)


FORMS: dict[str, Callable[[np.ndarray], Any]] = {  # in which the same numbers come
    "array": np.array,
    "list": lambda x: x.tolist(),
    "tuple": lambda x: tuple(x.tolist()),
    "tensor": tensor,
    "parameter": lambda x: tensor(x, requires_grad=True),
    "double": lambda x: x.astype(np.float64),
    "scalars": lambda x: list(x),
}
REWARDS: dict[str, Any] = {
    "float": 1.5,
    "double": np.float64(1.5),
    "single": np.float32(1.5),
    "array": np.array(1.5),
    "row": np.array([1.5]),
    "column": np.array([[1.5]]),
    "list": [1.5],
    "tensor": partial(tensor, [1.5]),
    "integer": 1,
    "truth": True,
    "two": np.array([1.0, 2.0]),
    "none": None,
    "text": "1.5",
    "empty": np.zeros(0),
}
ENDS: dict[str, Callable[[bool], Any]] = {
    "bool": bool,
    "numpy": np.bool_,
    "row": lambda end: np.array([end]),
    "integer": int,
    "tensor": tensor,
    "none": lambda end: end or None,
    "two": lambda end: np.array([end, end]),
}
PAIR = Box(-9.0, 9.0, (2,), np.float32)
BYTES = Box(0, 255, (4,), np.uint8)
MISFITS: dict[str, tuple[Space, Any, str]] = {  # space, what is returned, and what is said of it
    "turned": (Box(-9.0, 9.0, (2, 3), np.float32), np.arange(6.0).reshape(3, 2), "shape (3, 2)"),
    "flat": (Box(-9.0, 9.0, (2, 3), np.float32), np.arange(6.0), "shape (6,)"),
    "short": (PAIR, np.zeros(1, np.float32), "shape (1,)"),
    "number": (PAIR, 1.0, "shape ()"),
    "ragged": (PAIR, [[1.0], [1.0, 2.0]], "is no array"),
    "half": (PAIR, partial(tensor, [0.0, 0.0], "bfloat16"), "is no array"),
    "text": (PAIR, "ab", "of type str"),
    "texts": (PAIR, ["1.0", "2.0"], "of type list"),
    "none": (PAIR, None, "of type NoneType"),
    "complex": (PAIR, np.zeros(2, complex), "not an array of numbers"),
    "mapping": (PAIR, {"a": 1.0, "b": 2.0}, "of type dict"),
    "fractions": (Box(0, 1, (3,), np.int64), np.array([0.3, 0.6, 0.9]), "0.3, which is not an integer"),
    "not a number": (Box(0, 1, (3,), np.int64), np.array([0.0, np.nan, 1.0]), "nan, which is not an integer"),
    "infinite": (Box(0, 1, (3,), np.int64), np.array([0.0, 1.0, np.inf]), "inf, which is out of range"),
    "large bytes": (BYTES, np.array([300, 0, 3, 4]), "300, which is out of range"),
    "negative bytes": (BYTES, np.array([3, -5, 3, 4]), "-5, which is out of range"),
    "large integers": (Box(0, 5, (2,), np.int64), np.array([1, 6]), "6, which is out of range"),
    "truth": (Box(0, 1, (2,), np.bool_), np.array([0, 2]), "2, which is out of range"),
    "choice below": (Discrete(5), -1, "-1, which is out of range"),
    "choice above": (Discrete(5), np.int64(5), "5, which is out of range"),
    "choice before its start": (Discrete(5, start=3), 2, "2, which is out of range"),
    "half a choice": (Discrete(5), 1.5, "1.5, which is not an integer"),
    "two choices": (Discrete(5), np.array([1, 2]), "shape (2,)"),
    "one of many choices": (MultiDiscrete([2, 3]), np.array([2, 0]), "2, which is out of range"),
    "before their start": (MultiDiscrete([2, 3], start=[1, -1]), np.array([0, 0]), "0, which is out of range"),
    "bits": (MultiBinary(3), np.array([0, 2, 1], np.int8), "2, which is out of range"),
    "swapped": (
        Dict({"a": PAIR, "b": Box(-9.0, 9.0, (3,), np.float32)}),
        {"a": np.ones(3), "b": np.ones(2)},
        "part 'a' of an observation of shape (3,)",
    ),
    "missing part": (Dict({"a": PAIR, "b": PAIR}), {"a": np.zeros(2)}, "an observation of a;"),
    "another part": (Dict({"a": PAIR}), {"a": np.zeros(2), "zz": np.zeros(3)}, "of a, zz; its space"),
    "parts in a row": (Dict({"a": PAIR}), np.zeros(2), "of type ndarray"),
    "nested": (Dict({"a": Dict({"b": Discrete(3)})}), {"a": {"b": 3}}, "part 'a.b' of an observation with 3"),
    "nested row": (Dict({"a": Dict({"b": Discrete(3)})}), {"a": 3}, "part 'a' of an observation of type int"),
    "too many": (Tuple((Discrete(2), Discrete(2))), (0, 1, 1), "an observation of 3 parts"),
    "second": (Tuple((Discrete(2), Discrete(2))), (0, 2), "part '1' of an observation with 2"),
    "beside an image": (
        Dict({"img": Box(0, 255, (40, 40, 3), np.uint8), "n": Box(0, 1, (2,), np.int64)}),
        {"img": np.zeros((40, 40, 3), np.uint8), "n": np.array([0.3, 0.9])},
        "part 'n' of an observation with 0.3",
    ),
}

NESTED = Dict(
    {
        "arm": Dict({"angle": Box(-1.0, 1.0, (2,), np.float32), "grip": Tuple((Discrete(2), MultiBinary(2)))}),
        "hint": Text(8),
        "gear": Discrete(3, start=5),
    }
)
LATE: dict[str, tuple[Space, Any, str]] = MISFITS | {  # what fits, or is noticed in another way
    "beyond": (PAIR, np.array([0.0, 9.5], np.float32), "9.5, which is out of range"),
    "beyond in a list": (PAIR, [0.0, 9.5], "9.5, which is out of range"),
    "beyond in a part": (Dict({"a": PAIR}), {"a": np.array([0.0, 9.5])}, "9.5, which is out of range"),
    "nan": (PAIR, np.array([0.0, np.nan], np.float32), "not finite"),
    "inf": (PAIR, np.array([0.0, np.inf], np.float32), "not finite"),
    "whole": (NESTED, {"arm": {"angle": [0.25, -0.5], "grip": (1, [0, 1])}, "hint": "go", "gear": 6}, ""),
}


class Answering(gym.Env):
    """Answers in many forms, episodes of five steps; `late` is what it returns from step `at` on, at 0 from a reset.

    Args:
        form: of observations, see FORMS; reward, end: see REWARDS, ENDS.
        space: a name in ODD_SPACES; late: in LATE; at: of an episode.
        cut: episodes are truncated, not terminated.
    """

    def __init__(
        self,
        form: str = "array",
        reward: str = "float",
        end: str = "bool",
        space: str = "box",
        late: str = "",
        at: int = 0,
        cut: bool = False,
        discrete: bool = False,
    ) -> None:
        self.form, self.reward, self.end, self.late, self.at, self.cut = form, reward, end, late, at, cut
        self.observation_space = LATE[late][0] if late else ODD_SPACES[space]
        self.action_space = Discrete(2) if discrete else Box(-1.0, 1.0, (1,), np.float32)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._steps = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        end = ENDS[self.end](self._steps >= 5)
        reward = REWARDS[self.reward]
        return self._obs(), reward() if callable(reward) else reward, *((False, end) if self.cut else (end, False)), {}

    def _obs(self) -> Any:
        if self.late and self._steps >= self.at:
            value = LATE[self.late][1]
            return value() if callable(value) else value
        obs = self.observation_space.sample()
        return FORMS[self.form](obs) if isinstance(obs, np.ndarray) else obs


gym.register("Answering-v0", entry_point=Answering)
