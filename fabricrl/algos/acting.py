"""The device on which a policy acts faster: the CPU or the one that trains."""

import copy
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fabricrl.utils.device import to_host

WARM_UP, ACTS = 20, 100  # the first ones choose kernels, or capture them


def example_inputs(run: Any, agent: Any) -> list[Tensor | None]:
    """Something to act on: observations, the memory if it has one, noise, and on-policy the mask of actions.

    Each lies where it does in a run: all where the policy acts if environments are tensors; else noise on the CPU, and
    the rest where the policy acts on-policy, as rollouts do.
    """
    num_envs, space, on_policy = run.args.num_envs, run.obs_space, hasattr(run.args, "num_steps")
    where = run.player_device if on_policy or run.tensors else torch.device("cpu")
    kind = torch.uint8 if space.dtype == np.uint8 else torch.float32
    shape = num_envs, *getattr(agent, "obs_shape", space.shape)
    inputs: list[Tensor | None] = [torch.zeros(shape, dtype=getattr(agent, "obs_dtype", kind), device=where)]
    inputs += [torch.zeros(num_envs, agent.memory_size, device=where)] if hasattr(agent, "memory_size") else []
    noise = agent.head.noise((num_envs,), torch.Generator().manual_seed(0))
    inputs.append(noise.to(where) if run.tensors else noise)
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
