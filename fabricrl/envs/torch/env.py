"""The part that all environments in tensor code share: episodes that begin and end, random numbers, and state."""

from typing import Any, ClassVar

import torch
from gymnasium.spaces import Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor


class TorchEnv(VectorEnv):
    """N environments as one tensor of states [N, S]: `reset` and `step` take and return tensors on its device.

    A task is a subclass with the two spaces of a single environment, the number K of random numbers that an episode
    begins with, and three functions of tensors:

        first_state(random)          uniform numbers [N, K] in [0, 1) → states [N, S] that episodes begin in
        next_state(state, actions)   states [N, S], actions [N, ...] → states [N, S], rewards [N], terminated [N], bool
        observe(state)               states [N, S] → observations [N, D]

    None of them asks a tensor for its value (`.item()`, `if x > 0`), and all that changes from step to step is changed
    in place: so a step can be compiled, and captured in a CUDA graph, with the policy that acts.

    Args:
        max_episode_steps: steps after which an episode is truncated.
        device: of all tensors.
        dtype: of states and observations, "float32" or "float64".
        autoreset_mode: "same_step": `step` returns the first observation of the next episode, and the last one of each
            in `infos["final_obs"]`; "next_step": the step after an episode's last only resets, as in Gymnasium's native
            vector environments.

    Attributes:
        state, steps: of the running episodes, [N, S] and [N].
    """

    metadata: dict[str, Any] = {"tensors": True}  # noqa: RUF012  (by which `--vectorization auto` knows them)
    single_observation_space: Space
    single_action_space: Space
    num_random: ClassVar[int]

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int = 1000,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        autoreset_mode: str = "same_step",
    ) -> None:
        modes = {"same_step": AutoresetMode.SAME_STEP, "next_step": AutoresetMode.NEXT_STEP}
        types = {"float32": torch.float32, "float64": torch.float64}
        for name, given, allowed in (("autoreset_mode", autoreset_mode, modes), ("dtype", dtype, types)):
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}: it must be {' or '.join(allowed)}")
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.device, self.dtype = torch.device(device), types[dtype]
        self.metadata = self.metadata | {"autoreset_mode": modes[autoreset_mode]}
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.generator = torch.Generator(self.device)
        self._resets_later = autoreset_mode == "next_step"
        self._random = torch.zeros(1, num_envs, self.num_random, dtype=self.dtype, device=self.device)
        self._next_random = torch.zeros(1, dtype=torch.int64, device=self.device)  # row of `_random`
        self._draws_itself = True
        self.state = self.first_state(self._random[0]).clone()
        self.steps = torch.zeros(num_envs, dtype=torch.int32, device=self.device)
        self._ended = torch.zeros(num_envs, dtype=torch.bool, device=self.device)  # with the step before

    def first_state(self, random: Tensor) -> Tensor:
        raise NotImplementedError

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def observe(self, state: Tensor) -> Tensor:
        raise NotImplementedError

    def told(self, state: Tensor) -> dict[str, Tensor]:
        """Numbers [N] for the infos, such as `is_success`, of the states that a step has led to."""
        return {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Starts new episodes in all environments; a seed starts their random numbers anew."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self._draws_itself = True
        self.state.copy_(self.first_state(self._drawn()))
        self.steps.zero_()
        self._ended.zero_()
        return self.observe(self.state.clone()), {}

    def draw(self, steps: int) -> None:
        """Draws the random numbers of the next `steps` steps. They are functions of tensors alone, then.

        Whoever calls it calls it again before further steps; and with as many steps, where a step has been recorded.
        """
        if len(self._random) != steps:
            self._random = self._random.new_zeros(steps, *self._random.shape[1:])
        self._random.uniform_(generator=self.generator)
        self._next_random.zero_()
        self._draws_itself = False

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Takes a step in every environment: observations [N, D], rewards, terminated and truncated [N], infos.

        Raises:
            TypeError: rewards or `terminated` are not [N], or `terminated` is not bool.
        """
        random = self._drawn()
        state, rewards, terminated = self.next_state(self.state, actions)
        self._check("rewards", rewards)
        self._check("terminated", terminated, torch.bool)
        truncated = self.steps + 1 >= self.max_episode_steps
        infos: dict[str, Any] = self.told(state)
        if self._resets_later:
            resets = self._ended.clone()
            rewards, terminated, truncated = rewards * ~resets, terminated & ~resets, truncated & ~resets
            self._ended.copy_(terminated | truncated)
        else:
            resets = terminated | truncated
            infos["final_obs"] = self.observe(state)
        state = torch.where(resets[:, None], self.first_state(random), state)
        self.state.copy_(state)
        self.steps.add_(1).masked_fill_(resets, 0)
        return self.observe(state), rewards, terminated, truncated, infos

    def _check(self, name: str, values: Any, dtype: torch.dtype | None = None) -> None:
        """Raises TypeError unless `next_state` has returned a value for each environment, of this type if one is given.

        Else values would be broadcast, and an error come up elsewhere.
        """
        is_tensor = isinstance(values, Tensor)
        if not is_tensor or values.shape != (self.num_envs,) or values.dtype != (dtype or values.dtype):
            given = f"{values.dtype} of shape {list(values.shape)}" if is_tensor else type(values).__name__
            allowed = f"a tensor of {dtype or 'numbers'} of shape [{self.num_envs}], one for each environment"
            raise TypeError(f"next_state returned {name} as {given}: it must be {allowed}")

    def _drawn(self) -> Tensor:
        """Random numbers for a step, [N, K]: the next of those drawn ahead, if there are some."""
        if self._draws_itself:
            return torch.empty_like(self._random[0]).uniform_(generator=self.generator)
        random = self._random.index_select(0, self._next_random)[0]
        self._next_random.add_(1).remainder_(len(self._random))
        return random

    def tensors(self) -> list[Tensor]:
        """All that a step changes."""
        return [self.state, self.steps, self._ended, self._next_random]

    def state_dict(self) -> dict[str, Tensor]:
        """All that the steps to come depend on."""
        episodes = {"state": self.state, "steps": self.steps, "ended": self._ended}
        copies = {name: tensor.cpu().clone() for name, tensor in episodes.items()}
        return copies | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state_dict` was called, on a device of the same kind."""
        for name, tensor in (("state", self.state), ("steps", self.steps), ("ended", self._ended)):
            tensor.copy_(state[name])
        self.generator.set_state(state["generator"])
