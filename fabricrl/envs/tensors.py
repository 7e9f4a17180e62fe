"""Environments that take and return tensors, as a script sees them: `--vectorization torch`."""

import importlib
import json
import os
import sys
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor

from fabricrl.envs.episode_infos import info_keys
from fabricrl.envs.options import DEFAULTS, option
from fabricrl.envs.packing import velocities
from fabricrl.envs.simulators import register, simulator_of
from fabricrl.envs.spaces import text_of
from fabricrl.utils.errors import ConfigError, EnvError

ALLOWED = {"mask_velocities"}  # of the arguments that change environments
CPU = torch.device("cpu")


def takes_tensors(args: Any) -> bool:
    """Tells if the environments of a run take and return tensors: where that is asked for, and with `auto` where they
    say so, by `metadata["tensors"]` of what is registered as `vector_entry_point`, and where that is all there is.

    If an argument needs the single form, and there is one, `auto` does not choose tensors.
    """
    if args.vectorization != "auto" or not _is_able(vars(args)):
        return args.vectorization == "torch"
    if not are_tensors(args.env_id):
        return False
    try:
        check_arguments(args)
    except ConfigError:
        return not has_single(args.env_id)
    return True


def _is_able(args: dict[str, Any]) -> bool:
    """Tells if the script with these arguments keeps what it plays on a device: those that are decoupled do not."""
    return "max_lag" not in args


def are_tensors(env_id: str) -> bool:
    """Tells if an id is registered with a vector environment that says it takes and returns tensors, or JAX's arrays,
    or with nothing else."""
    spec = _spec(env_id)
    if spec is not None and spec.vector_entry_point is not None and spec.entry_point is None:
        return True
    metadata = _metadata(env_id)
    return bool(metadata.get("tensors", False) or metadata.get("jax", False))


def _metadata(env_id: str) -> dict[str, Any]:
    """Metadata of the vector environment that an id is registered with; {} if it cannot be imported."""
    spec = _spec(env_id)
    entry = None if spec is None else spec.vector_entry_point
    try:
        creator = load_env_creator(entry) if isinstance(entry, str) else entry
    except (ImportError, AttributeError):  # for those to tell who build it
        return {}
    return getattr(creator, "metadata", None) or {}


def make(args: Any, device: torch.device | str) -> VectorEnv:
    """Builds the vector environment of a run, on a device; one in JAX by its functions."""
    kwargs = json.loads(args.env_kwargs)
    build = partial(gym.make_vec, args.env_id, args.num_envs, vectorization_mode="vector_entry_point")
    if not _metadata(args.env_id).get("jax", False):
        return build(**kwargs, device=str(device))
    from fabricrl.envs.simulators.functional import as_tensors  # here, as it brings JAX

    return as_tensors(build(**kwargs), str(device))


def were_tensors(args: dict[str, Any]) -> bool:
    """Tells if the environments of a run with these arguments, from its checkpoint, took and returned tensors."""
    kind = args.get("vectorization")
    return kind == "torch" or (kind == "auto" and _is_able(args) and are_tensors(args["env_id"]))


def has_single(env_id: str) -> bool:
    """Tells if an id is also registered as a single environment, which can be drawn."""
    spec = _spec(env_id)
    return spec is not None and spec.entry_point is not None


def _spec(env_id: str) -> Any:
    """Registration of an id, or None; imports its module."""
    module, _, name = env_id.rpartition(":")
    if module:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(module)
        except Exception:  # which building it will tell
            return None
    register(env_id)
    return gym.registry.get(name)


def check_arguments(args: Any) -> None:
    """Raises ConfigError if an argument is set that tensor environments cannot follow, or this script cannot."""
    if not _is_able(vars(args)):
        raise ConfigError("--vectorization torch: decoupled scripts play on the CPU, and take another one")
    spec = _spec(args.env_id)
    if spec is not None and spec.vector_entry_point is None:
        ours = ", ".join(sorted(known.id for known in gym.registry.values() if known.namespace == "torch"))
        raise ConfigError(f"--vectorization torch: {args.env_id} has no vector_entry_point, unlike {ours}")
    for name, default in DEFAULTS.items():
        if name not in ALLOWED and option(args, name) != default:
            flag, why = "--" + name.replace("_", "-"), "it needs --vectorization sync or async, not torch"
            if name == "capture_video":
                why = "tensor environments are not drawn while they train; evaluate.py --capture-video draws one"
            raise ConfigError(f"{flag} is set: {why}")
    for name in ("check_spaces", "buffer_memmap", "implicit_next_obs"):
        if getattr(args, name, False):
            raise ConfigError(f"--{name.replace('_', '-')} is set: it needs another --vectorization than torch")
    if simulator_of(args.env_id) == "isaaclab" and args.eval_every > 0:
        raise ConfigError(
            "--eval-every is set: Isaac Lab has one simulation a process, which trains; evaluate.py plays checkpoints"
        )


def trial_device(args: Any) -> torch.device:
    """The device that this process will train on, as far as arguments and launchers tell before Fabric has started."""
    chosen = "cuda" if args.cuda else args.accelerator or os.environ.get("LT_ACCELERATOR", "cpu")
    if chosen not in ("cuda", "gpu", "auto") or not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    listed = [int(gpu) for gpu in args.devices.split(",") if gpu] if "," in (args.devices or "") else []
    gpu = listed[rank] if rank < len(listed) else rank
    return torch.device("cuda", gpu if gpu < torch.cuda.device_count() else 0)


class TensorEnvs(VectorWrapper):
    """N environments on a device, with vectors [N, D] of float32 as observations, and actions as policies draw them.

    `step` takes actions [N, A] and returns observations, rewards [N], terminated and truncated [N], bool, and infos:
    `final_obs` [N, D], `skipped` [N] where a step may only reset, and `episode_info` [N, K], what was told of episodes
    that have ended, NaN where there is nothing. Nothing in a step asks a tensor for its value.

    Attributes:
        is_code: whether a step is tensor code between two calls of `draw`, and may be compiled and captured.

    Raises:
        ConfigError: spaces or ways to reset that are not supported.
        EnvError: later, `reset` or `step` returned something else than their spaces promise.
    """

    def __init__(self, envs: VectorEnv, args: Any, device: torch.device | str = CPU) -> None:
        super().__init__(envs)
        name, mode = args.env_id, envs.metadata.get("autoreset_mode")
        space, self._actions = envs.single_observation_space, envs.single_action_space
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise ConfigError(f"--vectorization torch: {name} resets in a way that is not supported ({mode})")
        if not isinstance(space, Box) or space.dtype is None or space.dtype.kind != "f":
            raise ConfigError(
                f"--vectorization torch: observations must be a Box of real numbers, {name} has {text_of(space)}"
            )
        if envs.num_envs != args.num_envs:
            raise EnvError(f"{name} has {envs.num_envs} environments where {args.num_envs} were asked for")
        self.device = torch.device(device)
        low, high = (bound.reshape(-1).astype(np.float32) for bound in (space.low, space.high))
        self.single_observation_space = Box(low, high)
        self.observation_space = batch_space(self.single_observation_space, args.num_envs)
        self.is_code = hasattr(envs, "draw") and hasattr(envs, "tensors")
        self._keys, self._shape = info_keys(args), (args.num_envs, *space.shape)
        self._resets_later = mode == AutoresetMode.NEXT_STEP
        self._ended = torch.zeros(args.num_envs, dtype=torch.bool, device=self.device)
        hidden = velocities(name) if option(args, "mask_velocities") else []
        self._shown: Tensor | None = None  # [D], 0 for velocities that are masked
        if hidden:
            self._shown = torch.ones(len(low), device=self.device)
            self._shown[hidden] = 0.0
        self._rescales = not hasattr(args, "num_steps")  # with a replay buffer, policies act in [−1, 1]
        self._bounds: list[Tensor] = []
        if isinstance(self._actions, Box):
            self._bounds = [torch.as_tensor(b, device=self.device) for b in (self._actions.low, self._actions.high)]
        starts = getattr(self._actions, "start", 0)
        self._start = torch.as_tensor(starts, device=self.device) if np.any(starts) else None

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Starts new episodes; the first of a list of seeds seeds all."""
        obs, infos = self.env.reset(seed=seed[0] if isinstance(seed, list) else seed, options=options)
        self._ended.zero_()
        self._refuse_masks(infos)
        return self._vectors("reset", obs), {}

    def _refuse_masks(self, infos: dict[str, Any]) -> None:
        if "action_mask" in infos:
            raise EnvError("tensor environments returned action masks, which --vectorization torch does not take")

    def draw(self, steps: int) -> None:
        """Draws the random numbers of the next `steps` steps, where a step is tensor code."""
        if self.is_code:
            self.env.draw(steps)  # type: ignore[attr-defined]

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        return self.answer(*self.env.step(self._taken(actions)))

    def answer(
        self, obs: Tensor, rewards: Tensor, terminated: Tensor, truncated: Tensor, given: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Results of `step`, of what the environments have returned."""
        self._refuse_masks(given)
        columns = {"rewards": rewards, "terminated": terminated, "truncated": truncated}
        for name, column in columns.items():
            self._check(f"{name} from step", column, self._shape[:1])
        obs, rewards = self._vectors("step", obs), rewards.float()
        terminated, truncated = terminated.bool(), truncated.bool()
        infos: dict[str, Any] = {}
        if self._resets_later:
            infos["skipped"] = skipped = self._ended.clone()
            rewards = rewards.masked_fill(skipped, 0.0)
            terminated, truncated = terminated & ~skipped, truncated & ~skipped
            self._ended.copy_(terminated | truncated)
            infos["final_obs"] = obs
        elif "final_obs" in given:
            infos["final_obs"] = self._vectors("step, as final_obs,", given["final_obs"])
        elif self.is_code or (terminated | truncated).any():
            raise EnvError("tensor environments that reset in the same step returned no `final_obs` in their infos")
        else:
            infos["final_obs"] = obs  # nothing has ended: whoever leaves it out then knows, without waiting for us
        told = given if self._resets_later else given | given.get("final_info", {})
        infos |= self._told(told, terminated | truncated)
        return obs, rewards, terminated, truncated, infos

    def _told(self, given: dict[str, Any], ended: Tensor) -> dict[str, Tensor]:
        """Numbers that are told where episodes end, [N, K]."""
        there = {key: given[key] for key in self._keys if isinstance(given.get(key), Tensor)}
        there = {key: values for key, values in there.items() if values.shape == ended.shape}
        if not there:
            return {}
        nothing = torch.full_like(ended, torch.nan, dtype=torch.float32)
        columns = [torch.where(ended, there[key].float(), nothing) if key in there else nothing for key in self._keys]
        return {"episode_info": torch.stack(columns, -1)}

    def _taken(self, actions: Tensor) -> Tensor:
        """Actions [N, A] of a policy as the environments take them."""
        space, shape = self._actions, (len(actions), *(self._actions.shape or ()))
        if isinstance(space, Box):
            low, high = self._bounds
            actions = actions.reshape(shape)
            if self._rescales:
                share = (actions + 1) / 2
                actions = (1 - share) * low + share * high
            return actions.clamp(low, high)
        if isinstance(space, Discrete | MultiDiscrete | MultiBinary):
            actions = actions.reshape(shape)
            return actions.clone() if self._start is None else actions + self._start  # a graph's result is written over
        raise TypeError(f"no actions for {space}")

    def _vectors(self, call: str, obs: Any) -> Tensor:
        self._check(f"observations from {call}", obs, self._shape)
        obs = obs.reshape(len(obs), -1).float()
        return obs if self._shown is None else obs * self._shown

    def _check(self, what: str, values: Any, shape: tuple[int, ...]) -> None:
        if not isinstance(values, Tensor):
            raise EnvError(f"tensor environments returned {what} as {type(values).__name__}, not as a tensor")
        if values.shape != shape or values.device.type != self.device.type:
            theirs = f"{list(values.shape)} on {values.device}"
            raise EnvError(f"tensor environments returned {what} of shape {theirs}, not {list(shape)} on {self.device}")

    def tensors(self) -> list[Tensor]:
        """All that a step changes, where it is tensor code."""
        return [*self.env.tensors(), self._ended] if self.is_code else []  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Tensor] | None:
        """All that the steps to come depend on, on the CPU; None if these environments do not tell."""
        if not hasattr(self.env, "state_dict"):
            return None
        given = {f"env.{name}": torch.as_tensor(value).cpu() for name, value in self.env.state_dict().items()}
        return given | {"ended": self._ended.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state_dict` was called."""
        own = {name.removeprefix("env."): value for name, value in state.items() if name.startswith("env.")}
        self.env.load_state_dict(own)  # type: ignore[attr-defined]
        self._ended.copy_(state["ended"])


class OnHost(VectorWrapper):
    """Tensor environments as evaluation plays them: arrays in, arrays out."""

    env: TensorEnvs

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        obs, _ = self.env.reset(seed=seed, options=options)
        return obs.cpu().numpy(), {}

    def step(self, actions: np.ndarray) -> tuple:
        """Takes actions as Gymnasium's environments do."""
        given = self.env.env.step(torch.as_tensor(actions, device=self.env.device))  # type: ignore[arg-type]
        *columns, infos = self.env.answer(*given)
        told = {name: infos[name].cpu().numpy() for name in infos.keys() & {"skipped", "episode_info"}}
        rows = told.pop("episode_info", None)
        if rows is not None and (there := ~np.isnan(rows).all(1)).any():
            told["final_info"] = {"episode_info": rows, "_episode_info": there}
        return *(column.cpu().numpy() for column in columns), told
