"""Environments that several players step together: each its own, and all see what every one returns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from fabricrl.envs.episode_infos import episode_infos
from fabricrl.envs.guard import seed_generators
from fabricrl.utils.decoupled import Packet
from fabricrl.utils.errors import RunError
from fabricrl.utils.ranks import all_gather


class Seen(NamedTuple):
    """Each player → all players, after a step or a reset: what its n environments have returned."""

    code: int  # exit code of a fault; nothing else counts then
    obs: Tensor  # [n, R]
    rewards: Tensor  # [n]
    terminated: Tensor  # [n]
    truncated: Tensor  # [n]
    final_obs: Tensor  # [n, R], where an episode has ended
    skipped: Tensor  # [n], steps that only reset
    life_lost: Tensor  # [n]
    masks: Tensor  # [n, L], actions that are allowed next; L is 0 if there are no masks
    told: Tensor  # [n, K], numbers that environments tell at the ends of episodes, NaN where there are none


class SharedEnvs(gym.vector.VectorWrapper):
    """N environments of which this rank steps n, and the other players the rest, at the same time.

    Every player gives the actions for all, and gets what all return, as one that had them to itself would. A fault of
    one ends the step of all: those that it does not concern raise a RunError without text.

    Args:
        env: this rank's environments.
        players: a `Group`.
        resumed: torch's global generator has been restored, and is not seeded again.
        mask_size: S.
        keys: names of the numbers that environments tell.
    """

    def __init__(self, env: VectorEnv, players: Any, resumed: bool, mask_size: int, keys: tuple[str, ...]) -> None:
        super().__init__(env)
        self._players, self._resumed, self._mask_size, self._keys = players, resumed, mask_size, keys
        self._own = env.num_envs
        self._first = players.global_rank * self._own
        self.observation_space = batch_space(env.single_observation_space, self.num_envs)
        self.action_space = batch_space(env.single_action_space, self.num_envs)
        self._packets = [Packet(self._blank()) for _ in range(players.world_size)]
        self._told: list[np.ndarray] = []

    @property
    def num_envs(self) -> int:  # type: ignore[override]
        """N."""
        return int(self._players.world_size * self._own)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple:
        """Starts new episodes: their first observations [N, R]. `seed`: those of all environments, or None."""

        def start() -> tuple:
            own = None if seed is None else seed[self._first : self._first + self._own]
            obs, infos = self.env.reset(seed=own, options=options)
            if seed is not None:
                seed_generators(seed, torch_too=not self._resumed)
            nothing = np.zeros(self._own)
            return obs, nothing, nothing > 0, nothing > 0, infos

        return self._shared(start)[::4]

    def step(self, actions: Any) -> tuple:
        """Takes a step: actions [N, ...] → what `env.step` returns, for all N."""
        return self._shared(lambda: self.env.step(actions[self._first : self._first + self._own]))

    def _shared(self, play: Callable[[], tuple]) -> tuple:
        """Plays, and exchanges with the other players what that has returned, or that it has failed."""
        fault: RunError | None = None
        try:
            seen = self._seen(*play())
        except RunError as error:
            fault, seen = error, self._blank()._replace(code=error.exit_code)
        try:
            return self._exchange(seen)
        finally:
            if fault is not None:
                raise fault

    def take_episode_infos(self) -> np.ndarray:
        """The numbers that environments have told since the last call, [E, K], as those of one rank do."""
        self.env.take_episode_infos()  # type: ignore[attr-defined]  # which are here already
        rows = np.concatenate((np.empty((0, len(self._keys))), *self._told))
        self._told.clear()
        return rows

    def _blank(self) -> Seen:
        space = self.env.single_observation_space
        rows = torch.from_numpy(np.zeros((self._own, *space.shape), space.dtype))  # type: ignore[arg-type, misc]
        flags = torch.zeros(self._own, dtype=torch.bool)
        masks = torch.ones(self._own, self._mask_size, dtype=torch.bool)
        numbers = torch.zeros(self._own, dtype=torch.float64), torch.zeros(self._own, len(self._keys)).double()
        return Seen(0, rows, numbers[0], flags, flags, rows, flags, flags, masks, numbers[1])

    def _seen(
        self, obs: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, infos: dict[str, Any]
    ) -> Seen:
        blank, ended = self._blank(), terminated | truncated
        final_obs, told = blank.final_obs.numpy(), episode_infos(infos)
        for env in np.flatnonzero(ended):
            final_obs[env] = infos["final_obs"][env]
        blank.told.copy_(torch.from_numpy(np.full(blank.told.shape, np.nan) if told is None else told))
        columns = {"obs": obs, "rewards": rewards, "terminated": terminated, "truncated": truncated}
        columns |= {name: infos[name] for name in ("skipped", "life_lost") if name in infos}
        if self._mask_size:
            columns["masks"] = infos["action_mask"]
        tensors: Any = {name: torch.from_numpy(np.asarray(column)) for name, column in columns.items()}
        return blank._replace(**tensors)

    def _exchange(self, seen: Seen) -> tuple:
        buffers = all_gather(self._players, self._packets[0].fill(seen).buffer)  # [P, bytes]
        parts = []
        for packet, buffer in zip(self._packets, buffers, strict=True):
            packet.buffer.copy_(buffer)
            parts.append(packet.read())
        if code := max(part.code for part in parts):
            fault = RunError()  # without text: the player whose fault it is says why
            fault.exit_code = code
            raise fault
        columns = [torch.cat([part[i] for part in parts]).numpy() for i in range(1, len(Seen._fields))]
        obs, rewards, terminated, truncated, final_obs, skipped, life_lost, masks, told = columns
        infos: dict[str, Any] = {"final_obs": final_obs}
        infos |= {name: flags for name, flags in (("skipped", skipped), ("life_lost", life_lost)) if flags.any()}
        if self._mask_size:
            infos["action_mask"] = masks
        if len(rows := told[~np.isnan(told).all(1)]):
            self._told.append(rows)
        return obs, rewards, terminated, truncated, infos
