"""Shared by all tests: one thread, a temporary run folder, and a script's `main` called in this process."""

import contextlib
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import gymnasium as gym
import pytest
import torch
import torch._inductor
from gymnasium.spaces import Space
from lightning.fabric import Fabric
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fabricrl.algos.run import Run
from fabricrl.models.models import DropoutMasks
from fabricrl.utils import hint
from fabricrl.utils.metric import MeanMetrics, Stopwatch
from fabricrl.utils.optimizer import Adam
from fabricrl.utils.update import Runner

hint.PATIENCE = float("inf")  # beside load, tests are slow: what they print does not depend on that


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Puts back what `main` changes in a process: threads, precision, cuDNN, signals and torch's generator."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.backends.cudnn.deterministic
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.deterministic = deterministic
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    signal.set_wakeup_fd(-1)


class Ranks:
    """Stands for Fabric in the collectives of `fabricrl.utils.ranks`, for threads that play the ranks."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._slots: list[Any] = [None] * world_size

    def fabric(self, rank: int) -> Any:
        group = partial(self._gather, rank)  # stands for the process group, and knows whose it is
        return SimpleNamespace(
            world_size=self.world_size, global_rank=rank, device=torch.device("cpu"), process_group=group
        )

    def _gather(self, rank: int, rows: torch.Tensor, own: torch.Tensor) -> None:
        self._slots[rank] = own
        self._barrier.wait()
        rows.copy_(torch.cat(self._slots))
        self._barrier.wait()  # nobody writes the next before all have read this


def on_ranks(world_size: int, function: Callable[[Any], Any]) -> list[Any]:
    """Results of `function(fabric)` on so many simulated ranks, in rank order."""
    ranks, results, errors = Ranks(world_size), [None] * world_size, []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ranks.fabric(rank))
        except BaseException as error:
            errors.append(error)
            ranks._barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    with mock.patch("fabricrl.utils.ranks.finish", lambda gather, rows, own, group: group(rows, own)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


# One rank in full precision: no collectives
SINGLE = SimpleNamespace(world_size=1, global_rank=0, device=torch.device("cpu"), autocast=contextlib.nullcontext)


class BareRun(Run):
    """A run as functions of scripts take it, without environments, folder and signals.

    Args:
        fabric: Fabric, or what stands for it; None: one rank on the CPU, in the precision of the arguments.
    """

    def __init__(self, args: Any, fabric: Any = None, action_space: Space | None = None) -> None:
        self.args, self.global_args, self.action_space = args, args, action_space  # type: ignore[assignment]
        self.state, self.path = {}, None
        self.global_step = self.first_step = self.exit_code = self._iteration_steps = 0
        self._signals = SimpleNamespace(code=0)  # type: ignore[assignment]
        self.losses = MeanMetrics()
        self.clock = Stopwatch("env", "act", "train", "comm", "log")
        self._parts, self._modules, self._optimizers = {}, [], []
        self._contexts = contextlib.ExitStack()
        self._envs = self._folder = self._evaluation = self._tensor_episodes = None
        self._evaluated_step, self._is_last, self._eval_charts = 0, None, {}
        self._score = float("nan")
        self.while_evaluating = lambda: None
        self.join(fabric or Fabric(accelerator="cpu", devices=1, precision=args.precision))


class Descent(Adam):
    """Moves the parameters by the gradient itself, times the learning rate."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.flat.is_joined:
            self.flat.join()
        self.flat.vector.sub_(self.param_groups[0]["lr"] * self.gradient)
        self.flat.grad = None


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls `main` as if the script had been started with these arguments."""

    def call(main: Callable[[], int], *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        return main()

    return call


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--compile` without the compiler, which takes a while: what has been recorded runs operation by operation."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graph)


class Graph:
    """Stands in for a CUDA graph: operations, which a replay repeats on the memory that they had.

    `held`: those that have not been reset, with which NCCL would not end.
    """

    held: ClassVar[list["Graph"]] = []

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.held.append(self)

    def reset(self) -> None:
        self.calls.clear()
        self.held.remove(self)

    def replay(self) -> None:
        assert self in self.held
        with torch.inference_mode(False), torch.no_grad():
            for function, args, kwargs, results in self.calls:
                again = function(*args, **kwargs)
                for result, value in zip(pytree.tree_leaves(results), pytree.tree_leaves(again), strict=True):
                    if isinstance(result, torch.Tensor) and result.data_ptr() != value.data_ptr():
                        result.copy_(value)


class NoNames(TorchFunctionMode):
    """Refuses functions that bring a tensor's value, or the tensor, to the host; where it is there, too."""

    NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        by_name = name == "to" and "cpu" in (*args, *(kwargs or {}).values())  # a run's device is no string
        if name in self.NAMES or by_name:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return function(*args, **(kwargs or {}))


class NoValues(TorchDispatchMode):
    """Refuses what asks for a tensor's value, or for a shape that depends on it, as a stream that is captured does."""

    aten = torch.ops.aten
    VALUES = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.masked_scatter_backward, aten._unique2)

    def __init__(self) -> None:
        super().__init__()
        self.names = NoNames()

    def __enter__(self) -> Any:
        self.names.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.names.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, kwargs = function.overloadpacket, kwargs or {}
        refused = kind in self.VALUES
        if kind in (self.aten.index, self.aten.index_put_, self.aten.index_put):
            by_truth = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            refused = by_truth and (kind is self.aten.index or args[2].numel() > 1)  # one value fills in place
        elif kind is self.aten.repeat_interleave:
            refused = kwargs.get("output_size") is None
        if refused:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        return function(*args, **kwargs)


class Capture(NoValues):
    """Makes a graph of the calls inside."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = super().__torch_dispatch__(function, types, args, kwargs)
        self.graph.calls.append((function, args, kwargs or {}, results))
        return results


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs are stood in for."""
    monkeypatch.setattr(Graph, "held", [])
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


@pytest.fixture
def captured(graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts capture on the CPU as they do on a GPU."""
    monkeypatch.setattr("fabricrl.algos.run.Runner", lambda compile, capture, *rest: Runner(compile, True, *rest))
    # On the CPU it asks how many have been drawn
    monkeypatch.setattr(
        DropoutMasks, "draw", lambda masks, count, rng: (torch.rand(count, generator=rng) >= masks.rate).float()
    )


class Trained:
    """Results of a training in this process."""

    def __init__(self, code: int, line: str, output: str) -> None:
        self.code, self.line, self.output = code, line, output
        self.result = dict(re.findall(r"(\w+)=(\S+)", line))

    @property
    def checkpoint(self) -> Path:
        return Path(self.result["checkpoint"])

    @property
    def folder(self) -> Path:
        return self.checkpoint.parent.parent

    @property
    def state(self) -> dict[str, Any]:
        return torch.load(self.checkpoint, weights_only=True)

    @property
    def args(self) -> dict[str, Any]:
        return json.loads((self.folder / "args.json").read_text())

    @property
    def weights(self) -> torch.Tensor:
        """The agent's weights as one vector, without the statistics of its normalisers."""
        state = self.state["agent"].items()
        return torch.cat([value.reshape(-1) for name, value in state if "normalizer" not in name])


@pytest.fixture
def train(script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., Trained]:
    """Trains by a script's `main` in this process with these arguments; the run folder is temporary."""

    def call(main: Callable[[], int], *arguments: object) -> Trained:
        given = arguments if "--log-dir" in arguments else ("--log-dir", tmp_path / "logs", *arguments)
        code = script(main, *given)
        output = capsys.readouterr()
        line = next((line for line in output.out.splitlines() if line.startswith("result ")), "")
        return Trained(code, line, output.out + output.err)

    return call


@pytest.fixture
def ppo(train: Callable[..., Trained]) -> Callable[..., Trained]:
    from fabricrl.algos.ppo.ppo import main

    return partial(train, main)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts small packages with the interfaces of simulators in the place of those, and everything back."""
    known, loaded = dict(gym.registry), dict(sys.modules)
    folder, adapters = Path(__file__).parent / "stand_ins", ("maniskill", "isaaclab", "playground")
    packages = tuple(path.name for path in folder.iterdir())
    for name in loaded:
        if name.split(".")[0] in packages or name.removeprefix("fabricrl.envs.simulators.") in adapters:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    yield
    for name in sys.modules.keys() - loaded.keys():
        del sys.modules[name]
    gym.registry.clear()
    gym.registry.update(known)
