"""Writes the greedy policy of a checkpoint as a program of its own, for ONNX Runtime or for PyTorch without fabricrl.

python fabricrl/export.py logs/ppo/CartPole-v1/ppo_1_20261122-140732 --format onnx
python fabricrl/export.py <checkpoint or run folder> --format pt2 --out policy.pt2
python fabricrl/export.py <checkpoint or run folder> --format onnx --json
"""

import copy
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from torch import Tensor, nn

from fabricrl.envs.spaces import mask_choices, rescale_actions
from fabricrl.models.models import RecordEncoder
from fabricrl.policy import Policy, algorithm
from fabricrl.utils.checkpoint import load_checkpoint
from fabricrl.utils.command import Parser, path_of
from fabricrl.utils.ending import run_script
from fabricrl.utils.errors import ConfigError, RunError, from_here, writing
from fabricrl.utils.extras import missing
from fabricrl.utils.hub import is_on_hub

FORMATS = ("onnx", "pt2")
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # of the extra `export`
TOLERANCE = 1e-5
Program = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
ROWS = 5  # of the batches that the written program is compared on


class Numbers(nn.Module):
    """Parts of an observation without images, as the environment gives them → numbers side by side [N, D], float32."""

    def __init__(self, parts: Sequence[Space], masked: Sequence[int] = ()) -> None:
        super().__init__()
        self.parts = parts
        for index, part in enumerate(parts):
            if isinstance(part, Discrete | MultiDiscrete):
                starts = np.asarray(part.start).reshape(-1)
                counts = np.asarray(part.n if isinstance(part, Discrete) else part.nvec).reshape(-1)
                choices = [torch.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]
                owner = [torch.full((len(values),), place) for place, values in enumerate(choices)]
                self.register_buffer(f"choices{index}", torch.cat(choices))
                self.register_buffer(f"owner{index}", torch.cat(owner))
        self.masked = list(masked)

    def forward(self, *values: Tensor) -> Tensor:
        numbers = torch.cat([self._numbers(index, value) for index, value in enumerate(values)], -1)
        if self.masked:
            seen = torch.ones(numbers.shape[-1], dtype=torch.bool)
            seen[self.masked] = False
            numbers = torch.where(seen, numbers, 0.0)
        return numbers

    def _numbers(self, index: int, value: Tensor) -> Tensor:
        flat = value.reshape(value.shape[0], -1)
        if not isinstance(self.parts[index], Discrete | MultiDiscrete):
            return flat.float()
        chosen, choices = flat[:, getattr(self, f"owner{index}")], getattr(self, f"choices{index}")
        return (chosen == choices).float()  # one-hot


class PartsEncoder(nn.Module):
    """A record's encoder and normaliser, for its parts as tensors of their own: images, then numbers [N, V]."""

    def __init__(self, encoder: RecordEncoder, normalizer: nn.Module | None) -> None:
        super().__init__()
        self.encoder, self.normalizer = encoder, normalizer

    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        *frames, numbers = parts
        images = []
        for pixels, image in zip(frames, self.encoder.space.images.values(), strict=True):
            stacked = pixels.reshape(pixels.shape[0], self.encoder.frame_stack, *image.shape)
            stacked = stacked if image.channels == 0 else stacked.movedim(-1, -3)
            images.append(stacked.flatten(1, 2))  # [N, S C, H, W]
        return self.encoder.encode(images, numbers if self.normalizer is None else self.normalizer(numbers))


class EnvActions(nn.Module):
    """The agent's actions [N, A] → those that the environment takes: see `env_actions` and `rescale_actions`."""

    start: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, space: Space, rescales: bool) -> None:
        super().__init__()
        self.space, self.rescales, self.shape = space, rescales, space.shape or ()
        if isinstance(space, MultiDiscrete):
            self.register_buffer("start", torch.as_tensor(space.start))
        if isinstance(space, Box):
            self.dtype = torch.as_tensor(np.empty(0, space.dtype)).dtype
            wide = torch.float64 if rescales or space.dtype == np.float64 else torch.float32
            self.register_buffer("low", torch.as_tensor(space.low, dtype=wide))
            self.register_buffer("high", torch.as_tensor(space.high, dtype=wide))

    def forward(self, actions: Tensor) -> Tensor:
        if isinstance(self.space, Discrete):
            return actions[:, 0] + int(self.space.start)
        actions = actions.reshape(actions.shape[0], *self.shape)
        if isinstance(self.space, MultiDiscrete):
            return actions + self.start
        if isinstance(self.space, MultiBinary):
            return actions.to(torch.int8)
        actions = actions.to(self.low.dtype)
        if self.rescales:
            share = (actions + 1) / 2
            actions = (1 - share) * self.low + share * self.high
        return torch.minimum(torch.maximum(actions, self.low), self.high).to(self.dtype)


class ExportedPolicy(nn.Module):
    """The greedy policy as a function of tensors: parts of observations in, actions out, as the environment has them.

    Inputs, in this order:
        obs [N, ...], or of a Dict or Tuple each part, obs.speed [N, ...], obs.camera [N, H, W, C];
            images are [N, S, H, W, C] if S frames are stacked, and those that --grayscale or --resize changes are
            given as changed;
        memory [N, M], if the policy is recurrent: zeros at the first observation of an episode;
        reward [N], if it was trained with --prev-reward: what the action before earned, 0 at the first observation;
        mask [N, S], if its environment had action masks: true where an action is allowed.
    Outputs: action [N, ...], and next_memory [N, M], the memory of the next call.
    """

    def __init__(self, policy: Policy, env_actions: Callable[..., Any]) -> None:
        super().__init__()
        flat, packer = policy.rows.flat, policy.rows.packer
        self.agent = copy.deepcopy(policy.agent).eval()
        self.parts = {f"obs.{key}": key for key in flat.spaces} if isinstance(flat, Dict) else {"obs": "image"}
        spaces = flat.spaces if isinstance(flat, Dict) else {"image": flat}
        self.images = [name for name, key in self.parts.items() if packer is not None and key in packer.images]
        others = [spaces[key] for name, key in self.parts.items() if name not in self.images]
        self.numbers = Numbers(others, policy.rows.masked)
        if packer is not None:
            self.encoder = PartsEncoder(self.agent.encoder, self.agent.obs_normalizer)
            self.agent.features, self.agent.obs_normalizer = self._features, None
        self.env_actions = EnvActions(policy.action_space, env_actions is rescale_actions)
        self.is_recurrent = hasattr(self.agent, "memory_size")
        self.prev_reward = getattr(self.agent, "prev_reward", False)
        self.num_encoded = self.agent.head.encoded_size if getattr(self.agent, "prev_action", False) else 0
        self.memory_size = getattr(self.agent, "memory_size", 0) - self.prev_reward  # M
        self.mask_size = policy.mask_size  # S
        self.input_names = [*self.parts, *["memory"] * self.is_recurrent, *["reward"] * self.prev_reward]
        self.input_names += ["mask"] * (self.mask_size > 0)
        self.output_names = ["action", *["next_memory"] * self.is_recurrent]

    def _features(self, parts: tuple[Tensor, ...]) -> Tensor:
        return self.encoder(parts)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.input_names, inputs, strict=True))
        others = [values[name] for name in self.parts if name not in self.images]
        obs: Any = self.numbers(*others) if others else torch.zeros(inputs[0].shape[0], 0)  # [N, D]
        if self.images:
            obs = (*(values[name] for name in self.images), obs)
        masks = [values["mask"]] if self.mask_size else []
        if not self.is_recurrent:
            return (self.env_actions(self.agent.greedy(obs, *masks)),)
        memory, split = values["memory"], self.num_encoded
        if self.prev_reward:
            memory = torch.cat((memory[:, :split], values["reward"][:, None], memory[:, split:]), -1)
        actions, states = self.agent.greedy(obs, memory, *masks)
        encoded = [self.agent.head.encode(actions)] if split else []
        return self.env_actions(actions), torch.cat((*encoded, states), -1)


class Stepper:
    """Steps a written program as a policy is called, for comparisons: it stacks frames and carries the memory.

    Args:
        program: inputs by name → outputs, in the order of `output_names`.
    """

    def __init__(
        self, module: ExportedPolicy, policy: Policy, program: Callable[[dict[str, np.ndarray]], list]
    ) -> None:
        self.module, self.rows, self.program = module, policy.rows, program
        self.depth = getattr(policy.agent, "frame_stack", 1)
        self.reset()

    def reset(self) -> None:
        """Begins new episodes everywhere."""
        self.frames: dict[str, np.ndarray] = {}
        self.memory: np.ndarray | None = None

    def inputs(self, observations: Sequence[Any], rewards: Any = 0.0, masks: Any = True) -> dict[str, np.ndarray]:
        """Inputs of the program: observations as the environment gives them, one for each row of the batch."""
        module, count = self.module, len(observations)
        read = [self.rows.read(obs) for obs in observations]
        inputs = {}
        for name, key in module.parts.items():
            values = [one if name == "obs" else one[key] for one in read]
            if self.rows.packer is not None and name in module.images:
                values = [self.rows.packer.process(value) for value in values]
            inputs[name] = np.stack(values)
            if name in module.images and self.depth > 1:
                newest = inputs[name][:, None]
                before = self.frames.get(name, newest.repeat(self.depth, 1))
                inputs[name] = self.frames[name] = np.concatenate((before[:, 1:], newest), 1)
        if module.is_recurrent:
            zeros = np.zeros((count, module.memory_size), np.float32)
            inputs["memory"] = zeros if self.memory is None else self.memory
        if module.prev_reward:
            inputs["reward"] = np.full(count, rewards, np.float32)
        if module.mask_size:
            inputs["mask"] = np.full((count, module.mask_size), masks, bool)
        return inputs

    def __call__(self, observations: Sequence[Any], rewards: Any = 0.0, masks: Any = True) -> np.ndarray:
        """Actions [N, ...] for observations, what the actions before have earned [N], and what is allowed [N, S]."""
        action, *memory = self.program(self.inputs(observations, rewards, masks))
        self.memory = memory[0] if memory else None
        return action


def exported(module: ExportedPolicy, example: dict[str, np.ndarray]) -> torch.export.ExportedProgram:
    """The module as a graph for batches of any size."""
    inputs = tuple(torch.as_tensor(example[name]) for name in module.input_names)
    rows = torch.export.Dim("N")
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=(tuple({0: rows} for _ in inputs),))


def write(
    program: torch.export.ExportedProgram,
    module: ExportedPolicy,
    about: dict[str, Any],
    path: Path,
    check: Callable[[Path], float],
) -> float:
    """Writes the graph and what it is about as one file, complete under its name or not at all.

    Args:
        check: called with the complete file before it gets its name; what it returns is returned.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with writing(path):
            if path.suffix == ".onnx":
                graph = torch.onnx.export(
                    program, (), dynamo=True, verbose=False,
                    input_names=module.input_names, output_names=module.output_names,
                )  # fmt: skip
                assert graph is not None
                graph.model.metadata_props["fabricrl"] = json.dumps(about)
                graph.save(str(temporary), external_data=False)
            else:
                whole = io.BytesIO()  # in a file PyTorch raises what is no OSError
                torch.export.save(program, whole, extra_files={"fabricrl.json": json.dumps(about)})
                temporary.write_bytes(whole.getbuffer())
        result = check(temporary)
        with writing(path):
            os.replace(temporary, path)
        return result
    finally:
        temporary.unlink(missing_ok=True)


def opened(path: Path, module: ExportedPolicy) -> Program:
    """The program in a file as a function of named arrays."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(module.output_names, inputs)
    program = torch.export.load(path).module()

    def run(inputs: dict[str, np.ndarray]) -> list:
        with torch.inference_mode():
            outputs = program(*(torch.as_tensor(inputs[name]) for name in module.input_names))
        return [output.numpy() for output in outputs]

    return run


def largest_difference(policy: Policy, module: ExportedPolicy, path: Path) -> float:
    """Compares a written program with the policy, over some steps of observations drawn at random.

    Returns the largest difference of two actions, relative to those above 1.

    Raises:
        RunError: it is more than TOLERANCE.
    """
    space, stepper, largest = (
        copy.deepcopy(policy.observation_space),
        Stepper(module, policy, opened(path, module)),
        0.0,
    )
    space.seed(0)
    policy.reset()
    rewards, rng = np.zeros(ROWS), np.random.default_rng(0)
    for step in range(4):
        observations = [_moderate(space, space.sample()) for _ in range(ROWS)]
        rows = np.stack([policy.rows.one(obs) for obs in observations])
        masks = [rng.random((ROWS, policy.mask_size)) < 0.5] if policy.mask_size else []
        for allowed in masks:
            allowed[:, np.cumsum([0, *mask_choices(policy.action_space)[:-1]])] = True  # something is
        expected = policy.act(rows, rewards, np.full(ROWS, step == 0), *masks)
        found = stepper(observations, rewards, *masks)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            what = f"{found.dtype} {found.shape} for {expected.dtype} {expected.shape}"
            raise RunError(f"the program that was written differs from the policy: {what}")
        gap = np.abs(found.astype(np.float64) - expected) / np.maximum(1, np.abs(expected))
        largest, rewards = max(largest, float(gap.max())), rewards + 0.5
    if not largest <= TOLERANCE:
        raise RunError(f"the program that was written differs from the policy: actions differ by {largest:.1e}")
    return largest


def _moderate(space: Space, value: Any) -> Any:
    """A sample within ±10 where bounds allow more, as observations are."""
    if isinstance(space, Dict):
        return {key: _moderate(part, value[key]) for key, part in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(_moderate(part, one) for part, one in zip(space.spaces, value, strict=True))
    if isinstance(space, Box) and space.dtype.kind == "f":
        return np.clip(value, np.minimum(10, np.maximum(space.low, -10)), np.maximum(-10, np.minimum(space.high, 10)))
    return value


def described(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Types and shapes of arrays by name; N is the size of the batch."""
    return {name: {"dtype": str(array.dtype), "shape": ["N", *array.shape[1:]]} for name, array in arrays.items()}


def export(source: str, kind: str, out: str | None) -> dict[str, Any]:
    """Writes a checkpoint's policy and compares it; returns what `--json` prints."""
    state, found = load_checkpoint(source)
    policy = Policy(state, found)
    utils = algorithm(state, found)
    if not hasattr(utils, "env_actions"):
        raise ConfigError(f"{found} was made by {policy.algo}, whose utils.py has no env_actions: see Add an algorithm")
    beside = Path(found.name) if is_on_hub(source) else found
    path = path_of("--out", out) if out is not None else beside.with_suffix(f".{kind}")
    if path.suffix != f".{kind}" or not path.parent.is_dir():
        raise ConfigError(f"--out is {out}: it must be a file of a folder that exists, and end in .{kind}")
    module = ExportedPolicy(policy, utils.env_actions)
    stepper = Stepper(module, policy, lambda inputs: [])
    space = copy.deepcopy(policy.observation_space)
    example = stepper.inputs([_moderate(space, space.sample()) for _ in range(ROWS)])
    with torch.no_grad():
        outputs = [out.numpy() for out in module(*(torch.as_tensor(example[name]) for name in module.input_names))]
    about = {"env_id": policy.env_id, "algo": policy.algo, "global_step": policy.global_step}
    about |= {
        "inputs": described({name: example[name] for name in module.input_names}),
        "outputs": described(dict(zip(module.output_names, outputs, strict=True))),
    }
    difference = write(exported(module, example), module, about, path, partial(largest_difference, policy, module))
    return {"file": str(path), "format": kind} | about | {"difference": difference}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("path", help="checkpoint, or run folder or hf://user/repository, whose newest is written")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx, which needs the extra export")
    parser.add_argument("--out", help="file to write (default: beside the checkpoint, or here for one on the Hub)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    options = parser.parse_args()
    if options.format == "onnx" and not all(map(importlib.util.find_spec, NEEDED)):
        raise missing("--format onnx", "export")
    torch.set_num_threads(1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters, about their own insides
        result = export(options.path, options.format, options.out)
    if options.json:
        print(json.dumps(result))
        return 0
    print(from_here(result["file"]))
    for kind in ("inputs", "outputs"):
        for name, what in result[kind].items():
            print(f"  {kind[:-1]:6s}  {name:12s} {what['dtype']} [{', '.join(map(str, what['shape']))}]")
    print(f"  largest difference from the policy: {result['difference']:.1e}")
    return 0


if __name__ == "__main__":
    run_script(main)
