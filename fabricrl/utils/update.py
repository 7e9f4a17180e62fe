"""Running an update: as it is, compiled whole, or captured as a CUDA graph.

An update is a function of tensors of fixed shapes that changes parameters and optimizers in place and returns tensors.
It asks no tensor for its value (`.item()`, `if loss > 0`), and what varies from call to call comes as a tensor: numbers
become part of what is compiled or captured.

- `Runner.compiled(update)` makes one program of everything that the update runs (forward, backward, the collective,
  clipping, the optimizer), by recording its operations once and handing them to Inductor. Small networks spend their
  time between operations, not in them: three to five times less processor time.
- `Runner.captured(train)` records the kernels that a function starts on a GPU, and replays them in one go. What a
  compiled update starts is captured like everything else.

Neither is visible in the function. Both record before the first step is taken: what the recording changes is put back.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fabricrl.utils.device import Passed
from fabricrl.utils.errors import ConfigError
from fabricrl.utils.optimizer import Adam
from fabricrl.utils.products import faster_products
from fabricrl.utils.recording import recording


class Runner:
    """Compiles and captures updates, if asked to.

    Args:
        compile, capture: compile updates, capture them.
        modules, optimizers, generators: all that updates change; the lists may still grow.

    Attributes:
        captures: whether anything is captured.
        generators: those that updates draw from.
        tensors: what is changed besides by what is compiled or captured.
        recordings: how often something has been compiled or captured.
    """

    def __init__(
        self,
        compile: bool,
        capture: bool,
        modules: Sequence[nn.Module],
        optimizers: Sequence[Adam],
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._compile, self.captures = compile, capture
        self._modules, self._optimizers, self.generators = modules, optimizers, list(generators)
        self.tensors: list[Tensor] = []
        self.recordings = 0
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as one program, if that was asked for."""
        return _Recorded(self, function, self._compile_variant) if self._compile else function

    def captured(self, function: Callable[..., Any], reused: bool = False) -> Callable[..., Any]:
        """The function as one CUDA graph, if that was asked for.

        `reused`: the next call's results may take the place of these, which saves copies.
        """
        record = partial(self._capture_variant, reused=reused)
        return _Recorded(self, function, record) if self.captures else function

    def each(
        self, step: Callable[[Tensor, Tensor], None], numbers: Sequence[Tensor], recorded: bool
    ) -> Callable[[Tensor], tuple]:
        """`step(t, row)` for each number t and row of a tensor, as a function of that tensor.

        Args:
            recorded: each step is compiled, and all are captured as one, if that was asked for.
        """

        def take_step(t: Tensor, row: Tensor) -> tuple:
            step(t, row)
            return ()

        take = self.compiled(take_step) if recorded else take_step

        def take_steps(rows: Tensor) -> tuple:
            for t, row in zip(numbers, rows.unbind(), strict=True):
                take(t, row)
            return ()

        return self.captured(take_steps) if recorded else take_steps

    def release(self) -> None:
        """Frees all graphs, which cannot run any more: NCCL does not end while there is one with a collective in it."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()

    @property
    def needs_warmup(self) -> bool:
        """True if anything is compiled or captured."""
        return self._compile or self.captures

    @contextlib.contextmanager
    def restoring_state(self) -> Iterator[None]:
        """Restores parameters, buffers, moments and generators after the block, which leaves no trace."""
        for optimizer in self._optimizers:
            optimizer.follow()
        if not all(optimizer.flat.is_joined for optimizer in self._optimizers):  # each has taken it from the other
            raise ConfigError("a parameter belongs to two optimizers: such an update cannot be compiled or captured")
        tensors = [*self.tensors, *(tensor for optimizer in self._optimizers for tensor in optimizer.tensors())]
        tensors += [tensor for module in self._modules for tensor in (*module.parameters(), *module.buffers())]
        before = [tensor.detach().clone() for tensor in tensors]
        branches = self.branches
        states = [generator.get_state() for generator in self.generators]
        default = torch.get_rng_state()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
            self.branches = branches
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
            torch.set_rng_state(default)

    @property
    def branches(self) -> tuple[bool, ...]:
        """Decisions of the optimizers that are not tensors."""
        return tuple(optimizer.flat.equal_steps for optimizer in self._optimizers)

    @branches.setter
    def branches(self, values: tuple[bool, ...]) -> None:
        for optimizer, value in zip(self._optimizers, values, strict=True):
            optimizer.flat.equal_steps = value

    def _compile_variant(self, function: Callable[..., Any], inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
        from torch._inductor import compile as inductor  # here, as it takes a second and few runs need it
        from torch.fx.experimental.proxy_tensor import make_fx

        with self.restoring_state(), recording():
            graph = make_fx(lambda *tensors: function(tensors), faster_products())(*inputs)
        state = _lift_state(graph)
        with torch.no_grad():
            program = inductor(graph, [*state, *inputs])

        def run(tensors: list[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return program(*state, *tensors)

        return run

    def _capture_variant(
        self, function: Callable[..., Any], inputs: list[Tensor], reused: bool
    ) -> Callable[..., list[Tensor]]:
        held = [own_copy(tensor) for tensor in inputs]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        reads_host = torch.cuda.is_available() and any(tensor.device.type == "cpu" for tensor in inputs)
        has_read = Passed(torch.device("cuda", torch.cuda.current_device())) if reads_host else None
        for generator in self.generators:
            if generator.device.type == "cuda":
                graph.register_generator_state(generator)
        with self.restoring_state():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # allocates, chooses kernels, compiles
                    with self.restoring_state():  # each begins where the first did: what it stores is in nobody's way
                        function(held)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                outputs = function(held)
        self._graphs.append(graph)

        def run(tensors: list[Tensor]) -> list[Tensor]:
            if has_read is not None:  # what the last replay reads is written over now
                has_read.wait()
            if held:
                torch._foreach_copy_(held, tensors)
            graph.replay()
            if has_read is not None:
                has_read.mark()
            return outputs if reused else [output.clone() for output in outputs]  # the next replay writes over them

        return run


def own_copy(tensor: Tensor) -> Tensor:
    """A copy of which a graph reads; what lies on the CPU is pinned, so that the graph itself takes it to the GPU."""
    if tensor.device.type != "cpu" or not torch.cuda.is_available():
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


class _Recorded:
    """A function of tensors as it was recorded, once for each kind of arguments."""

    def __init__(self, runner: Runner, function: Callable[..., Any], record: Callable[..., Any]) -> None:
        self._runner, self._function, self._record = runner, function, record
        self._variants: dict[Any, _Variant] = {}

    def __call__(self, *args: Any) -> Any:
        leaves: Sequence[Any] = args
        structure = None
        if not all(isinstance(arg, Tensor) or _is_plain(arg) for arg in args):  # looking for structure takes its time
            leaves, structure = pytree.tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kinds = tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = kinds, structure, self._runner.branches
        if key not in self._variants:
            self._variants[key] = self._recorded(*pytree.tree_flatten(args), tensors)
        variant = self._variants[key]
        outputs = variant.run(tensors)
        self._runner.branches = variant.branches
        return pytree.tree_unflatten(outputs, variant.outputs)

    def _recorded(self, leaves: list[Any], structure: pytree.TreeSpec, tensors: list[Tensor]) -> "_Variant":
        """A new variant.

        Raises:
            TypeError: a number that is no integer, which would be the same for ever.
        """
        if any(isinstance(leaf, float) for leaf in leaves):
            raise TypeError("what is compiled or captured takes tensors in place of numbers that may change")
        ends: list[Any] = []

        def function(inputs: Sequence[Tensor]) -> list[Tensor]:
            given = iter(inputs)
            args = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            result = self._function(*pytree.tree_unflatten(args, structure))
            outputs, outputs_structure = pytree.tree_flatten(result)
            ends[:] = outputs_structure, self._runner.branches
            return outputs

        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):  # its tensors may be met again outside of both
            run = self._record(function, tensors)
        self._runner.recordings += 1
        return _Variant(run, *ends)


def _is_plain(arg: Any) -> bool:
    """Tells if an argument is a number or nothing, or a tuple of such."""
    return arg is None or isinstance(arg, int) or (type(arg) is tuple and all(map(_is_plain, arg)))


class _Variant(NamedTuple):
    """A recording, the structure of its outputs, and the decisions of optimizers in it."""

    run: Callable[[list[Tensor]], list[Tensor]]
    outputs: pytree.TreeSpec
    branches: tuple[bool, ...]


def _lift_state(graph: fx.GraphModule) -> list[Tensor]:
    """Turns the tensors that a recorded graph captured into its first inputs, and returns them.

    Parameters that are views of one vector become one input: a compiler has to know that they change together.
    """
    nodes = list(graph.graph.nodes)
    for node in reversed(nodes):
        if "profiler" in str(node.target):  # marks of PyTorch's profiler
            graph.graph.erase_node(node)
    found: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found.setdefault(node.target, []).append(node)
    storages: dict[int, list[str]] = {}
    for name in found:
        storages.setdefault(getattr(graph, name).untyped_storage().data_ptr(), []).append(name)
    state: list[Tensor] = []
    first = next(iter(graph.graph.nodes))
    last_input = [node for node in nodes if node.op == "placeholder"][-1:]
    for names in storages.values():
        tensors = [getattr(graph, name).detach() for name in names]
        with graph.graph.inserting_before(first):
            holder = graph.graph.placeholder(f"state_{len(state)}")
        whole = tensors[0]
        if len(names) > 1:
            storage = whole.untyped_storage()
            whole = whole.new_empty(0).set_(storage, 0, (storage.nbytes() // whole.itemsize,), (1,))
        state.append(whole)
        for name, tensor in zip(names, tensors, strict=True):
            value = holder
            if len(names) > 1:
                with graph.graph.inserting_after(last_input[0] if last_input else holder):
                    where = (list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
                    value = graph.graph.call_function(torch.ops.aten.as_strided.default, (holder, *where))
            for node in found[name]:
                node.replace_all_uses_with(value)
                graph.graph.erase_node(node)
            delattr(graph, name)
    graph.recompile()
    return state


def check_compiler() -> None:
    """Raises ConfigError unless there is the C++ compiler that `--compile` needs."""
    if not has_compiler():
        raise ConfigError(
            "--compile needs a C++ compiler, and there is none: install one (apt install g++, dnf install gcc-c++), "
            "or name one, such as clang++, in the environment variable CXX"
        )


def has_compiler() -> bool:
    """Tells if there is the C++ compiler that PyTorch looks for."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX") or usual) is not None
