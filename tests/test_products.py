"""Products that oneDNN takes over in what is compiled are those of PyTorch, and only the large ones are."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fabricrl.utils import Adam, products, update
from fabricrl.utils.products import BY_ONEDNN, LEAST
from fabricrl.utils.update import Runner

aten, ours = torch.ops.aten, torch.ops.fabricrl
WIDE = 128  # WIDE³ is LEAST
KINDS: dict[str, Callable[..., Tensor]] = {
    "mm": lambda a, b, bias: a @ b,
    "addmm": lambda a, b, bias: torch.addmm(bias, a, b),
    "bmm": lambda a, b, bias: torch.bmm(torch.stack((a, -a)), torch.stack((b, 2 * b))),
    "baddbmm": lambda a, b, bias: torch.baddbmm(
        torch.stack((bias, -bias))[:, None], torch.stack((a, -a)), torch.stack((b, 2 * b))
    ),
}
pytestmark = pytest.mark.skipif(not products._has_onednn(), reason="PyTorch has been built without oneDNN")


def operands(rows: int = WIDE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, WIDE, dtype=dtype), torch.randn(WIDE, WIDE, dtype=dtype), torch.randn(WIDE, dtype=dtype)


def targets(function: Callable[..., Any], *inputs: Tensor) -> set[Any]:
    return {node.target for node in make_fx(function, BY_ONEDNN)(*inputs).graph.nodes}


@pytest.mark.parametrize("turned", [(), (0,), (1,), (0, 1)], ids=["as they are", "A turned", "B turned", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_pytorch(kind: str, turned: tuple[int, ...]) -> None:
    a, b, bias = (x.mT if index in turned else x for index, x in enumerate(operands()))
    graph = make_fx(KINDS[kind], BY_ONEDNN)(a, b, bias)
    assert {node.target for node in graph.graph.nodes} & {ours.product.default, ours.products.default}
    expected = KINDS[kind](a.double(), b.double(), bias.double())
    torch.testing.assert_close(graph(a, b, bias).double(), expected, rtol=0, atol=1e-4)  # sums of 128 terms around 1


@pytest.mark.parametrize("kind", KINDS)
def test_small_products_and_other_precisions_are_left_alone(kind: str) -> None:
    own = {ours.product.default, ours.products.default}
    assert WIDE**3 == LEAST
    assert targets(KINDS[kind], *operands()) & own
    for inputs in (operands(WIDE - 1), operands(dtype=torch.float64), operands(dtype=torch.bfloat16)):
        assert not targets(KINDS[kind], *inputs) & own


def test_scaled_products_and_sums_of_matrices_are_left_alone() -> None:
    a, b, bias = operands()
    assert aten.addmm.default in targets(lambda *x: torch.addmm(x[2], x[0], x[1], beta=2), a, b, bias)
    assert aten.addmm.default in targets(lambda *x: torch.addmm(x[0], x[0], x[1]), a, b)
    assert aten.addmm.default in targets(lambda *x: torch.addmm(x[2], x[0], x[1]), a, b, bias[:1])  # one for all
    pairs = [torch.stack((x, x)) for x in (a, b)]
    assert aten.baddbmm.default in targets(lambda a, b: torch.baddbmm(a, a, b), *pairs)


@pytest.mark.parametrize("compiler", ["traced", "inductor"])
def test_a_compiled_update_of_wide_networks_is_the_plain_one(
    compiler: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if compiler == "traced":
        request.getfixturevalue("traced")
    taken_over, compile = [], torch._inductor.compile

    def counted(graph: GraphModule, inputs: list[Tensor]) -> Any:
        taken_over.append(sum(node.target is ours.product.default for node in graph.graph.nodes))
        return compile(graph, inputs)

    monkeypatch.setattr(torch._inductor, "compile", counted)
    monkeypatch.setattr(update, "faster_products", lambda: BY_ONEDNN)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, WIDE), nn.ReLU(), nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 1))
        optimizer = Adam(network.parameters(), 1e-3)
        runner = Runner(compiled, False, [network], [optimizer])

        def step(x: Tensor, network: nn.Module = network, optimizer: Adam = optimizer) -> Tensor:
            loss = (network(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        recorded = runner.compiled(step)
        losses = [recorded(torch.full((WIDE, 8), 0.1 * number)) for number in range(5)]
        found.append((torch.stack(losses), optimizer.flat.vector.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert taken_over == [3]  # the wide layer, its gradient and that of its inputs


@pytest.mark.parametrize(
    ("processor", "capability", "expected"),
    [
        ("vendor_id\t: AuthenticAMD", "AVX512", True),
        ("vendor_id\t: AuthenticAMD", "AVX2", False),
        ("vendor_id\t: GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
        (None, "DEFAULT", False),
    ],
)
def test_amd_processors_with_wide_vectors_have_faster_products(
    processor: str | None, capability: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    if processor is not None:
        info.write_text(f"processor\t: 0\n{processor}\n")
    monkeypatch.setattr(products, "Path", lambda name: info)
    monkeypatch.setattr(products, "platform", SimpleNamespace(processor=lambda: "arm"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products._mkl_is_slow.__wrapped__() == expected
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: expected)
    assert bool(products.faster_products()) == expected
