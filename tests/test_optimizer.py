"""Adam over one vector against torch's over many tensors, and the average over ranks."""

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabricrl.utils import optimizer as optimizer_module
from fabricrl.utils import ranks
from fabricrl.utils.errors import CheckpointError
from fabricrl.utils.model import parameter_hash
from fabricrl.utils.optimizer import Adam, average_gradients
from fabricrl.utils.recording import recording

RATE = 1 / 64  # exact as a float32


class Heads(nn.Module):
    """A body with two heads, of which each may be left out of a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 1)

    def loss(self, step: int, heads: str) -> Tensor:
        rng = torch.Generator().manual_seed(step)
        x = self.body(torch.randn(5, 3, generator=rng).to(self.body.weight)).tanh()
        outputs = [getattr(self, head)(x).square().sum() for head in ("left", "right") if head[0] in heads]
        return torch.stack(outputs).sum()


def pair(dtype: torch.dtype = torch.float64) -> tuple[Heads, Heads]:
    network = Heads().to(dtype)
    return network, copy.deepcopy(network)


# Which heads have a loss, at each of 20 steps
ALL, LATE = ["lr"] * 20, ["l"] * 7 + ["lr"] * 13  # the right one is used late
SOMETIMES = ["lr" if step % 3 else "l" for step in range(20)]
IN_TURN = ["l" if step % 2 else "r" for step in range(20)]
USES = pytest.mark.parametrize("uses", [ALL, LATE, SOMETIMES, IN_TURN], ids=["all", "late", "sometimes", "in turn"])


def train(
    network: Heads, optimizer: Any, uses: list[str], first: int = 0, clip: Callable[[], Any] | None = None
) -> None:
    for step, heads in enumerate(uses, first):
        optimizer.zero_grad()
        network.loss(step, heads).backward()
        if clip is not None:
            clip()
        optimizer.step()


def assert_equal_parameters(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("size", [1, 7, 64])
@USES
def test_a_vector_that_is_stepped_in_parts_moves_as_a_whole_one(size: int, uses: list[str]) -> None:
    """As on a GPU, whose kernel gives each multiprocessor a part."""
    whole, parts = pair()
    optimizers = Adam(whole.parameters(), 0.01), Adam(parts.parameters(), 0.01)
    optimizers[1].flat.part_size = size
    for network, optimizer in zip((whole, parts), optimizers, strict=True):
        train(network, optimizer, uses)
    assert_equal_parameters(parts, whole)
    assert torch.equal(optimizers[0].flat.steps, optimizers[1].flat.steps)


@USES
def test_adam_is_torchs_also_where_parameters_lack_a_gradient_in_some_steps(uses: list[str]) -> None:
    network, plain = pair()
    ours, theirs = Adam(network.parameters(), RATE, eps=1e-5), torch.optim.Adam(plain.parameters(), RATE, eps=1e-5)
    before = copy.deepcopy(network)
    for step, heads in enumerate(uses):
        train(network, ours, [heads], step)
        train(plain, theirs, [heads], step)
        assert_equal_parameters(network, plain)
    assert (before.right.weight - network.right.weight).abs().max() > RATE  # it has moved


@pytest.mark.parametrize("max_norm", [0.05, 3.0, 1e9, 0.0])
def test_clipping_is_torchs(max_norm: float) -> None:
    network, plain = pair()
    ours, theirs = Adam(network.parameters(), RATE), torch.optim.Adam(plain.parameters(), RATE)
    found: list[Tensor] = []

    def clip() -> None:
        ours.clip_gradient(max_norm)
        found.append(ours.gradient.clone())

    for step, heads in enumerate(SOMETIMES):
        train(network, ours, [heads], step, clip)
        train(plain, theirs, [heads], step, lambda: max_norm and nn.utils.clip_grad_norm_(plain.parameters(), max_norm))
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in plain.parameters())
        torch.testing.assert_close(found.pop(), torch.cat([grad.flatten() for grad in grads]))
        assert_equal_parameters(network, plain)


@USES
def test_elementary_operations_agree_with_the_fused_kernel_to_float_error(uses: list[str]) -> None:
    network, other = pair(torch.float32)
    train(network, Adam(network.parameters(), RATE), uses)
    with recording():
        train(other, Adam(other.parameters(), RATE), uses)
    assert parameter_hash(network) != parameter_hash(other)  # they are other operations
    assert_equal_parameters(network, other, rtol=0, atol=2e-6)


def test_the_learning_rate_is_a_tensor_that_may_be_changed_in_place() -> None:
    network, plain = pair()
    ours, theirs = Adam(network.parameters(), RATE), torch.optim.Adam(plain.parameters(), RATE)
    for step, rate in enumerate((RATE, 2 * RATE, 0.0, RATE / 2)):
        ours.param_groups[0]["lr"].fill_(rate)
        theirs.param_groups[0]["lr"] = rate
        train(network, ours, ["lr"], step)
        train(plain, theirs, ["lr"], step)
        assert_equal_parameters(network, plain)


def stored(optimizer: Adam) -> dict[str, Any]:
    """Its state as a checkpoint holds it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@USES
@pytest.mark.parametrize("at", [0, 1, 5, 12])
def test_a_restored_optimizer_goes_on_to_the_last_bit(at: int, uses: list[str]) -> None:
    network, twin = pair(torch.float32)
    optimizer = Adam(network.parameters(), RATE)
    train(network, optimizer, uses[:at])
    restored = Adam(twin.parameters(), RATE)
    twin.load_state_dict(network.state_dict())
    restored.load_state_dict(stored(optimizer))
    train(network, optimizer, uses[at:], at)
    train(twin, restored, uses[at:], at)
    assert parameter_hash(network) == parameter_hash(twin)


def test_loading_brings_moments_and_steps_and_the_arguments_the_rate() -> None:
    network, twin = pair(torch.float32)
    optimizer, restored = Adam(network.parameters(), RATE), Adam(twin.parameters(), 0.5)
    train(twin, restored, ALL)  # what is loaded replaces it
    train(network, optimizer, LATE)
    restored.load_state_dict(stored(optimizer))
    assert restored.param_groups[0]["lr"].item() == 0.5
    for ours, theirs in zip(restored.tensors()[1:], optimizer.tensors()[1:], strict=True):
        assert torch.equal(ours, theirs)
    restored.load_state_dict(stored(Adam(network.parameters(), RATE)))  # of one that has not taken a step
    assert not any(tensor.any() for tensor in restored.tensors()[1:])


@pytest.mark.parametrize("step", [torch.tensor(7.0), torch.full((6,), 7.0)], ids=["one", "each"])
def test_a_state_of_the_old_format_is_torchs_of_one_vector(step: Tensor) -> None:
    """As it was stored when the vector was what Adam stepped: the same parameters, in the same order."""
    network, plain = pair(torch.float32)
    vector = nn.Parameter(nn.utils.parameters_to_vector(plain.parameters()).detach())
    theirs, ours = torch.optim.Adam([vector], RATE, fused=True), Adam(network.parameters(), RATE)

    def vector_step(number: int) -> None:
        nn.utils.vector_to_parameters(vector.detach(), plain.parameters())
        plain.zero_grad()
        plain.loss(number, "lr").backward()
        vector.grad = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
        theirs.step()

    for number in range(7):
        vector_step(number)
    state = copy.deepcopy(theirs.state_dict())
    assert state["state"].keys() == {0}
    state["state"][0]["step"] = step
    ours.load_state_dict(state)
    with torch.no_grad():
        nn.utils.vector_to_parameters(vector.detach().clone(), network.parameters())
    for number in range(7, 20):
        vector_step(number)
        train(network, ours, ["lr"], number)
    assert torch.equal(nn.utils.parameters_to_vector(network.parameters()), vector)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_state_of_other_parameters_is_refused(name: str) -> None:
    network, _ = pair()
    optimizer = Adam(network.parameters(), RATE)
    train(network, optimizer, ALL[:2])
    state = stored(optimizer)
    state["state"][0][name] = state["state"][0][name][1:]
    with pytest.raises(CheckpointError, match=rf"the optimizer's {name} is \(58,\) in the checkpoint, \(59,\) now"):
        optimizer.load_state_dict(state)


def test_a_module_may_be_moved_to_another_type_after_its_optimizer_was_made() -> None:
    network, plain = pair(torch.float32)
    ours, theirs = Adam(network.parameters(), RATE), torch.optim.Adam(plain.double().parameters(), RATE)
    network.double()
    train(network, ours, SOMETIMES)
    train(plain, theirs, SOMETIMES)
    assert_equal_parameters(network, plain)
    assert ours.flat.exp_avg.dtype == torch.float64


def test_a_module_that_moves_between_steps_keeps_its_moments() -> None:
    network, plain = pair(torch.float64)
    ours, theirs = Adam(network.parameters(), RATE), torch.optim.Adam(plain.parameters(), RATE)
    train(network, ours, ALL[:5])
    train(plain, theirs, ALL[:5])
    network.to(torch.float32).to(torch.float64)
    train(network, ours, ALL[5:], 5)
    train(plain, theirs, ALL[5:], 5)
    assert_equal_parameters(network, plain, rtol=1e-4, atol=1e-6)


def test_a_layer_may_be_replaced_before_the_optimizer_is_made() -> None:
    network, plain = pair()
    new = nn.Linear(8, 2).double()
    network.left, plain.left = new, copy.deepcopy(new)
    train(network, Adam(network.parameters(), RATE), ALL)
    train(plain, torch.optim.Adam(plain.parameters(), RATE), ALL)
    assert_equal_parameters(network, plain)


def test_loading_parameters_keeps_what_the_optimizer_steps() -> None:
    network, plain = pair()
    ours, theirs = Adam(network.parameters(), RATE), torch.optim.Adam(plain.parameters(), RATE)
    other = Heads().double().state_dict()
    network.load_state_dict(other)
    plain.load_state_dict(other)
    train(network, ours, ALL)
    train(plain, theirs, ALL)
    assert_equal_parameters(network, plain)


def test_making_an_optimizer_changes_no_value_and_leaves_frozen_parameters_out() -> None:
    network, plain = pair(torch.float32)
    network.body.bias.requires_grad_(False)
    optimizer = Adam(network.parameters(), RATE)
    assert parameter_hash(network) == parameter_hash(plain)
    assert optimizer.flat.vector.numel() == sum(p.numel() for p in plain.parameters()) - 8
    train(network, optimizer, ALL)
    assert torch.equal(network.body.bias, plain.body.bias)
    assert not torch.equal(network.body.weight, plain.body.weight)


def test_gradients_of_a_step_are_forgotten_before_the_next() -> None:
    network, _ = pair()
    optimizer = Adam(network.parameters(), RATE)
    train(network, optimizer, ["lr"])
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not optimizer.gradient.any()


def test_gradient_and_metrics_are_averaged_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = pair()
    optimizer, sent = Adam(network.parameters(), RATE), []
    monkeypatch.setattr(
        optimizer_module, "mean_over_ranks", lambda fabric, vector: sent.append(vector.clone()) or vector / 4
    )
    network.loss(0, "lr").backward()
    gradient, metrics = optimizer.gradient.clone(), torch.tensor([2.0, 8.0], requires_grad=True)
    alone = average_gradients(SimpleNamespace(world_size=1), optimizer, metrics)
    assert not sent
    assert torch.equal(alone, metrics)
    assert not alone.requires_grad
    averaged = average_gradients(SimpleNamespace(world_size=2), optimizer, metrics)
    (message,) = sent
    assert torch.equal(message, torch.cat((gradient, metrics.detach().double())))
    assert averaged.tolist() == [0.5, 2.0]
    assert averaged.dtype == torch.float32
    assert torch.equal(optimizer.gradient, gradient / 4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("world_size", [ranks.FEW, ranks.FEW + 4])
def test_few_ranks_average_by_one_gathering_and_many_by_a_sum(
    world_size: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def finish(collective: Any, result: torch.Tensor, *own: torch.Tensor, group: str) -> None:
        """Each rank has as much as this one."""
        used.append((collective, group))
        result.copy_(own[0].repeat(world_size) if own else world_size * result)

    monkeypatch.setattr(ranks, "finish", finish)
    monkeypatch.setattr(ranks, "_resolve_process_group", {"name": "group"}.get)
    monkeypatch.setattr(ranks, "is_recording", lambda: compiled)
    fabric: Any = SimpleNamespace(world_size=world_size, process_group=SimpleNamespace(group_name="name"))
    own = torch.tensor([1.0, 2.0])
    assert ranks.mean_over_ranks(fabric, own).tolist() == own.tolist() == [1.0, 2.0]
    assert used == [(ranks.gather if world_size == ranks.FEW else torch.distributed.all_reduce, "group")]


class Work:
    """A collective that is done after so many looks, or once somebody waits for it; `error`: and has failed."""

    def __init__(self, looks: float, error: Exception | None = None) -> None:
        self.looks, self.error, self.waited = looks, error, False

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        self.waited = True
        if self.error:
            raise self.error


def test_a_rank_looks_whether_a_collective_is_done_and_in_the_end_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    given_way = []
    monkeypatch.setattr(ranks, "_give_way", lambda: given_way.append(None))
    started = []

    def collective(tensor: torch.Tensor, *, async_op: bool, group: str) -> Work:
        started.append((tensor, async_op, group))
        return work

    work, tensor = Work(looks=3), torch.ones(1)
    ranks.finish(collective, tensor, group="group")
    assert started == [(tensor, True, "group")]
    assert work.waited
    assert len(given_way) == 3
    work = Work(looks=float("inf"))
    ranks.finish(collective, tensor, group="group")
    assert work.waited
    work = Work(looks=0, error=RuntimeError("a peer is gone"))
    with pytest.raises(RuntimeError, match="gone"):
        ranks.finish(collective, tensor, group="group")


@pytest.mark.parametrize("other", [{"eps": 1e-5}, {"betas": (0.8, 0.999)}], ids=str)
def test_moments_of_other_settings_are_refused(other: dict[str, Any]) -> None:
    here, there = (Adam([torch.nn.Parameter(torch.ones(2))], 1e-3, **settings) for settings in ({}, other))
    with pytest.raises(CheckpointError, match=next(iter(other))):
        here.load_state_dict(there.state_dict())
