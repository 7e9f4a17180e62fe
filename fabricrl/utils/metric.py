"""Counters and clocks of a run: episodes, losses, and where the seconds go."""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from fabricrl.utils.device import to_host
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.optimizer import Adam
from fabricrl.utils.ranks import all_gather, gather_rows

WINDOW = 100  # episodes that the running mean return looks back on


class EpisodeStatistics:
    """Returns and lengths of the episodes that end in a rollout, on every rank.

    Works on whole rollouts: its cost is that of the episodes that ended, not of the steps taken.

    Args:
        keys: names of K numbers that environments may tell at the end of an episode.

    Attributes:
        returns: the newest ones; count: of all episodes, those of a run that is resumed included.
        ended: episodes counted here; told: those of `keys` that were there at the end of one.
    """

    def __init__(self, num_envs: int, keys: Sequence[str] = ()) -> None:
        self.returns: deque[float] = deque(maxlen=WINDOW)
        self.count = self.ended = 0
        self.keys, self.told = keys, set[str]()
        self._sums, self._counts = torch.zeros(
            2, 2 + len(keys), dtype=torch.float64
        )  # since the last call of `compute`
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []  # rewards and dones, [N] each
        self._return = np.zeros(num_envs)  # of the episodes that are still running
        self._length = np.zeros(num_envs, dtype=np.int64)

    def update(
        self,
        fabric: Fabric,
        rewards: Tensor,
        dones: Tensor,
        skipped: Tensor | None = None,
        infos: np.ndarray | None = None,
    ) -> None:
        """Takes the raw rewards and dones [T, N] of this rank's rollout; all ranks must call it together.

        Args:
            skipped: steps between episodes, which count for neither.
            infos: what was told at the ends of some of the episodes, [up to E, K], NaN where there was nothing.
        """
        steps = np.ones(dones.shape, dtype=np.int64) if skipped is None else (~skipped).numpy().astype(np.int64)
        own = self._ended(rewards.numpy(), dones.numpy(), steps)  # [E, 3]
        told = own.new_full((len(own), len(self.keys)), torch.nan)
        if infos is not None:  # of which episodes does not matter: means are taken of each column
            told[: len(infos)] = torch.from_numpy(infos)
        ended = gather_rows(fabric, torch.cat((own, told), 1))
        in_time = ended[:, 0].argsort(stable=True)  # so that the last are of all ranks
        ended = ended[in_time, 1:]  # [E, 2 + K]
        self.returns.extend(ended[:, 0].tolist())
        self._count(len(ended), ended.nansum(0), (~ended.isnan()).sum(0))

    def add_summary(self, fabric: Fabric, summary: Tensor) -> None:
        """Takes what `DeviceEpisodes.summary` has found on this rank, on the CPU; all ranks must call it together."""
        parts = all_gather(fabric, summary)  # [W, ...]
        columns = 2 + len(self.keys)
        sums, counts = parts[:, : 2 * columns].sum(0).chunk(2)
        newest = parts[:, 2 * columns :].reshape(-1, 2)  # [W WINDOW, 2]: step and return
        newest = newest[~newest[:, 0].isnan()]
        in_time = newest[:, 0].argsort(stable=True)
        self.returns.extend(newest[in_time, 1].tolist())
        self._count(int(counts[0]), sums, counts)

    def _count(self, ended: int, sums: Tensor, counts: Tensor) -> None:
        """Counts episodes: sums and counts of return, length and each of `keys`, [2 + K]."""
        self.count, self.ended = self.count + ended, self.ended + ended
        self._sums, self._counts = self._sums + sums, self._counts + counts
        self.told |= {key for key, count in zip(self.keys, counts[2:].tolist(), strict=True) if count}

    def add(self, rewards: np.ndarray, dones: np.ndarray) -> None:
        """Keeps one step, [N] each, for `flush`: where a rollout is a single step, counting each would cost more."""
        self._steps.append((rewards.copy(), dones))

    @property
    def num_pending(self) -> int:
        """Steps kept since the last flush."""
        return len(self._steps)

    def flush(self, fabric: Fabric, infos: np.ndarray | None = None) -> None:
        """`update` with the steps kept since the last flush; all ranks must call it together."""
        if self._steps:
            rewards, dones = (torch.from_numpy(np.stack(column)) for column in zip(*self._steps, strict=True))
            self._steps.clear()
            self.update(fabric, rewards, dones, infos=infos)

    def compute(self) -> dict[str, float]:
        """Means over the episodes that ended on any rank since the last call, nothing if none did: of returns, lengths,
        and each of `keys` over the episodes that had it."""
        names = ("episodic_return", "episodic_length", *self.keys)
        means = zip(names, (self._sums / self._counts).tolist(), strict=True)  # NaN where there is nothing
        self._sums, self._counts = torch.zeros(2, len(names), dtype=torch.float64)
        return {f"charts/{name}": mean for name, mean in means if mean == mean}

    def _ended(self, rewards: np.ndarray, dones: np.ndarray, steps: np.ndarray) -> Tensor:
        """Rows (step, return, length) of the episodes that end in this rollout, in the order in which they end."""
        rows = []
        start = np.zeros(len(self._return), dtype=np.int64)  # first step of the running episode in this rollout
        for t, env in np.argwhere(dones):
            total = self._return[env] + rewards[start[env] : t + 1, env].sum(dtype=np.float64)
            rows.append((t, total, self._length[env] + steps[start[env] : t + 1, env].sum()))
            self._return[env], self._length[env], start[env] = 0.0, 0, t + 1
        for env, first in enumerate(start):
            self._return[env] += rewards[first:, env].sum(dtype=np.float64)
            self._length[env] += steps[first:, env].sum()
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)

    @property
    def mean_return(self) -> float:
        """Mean return of the last 100 episodes of all ranks; NaN before the first has ended."""
        return sum(self.returns) / len(self.returns) if self.returns else float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {"returns": list(self.returns), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.returns.extend(state["returns"])
        self.count = state["count"]


class DeviceEpisodes:
    """Returns and lengths of the episodes of environments that are on a device, found there: no value is asked for.

    Where a rollout is a single step, `add` keeps it, for `take_summary` to sum up many in one go.

    Args:
        num_keys: K, numbers that environments tell at the ends of episodes.
        max_steps: that `add` can keep, S.

    Attributes:
        returns, lengths: of the episodes that are still running, [N].
    """

    def __init__(self, num_envs: int, device: torch.device, num_keys: int = 0, max_steps: int = 0) -> None:
        self.returns, self.lengths = torch.zeros(2, num_envs, dtype=torch.float64, device=device)
        self._rewards = torch.zeros(max_steps, num_envs, device=device)
        self._ends, self._skipped = torch.zeros(2, max_steps, num_envs, dtype=torch.bool, device=device)
        self._infos = torch.full((max_steps, num_envs, num_keys), torch.nan, device=device)
        self._untold, self._played = self._infos.new_full((num_envs, num_keys), torch.nan), self.returns > 0
        self._count = torch.zeros(1, dtype=torch.int64, device=device)  # of steps kept

    def add(self, rewards: Tensor, ends: Tensor, infos: dict[str, Tensor]) -> None:
        """Keeps one step, [N] each, with the infos of `TensorEnvs`. May be captured."""
        columns = [(self._rewards, rewards), (self._ends, ends)]
        columns += [(self._skipped, infos.get("skipped", self._played))]
        columns += [(self._infos, infos.get("episode_info", self._untold))]
        for column, values in columns:
            column.index_copy_(0, self._count, values[None])
        self._count += 1

    def take_summary(self, steps: int) -> Tensor:
        """`summary` of the steps kept since the last call, which the caller has counted."""
        self._count.zero_()
        return self.summary(self._rewards[:steps], self._ends[:steps], self._skipped[:steps], self._infos[:steps])

    def tensors(self) -> list[Tensor]:
        """All that `add` changes, but for what has not been counted yet."""
        return [self._count]

    def summary(self, rewards: Tensor, ends: Tensor, skipped: Tensor, infos: Tensor) -> Tensor:
        """Sums over the episodes that end in a rollout, and the newest of them, as one vector for the CPU.

        Args:
            rewards, ends, skipped: [T, N]; skipped steps count for no episode.
            infos: what was told at the ends of episodes, [T, N, K], NaN where there was nothing.

        Returns:
            sums of return, length and each of the K numbers; how many there are of each; and step and return of the
            last WINDOW episodes in the order in which they ended, NaN where there are fewer: [2 (2 + K) + 2 WINDOW].
        """
        steps = torch.arange(len(ends), device=ends.device)[:, None]  # [T, 1]
        last = torch.where(ends, steps, -1).cummax(0).values  # the step with which an episode has last ended
        before = torch.cat((torch.full_like(last[:1], -1), last[:-1]))
        own = []
        for values, running in ((rewards.double(), self.returns), ((~skipped).double(), self.lengths)):
            sums = values.cumsum(0) + running  # [T, N], over episodes
            own.append(sums - torch.where(before < 0, 0.0, sums.gather(0, before.clamp(min=0))))
            running.copy_(sums[-1] - torch.where(last[-1] < 0, 0.0, sums.gather(0, last[-1:].clamp(min=0))[0]))
        columns = torch.cat((torch.stack(own, -1), infos), -1)  # [T, N, 2 + K]
        there = ends[..., None] & ~columns.isnan()
        totals = torch.where(there, columns, 0.0).sum((0, 1))

        number = ends.flatten().cumsum(0)  # of the episode that ends there, from 1
        place = number - 1 - (number[-1] - WINDOW)  # among the newest
        place = torch.where(ends.flatten() & (place >= 0), place, WINDOW)  # others go to a row that is cut off
        rows = torch.stack((steps.expand_as(ends).double(), own[0]), -1).flatten(0, 1)  # [T N, 2]
        newest = rows.new_full((WINDOW + 1, 2), torch.nan).index_copy_(0, place, rows)[:WINDOW]
        return torch.cat((totals, there.sum((0, 1)).double(), newest.flatten()))


class MeanMetrics:
    """Means of scalar tensors, kept on their device until they are asked for: nothing here waits for a GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def update(self, metrics: dict[str, Tensor]) -> None:
        """Adds scalars, or tensors of any shape whose elements count alike."""
        for name, value in metrics.items():
            self.add(name, value.sum(), value.numel())

    def add(self, name: str, total: Tensor, count: int) -> None:
        """Adds `count` elements of which the sum is known."""
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] += count

    def compute(self) -> dict[str, float]:
        """The means since the last call; forgets them."""
        means = {name: total.item() / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


class UpdateMetrics:
    """Metrics of updates, kept on their device until they are fetched, which also finds NaN and infinity.

    Args:
        optimizers: whose parameters are checked as well; there may be more of them later.

    Attributes:
        health: 0 where all that was watched was finite, else NaN, a scalar on its device; None before anything was.
    """

    def __init__(self, optimizers: Sequence[Adam]) -> None:
        self._optimizers = optimizers
        self._kept: dict[tuple[str, ...], list[Tensor]] = {}
        self.health: Tensor | None = None

    @property
    def num_pending(self) -> int:
        """Number of updates kept since they were fetched last, or of groups of them."""
        return sum(map(len, self._kept.values()))

    def add(self, tags: tuple[str, ...], metrics: Tensor) -> None:
        """Keeps the metrics of one update [tags], or of several [K, tags].

        Raises:
            ValueError: there are more metrics than tags, or fewer.
        """
        if not metrics.numel():
            return
        if metrics.shape[-1] != len(tags):
            raise ValueError(f"{metrics.shape[-1]} metrics have {len(tags)} names: {', '.join(tags)}")
        self._kept.setdefault(tags, []).append(metrics.view(-1, len(tags)))

    def watch(self, metrics: Iterable[Tensor]) -> None:
        """Keeps in `health` if these and all parameters are finite, without a wait. May be captured."""
        watched = (*metrics, *(optimizer.flat.vector for optimizer in self._optimizers))
        if self.health is None:
            self.health = torch.zeros((), device=watched[0].device)
        self.health += 0.0 * torch.cat([values.reshape(-1) for values in watched]).sum()  # 0, or NaN for good

    def is_healthy(self) -> bool:
        """Tells if all that was watched was finite; this waits for a GPU."""
        return self.health is None or not to_host(self.health)[0].item()

    def fetch(self) -> dict[str, Tensor]:
        """Returns the metrics kept since the last call, [K] under each tag, on the CPU; this waits for a GPU.

        Raises:
            NonFiniteError: a metric or a parameter is not finite, as it is once a gradient was not.
        """
        parameters = {
            f"parameters of optimizer {i}": optimizer.flat.vector for i, optimizer in enumerate(self._optimizers)
        }
        metrics: dict[str, Tensor] = {}
        for tags, kept in self._kept.items():
            metrics |= dict(zip(tags, torch.cat(kept).unbind(1), strict=True))  # [K] each
        checked = metrics | parameters
        finite = torch.stack([values.isfinite().all() for values in checked.values()])
        finite, *values = to_host(finite, *metrics.values())
        if not finite.all():
            bad = [name for name, good in zip(checked, finite.tolist(), strict=True) if not good]
            raise NonFiniteError(f"not finite after the update: {', '.join(bad)}")
        self.forget()  # if the health was not 0, a sum was too large, and all of its terms are finite
        return dict(zip(metrics, values, strict=True))

    def forget(self) -> None:
        """Drops what has been kept and watched."""
        self._kept.clear()
        if self.health is not None:
            self.health.zero_()


class Stopwatch:
    """Splits wall-clock time into named shares: each `lap(name)` charges the time since the last one to `name`.

    A name that is not given here has a share from its first lap on.
    """

    def __init__(self, *names: str) -> None:
        self._seconds = dict.fromkeys(names, 0.0)
        self._before = dict.fromkeys(names, 0.0)  # up to the last call of `shares`
        self._last = perf_counter()

    def restart(self) -> None:
        """Forgets what has passed."""
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._before = dict.fromkeys(self._seconds, 0.0)
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        now = perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def totals(self) -> dict[str, float]:
        """Seconds charged to each name since the start."""
        return {name: self._before.get(name, 0.0) + seconds for name, seconds in self._seconds.items()}

    def shares(self) -> dict[str, float]:
        """`time/<name>` → share of the time since the last call, between 0 and 1; starts anew."""
        total = sum(self._seconds.values()) or 1.0
        shares = {f"time/{name}": seconds / total for name, seconds in self._seconds.items()}
        self._before = self.totals
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return shares
