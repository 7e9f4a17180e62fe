"""Acting in a run's rollouts: where the policy acts, what noise it draws, and how its steps are recorded."""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fabricrl.utils.device import Places, to_device, to_host
from fabricrl.utils.metric import MeanMetrics, UpdateMetrics
from fabricrl.utils.update import Runner

WARM_UP, ACTS = 20, 100  # the first ones choose kernels, or capture them


class Acting:
    """The part of a `Run` that acts: where, with what noise, and how steps of tensor environments are captured.

    Attributes:
        player_device: where the policy acts. The others are those of `Run`, which sets them.
    """

    args: Any
    fabric: Any
    uses_tensor_envs: bool
    runner: Runner
    metrics: UpdateMetrics
    losses: MeanMetrics
    clock: Any
    act_rng: torch.Generator
    device_rng: torch.Generator
    all_envs: int
    _envs_here: int
    _first_env: int
    _envs: Any
    _parts: dict[str, Any]

    def act_on(self, device: torch.device) -> None:
        """Has the policy act on this device from now on; forgets what has been recorded for another."""
        self.player_device = device
        self._steps: dict[Any, Callable[..., Any]] = {}  # of rollouts, compiled and captured
        self._player: nn.Module | None = None
        self._acts: dict[nn.Module, Callable[..., Any]] = {}  # compiled, captured, or of inputs that are moved
        self._places: Places = {}

    @property
    def own_envs(self) -> slice:
        """The slice of the environments that this rank sees which it steps itself."""
        first = self._first_env if self.args.num_envs == self.all_envs else 0
        return slice(first, first + self._envs_here)

    def player(self, agent: nn.Module) -> Any:
        """The policy of the coming rollout: the agent, or its copy where acting is faster, with the newest weights."""
        if self.player_device == self.fabric.device:
            return agent
        state = agent.state_dict()
        state = dict(zip(state, to_host(*state.values()), strict=True))
        if self._player is None:
            self._player = copy.deepcopy(agent).to(self.player_device)
        self._player.load_state_dict(state)
        return self._player

    def noise(self, head: Any, steps: int, uniform: bool = False) -> Tensor:
        """Noise of a rollout of T steps for `head.sample`, [T, N, ...], where `act` takes it from.

        `uniform`: numbers in [−1, 1), [T, N, A], that are actions as they are.
        """
        rng = self.device_rng if self.uses_tensor_envs and self.fabric.device.type != "cpu" else self.act_rng
        shape = steps, self.all_envs
        if uniform:
            noise = 2 * torch.rand(*shape, head.num_actions, generator=rng, device=rng.device) - 1
        else:
            noise = head.noise(shape, rng)
        if self.args.num_envs != self.all_envs:  # it is drawn for the environments of all players
            noise = noise.narrow(1, self._first_env, self._envs_here)
        return noise if self.runner.captures and not self.uses_tensor_envs else to_device(noise, self.player_device)

    def take_tensor_steps(self, take_step: Callable[..., None], player: Any, envs: Any, rb: Any, noise: Tensor) -> None:
        """Calls `take_step(run, player, envs, rb, t, noise[t])` for each step t of a rollout in tensor environments.

        Where these are tensor code, a step is compiled like an update, and captured with all others.
        """
        envs.env.draw(len(noise))
        if player not in self._steps:
            step = partial(take_step, self, player, envs, rb)
            self._steps[player] = self.runner.each(step, rb.steps, recorded=envs.env.is_code)
        self._steps[player](noise)
        self.clock.lap("env")

    def take_tensor_step(
        self, take_step: Callable[..., None], player: Any, envs: Any, rb: Any, noise: Tensor, *settings: Any
    ) -> None:
        """Calls `take_step(run, player, envs, rb, noise, *settings)` in tensor environments.

        Where these are tensor code, it is compiled like an update, and captured, once for all settings.
        """

        def step(noise: Tensor) -> tuple:
            take_step(self, player, envs, rb, noise, *settings)
            return ()

        envs.env.draw(1)
        kind = player, *settings
        if kind not in self._steps:
            is_code, runner = envs.env.is_code, self.runner
            self._steps[kind] = runner.captured(runner.compiled(step)) if is_code else step
        self._steps[kind](noise)
        self.clock.lap("env")

    def act(self, player: Any, *inputs: Tensor | None) -> Any:
        """Calls `player.act` on inputs from anywhere; the result stays where it acts, until the next call.

        On a GPU it is one CUDA graph. A policy with memory is compiled with `--compile`; others have too few operations
        to gain from it.
        """
        is_code = self.uses_tensor_envs and self._envs.env.is_code
        if is_code or (self.player_device.type == "cpu" and not self.runner.needs_warmup):
            return player.act(*inputs)
        if player not in self._acts:
            self._acts[player] = self._recorded_act(player)
        return self._acts[player](*inputs)

    def _recorded_act(self, player: Any) -> Callable[..., Any]:
        """`player.act`, compiled or captured, of inputs from anywhere."""
        device = self.player_device
        captures = self.runner.captures and device == self.fabric.device
        is_measured = player not in (self._player, self._parts.get("agent"))  # by `faster_device`, which saves the time
        act = self.runner.compiled(player.act) if hasattr(player, "memory_size") and not is_measured else player.act

        def act_there(*inputs: Tensor | None) -> Any:
            if captures:  # what is on the CPU is pinned, and travels inside the graph
                return act(*(t if t is None else t.to(device, non_blocking=True) for t in inputs))
            return act(*(t if t is None else to_device(t, device) for t in inputs))

        if captures:
            return self.runner.captured(act_there, reused=True)
        return act if device.type == "cpu" else act_there  # on the CPU inputs are there already

    def on_host(self, values: Tensor) -> Tensor:
        """Brings values to the CPU: the one wait for a GPU in a step. They are there until the next come.

        Raises:
            NonFiniteError: a metric or a parameter is not finite since an update that was watched.
        """
        if self.metrics.health is None:
            return values if values.device.type == "cpu" else to_host(values, places=self._places)[0]
        values, health = to_host(values, self.metrics.health, places=self._places)
        if health != 0:
            self.losses.update(self.metrics.fetch())
        return values

    def for_envs(self, actions: Tensor) -> Any:
        """Actions [N, A] as environments are given them: an array; or as they are, where those take tensors."""
        return actions if self.uses_tensor_envs else self.on_host(actions).numpy()


def example_inputs(run: Any, agent: Any) -> list[Tensor | None]:
    """Something to act on: observations, the memory if it has one, noise, and on-policy the mask of actions.

    Each lies where it does in a run: all where the policy acts if environments are tensors; else noise on the CPU, and
    the rest where the policy acts on-policy, as rollouts do.
    """
    num_envs, space, on_policy = run.args.num_envs, run.obs_space, hasattr(run.args, "num_steps")
    where = run.player_device if on_policy or run.uses_tensor_envs else torch.device("cpu")
    kind = torch.uint8 if space.dtype == np.uint8 else torch.float32
    shape = num_envs, *getattr(agent, "obs_shape", space.shape)
    inputs: list[Tensor | None] = [torch.zeros(shape, dtype=getattr(agent, "obs_dtype", kind), device=where)]
    inputs += [torch.zeros(num_envs, agent.memory_size, device=where)] if hasattr(agent, "memory_size") else []
    noise = agent.head.noise((num_envs,), torch.Generator().manual_seed(0))
    inputs.append(noise.to(where) if run.uses_tensor_envs else noise)
    if not on_policy:
        return inputs
    masked = torch.ones(num_envs, run.mask_size, dtype=torch.bool, device=where) if run.mask_size else None
    return [*inputs, masked]


def faster_device(run: Any, agent: Any) -> torch.device:
    """The device on which the agent acts faster, the CPU or the one that trains; rank 0 says so.

    Leaves `run.player_device` as it was.
    """
    before, seconds = run.player_device, {}
    with torch.inference_mode():
        for device in (torch.device("cpu"), run.fabric.device):
            run.player_device, player = device, copy.deepcopy(agent).to(device)
            inputs = example_inputs(run, agent)
            for acts in (WARM_UP, ACTS):
                started = time.perf_counter()
                for _ in range(acts):
                    result = run.act(player, *inputs)
                    to_host(result[0] if isinstance(result, tuple) else result)
                seconds[device] = (time.perf_counter() - started) / acts
    run.player_device = before
    best = min(seconds, key=seconds.__getitem__)
    if run.team.global_rank == 0:
        times = ", ".join(f"{device} {1e6 * taken:.0f} µs" for device, taken in seconds.items())
        print(f"player device: {best} ({times} an action)", file=sys.stderr, flush=True)
    return best
