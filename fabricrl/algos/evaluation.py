"""Evaluation while an agent trains, which leaves training untouched."""

import copy
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from fabricrl.envs.episode_infos import info_keys
from fabricrl.envs.guard import generators_kept
from fabricrl.envs.play import Episodes, play
from fabricrl.envs.vector import make_eval_envs
from fabricrl.utils.errors import RunError
from fabricrl.utils.ranks import all_gather, gather_rows
from fabricrl.utils.seeding import EVAL_STREAM, FIRST_TRAINING_SEED, stream_seed

AGREE_EVERY = 1.0  # seconds, so that no rank waits long for a word of the others


class Evaluation:
    """Plays a copy of the agent greedily, normalisers frozen, on environments and with seeds of its own.

    Each rank has its share of the episodes; of several players the first has all. Seeds are those of the run and the
    step, so that a run that is resumed plays the same episodes again.

    Args:
        algo: the algorithm, whose `utils.py` makes the policy.
        envs: those in training: as many are played side by side, and in the same way.
        masked: whether they have action masks.

    Raises:
        ConfigError, EnvError: the environments cannot be built.
    """

    def __init__(self, args: Any, algo: str, fabric: Any, envs: VectorEnv, masked: bool = False) -> None:
        self._args, self._fabric, rank = args, fabric, fabric.global_rank
        self._utils: Any = importlib.import_module(f"fabricrl.algos.{algo}.utils")
        ranks = 1 if hasattr(args, "players") else fabric.world_size
        self._episodes = len(range(rank, args.eval_episodes, ranks)) if rank < ranks else 0
        num_envs = min(self._episodes, args.num_envs)
        self._envs = make_eval_envs(args, rank, num_envs, masked, envs) if num_envs else None
        self._keys = info_keys(args)
        self._agreed, self._interrupted = time.monotonic(), False

    def play(self, agent: nn.Module, step: int, signals: Any, meanwhile: Callable[[], None]) -> Tensor:
        """Plays this rank's share of the episodes: returns, lengths, and K numbers that were told, [E, 2 + K].

        All ranks call it, and none returns before all have played; they talk every second or so, and call `meanwhile`.
        A signal in `signals`, or a fault, of whichever rank ends it on all of them, without episodes.

        Raises:
            EnvError, NonFiniteError: what an environment did, or what came from it.
        """
        self._signals, self._meanwhile, self._agreed = signals, meanwhile, time.monotonic()
        fault: RunError | None = None
        played = torch.empty(0, 2 + len(self._keys), dtype=torch.float64)
        try:
            played = self._play_share(agent, step)
        except RunError as error:
            fault = error
        except InterruptedError:
            pass
        while self._agree(playing=False, failed=fault is not None):
            pass
        if fault is not None:
            raise fault
        return played

    def _play_share(self, agent: nn.Module, step: int) -> Tensor:
        if self._envs is None:
            return torch.empty(0, 2 + len(self._keys), dtype=torch.float64)
        seed = stream_seed(self._args.seed, EVAL_STREAM, step, self._fabric.global_rank)
        with generators_kept():
            player = copy.deepcopy(agent).cpu().eval()
            policy = self._utils.make_policy(player, self._envs, True, seed)
            first = seed % (FIRST_TRAINING_SEED - self._envs.num_envs)
            episodes = play(self._envs, policy, self._episodes, first, self._after_step)
        self._envs.take_episode_infos()  # type: ignore[attr-defined]  # which are here already
        columns = episodes.returns, episodes.lengths, *episodes.infos.values()
        return torch.from_numpy(np.stack(columns, 1).astype(np.float64))

    def _after_step(self, ended: int) -> None:
        """Raises InterruptedError if a signal has come, or an environment has failed, on whichever rank."""
        if time.monotonic() - self._agreed > AGREE_EVERY:
            self._agree(playing=True)
            if self._interrupted:
                raise InterruptedError

    def _agree(self, playing: bool, failed: bool = False) -> bool:
        """Agrees with the other ranks on signals and faults, and on whether one still plays."""
        told = torch.tensor([playing, failed, self._signals.code])
        players, *ends = all_gather(self._fabric, told).T  # [W] each
        self._interrupted, self._agreed = any(bool(end.any()) for end in ends), time.monotonic()
        self._meanwhile()
        return bool(players.any())

    def charts(self, played: Tensor) -> dict[str, float]:
        """Charts of the episodes [E, 2 + K] of all ranks, which call it together."""
        returns, lengths, *told = gather_rows(self._fabric, played).T.numpy()
        summary = Episodes(returns, lengths, dict(zip(self._keys, told, strict=True))).summary()
        names = ["return_mean", "return_std", "return_min", "return_max", "length_mean"]
        names += [f"{key}_mean" for key in self._keys if f"{key}_mean" in summary]
        return {f"eval/{name}": float(summary[name]) for name in names}

    def close(self) -> None:
        """Closes the environments."""
        if self._envs is not None:
            self._envs.close()
