"""16-bit floats: the scale of the loss is torch's, steps that overflow change nothing, and a resumed run goes on."""

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.fabric.strategies import STRATEGY_REGISTRY
from torch import nn

from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.utils import launch as launch_module
from fabricrl.utils.choices import ALLOWED, check_choice
from fabricrl.utils.errors import CheckpointError, ConfigError
from fabricrl.utils.optimizer import Adam
from fabricrl.utils.precision import HalfPrecision, LossScale
from fabricrl.utils.recording import recording
from fabricrl.utils.update import Runner
from tests.process import call, differences, load, stopped_in

HUGE = float("inf")
# Gradients of 12 steps: two that overflow come together, one is not a number
GRADIENTS = [0.5, HUGE, 0.25, -1.0, HUGE, -HUGE, 2.0, 1.0, float("nan"), 0.5, 0.125, 1.0]


def torch_scaled(gradients: list[float], interval: int) -> tuple[list[Any], list[Any]]:
    """Parameters and states after each step of `torch.amp.GradScaler` and `torch.optim.Adam` on these."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    adam = torch.optim.Adam([parameter], 0.1)
    scaler = torch.amp.GradScaler("cpu", growth_interval=interval)
    parameters, states = [], []
    for gradient in gradients:
        parameter.grad = scaler.scale(torch.tensor(gradient)) * torch.ones(2)
        scaler.step(adam)
        scaler.update()
        parameters.append(parameter.detach().clone())
        states.append(scaler.state_dict())
    return parameters, states


@pytest.mark.parametrize("is_recorded", [False, True], ids=["fused", "as a compiler takes it"])
@pytest.mark.parametrize("interval", [2, 3, 2000])
def test_scale_and_steps_are_those_of_torch_s_scaler_and_adam(
    monkeypatch: pytest.MonkeyPatch, is_recorded: bool, interval: int
) -> None:
    monkeypatch.setattr(LossScale, "growth_interval", interval)
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    adam = Adam([parameter], 0.1)
    adam.scaler = scaler = LossScale("cpu")
    expected, states = torch_scaled(GRADIENTS, interval)
    for gradient, after, state in zip(GRADIENTS, expected, states, strict=True):
        adam.zero_grad()
        parameter.grad = scaler.scale(torch.tensor(gradient)) * torch.ones(2)
        with recording() if is_recorded else torch.no_grad():
            adam.step()
        torch.testing.assert_close(parameter.detach(), after, rtol=1e-5, atol=1e-6)
        assert scaler.state_dict() == state
    assert adam.flat.steps.tolist() == [8.0]  # of 12


def test_the_state_is_interchangeable_with_that_of_torch_s_scaler() -> None:
    theirs, ours = torch.amp.GradScaler("cpu", init_scale=128.0), LossScale("cpu")
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == theirs.state_dict()
    theirs.load_state_dict(ours.state_dict() | {"scale": 64.0})
    assert theirs.get_scale() == 64


def test_the_scale_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "growth_interval", 1)
    scaler = LossScale("cpu")
    for _ in range(200):
        assert scaler.overflows(torch.zeros(1)) == 0
    assert scaler.scale_factor == 2.0**127
    assert scaler.overflows(torch.tensor([HUGE])) == 1
    assert scaler.scale_factor == 2.0**126


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": HUGE}, {"scale": float("nan")}, {"_growth_tracker": -1}])
def test_a_scale_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    scaler = LossScale("cpu")
    with pytest.raises(CheckpointError, match="the scale of the loss cannot be"):
        scaler.load_state_dict(scaler.state_dict() | wrong)


def test_a_warmup_leaves_the_scale_as_it_was() -> None:
    parameter = nn.Parameter(torch.ones(3))
    adam = Adam([parameter], 0.1)
    adam.scaler = LossScale("cpu")
    before = adam.scaler.state_dict()
    with Runner(False, False, [], [adam]).restoring_state():
        parameter.grad = torch.full((3,), HUGE)
        adam.step()
        assert adam.scaler.state_dict() != before
    assert adam.scaler.state_dict() == before


def test_the_scale_goes_to_the_device_that_a_launch_has_given_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that, "cuda" is the first GPU for every rank."""
    scaler = LossScale("cpu")
    scaler.to(torch.device("meta"))
    assert {tensor.device.type for tensor in scaler.tensors()} == {"meta"}
    moved: list[torch.device] = []
    monkeypatch.setattr(launch_module, "_half_precision_device", lambda asked: "cpu")
    monkeypatch.setattr(LossScale, "to", lambda self, device: moved.append(device))
    fabric = launch_module.launch(PPOArgs())
    assert moved == [fabric.device]


# --- In a script. On a GPU 16-mixed comes by --precision; here Fabric is given it for the CPU


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    original = launch_module._options
    plugins = lambda args: original(args) | {"plugins": [HalfPrecision("cpu")]}  # noqa: E731
    monkeypatch.setattr(launch_module, "_options", plugins)


FLAGS = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--num-steps", 32, "--total-timesteps", 512]
FLAGS += ["--checkpoint-every", 64, "--num-minibatches", 2, "--update-epochs", 2]


@pytest.mark.parametrize("flags", [[], ["--compile"]], ids=["as it is", "compiled"])
def test_a_run_in_16_bits_overflows_goes_on_and_resumes_to_the_last_bit(
    half: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], traced: None
) -> None:
    """The scale begins so high that all gradients overflow until after the checkpoint, and grows every third step."""
    monkeypatch.setattr(LossScale, "growth_interval", 3)
    original = LossScale.__init__

    def high(self: LossScale, device: Any) -> None:
        original(self, device)
        self.scale_factor.fill_(2.0**40)

    monkeypatch.setattr(LossScale, "__init__", high)
    whole = call(ppo.main, *FLAGS, *flags, "--log-dir", tmp_path / "whole")
    with stopped_in(3):
        call(ppo.main, *FLAGS, *flags, "--log-dir", tmp_path / "parts")
    last = call(ppo.main, *FLAGS, *flags, "--resume", "auto", "--log-dir", tmp_path / "parts")
    expected, found = load(whole.checkpoint), load(last.checkpoint)
    assert found["scaler"]["scale"] < 2.0**40
    steps, updates = found["optimizer"]["state"][0]["step"].item(), 8 * 2 * 2
    assert 0 < steps < updates, "no gradient has overflowed, or all have"
    for part in ("scaler", "agent", "optimizer", "generators", "episodes"):
        assert differences(expected[part], found[part]) == [], part


def test_networks_compute_in_16_bits_and_parameters_stay_in_32(half: None, tmp_path: Path) -> None:
    seen = set()

    def note(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and torch.is_grad_enabled():
            seen.add(output.dtype)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        ended = call(ppo.main, *FLAGS, "--log-dir", tmp_path)
    finally:
        handle.remove()
    assert torch.float16 in seen
    assert {value.dtype for value in load(ended.checkpoint)["agent"].values()} == {torch.float32}


# --- What is taken, and why the rest is not


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--strategy", "ddp_spawn"], "cannot be forked or spawned half-way"),
        (["--strategy", "ddp_fork"], "cannot be forked or spawned half-way"),
        (["--strategy", "fsdp"], "it divides parameters among GPUs, and each rank acts with all of them"),
        (["--strategy", "deepspeed"], "it divides parameters among GPUs, and each rank acts with all of them"),
        (["--strategy", "dp"], "one can compute at a time"),
        (["--precision", "16-true"], "parameters stay in 32 bits"),
        (["--precision", "64-true"], "observations and actions have 32 bits"),
        (["--precision", "16-mixed"], "bf16-mixed or 32-true without --accelerator cuda"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_makes_no_sense_here_is_refused_with_the_reason(flags: list[str], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        call(ppo.main, *flags, "--log-dir", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{flags[0]} is {flags[1]}: it must be ")
    assert why in message
    assert "\n" not in message


CHOICES = {"strategy": STRATEGY_REGISTRY.available_strategies(), "precision": []}
for kind in get_args(_PRECISION_INPUT):
    CHOICES["precision"] += [choice for choice in get_args(kind) if isinstance(choice, str)]


@pytest.mark.parametrize(
    ("name", "choice"), [(name, choice) for name, choices in CHOICES.items() for choice in choices]
)
def test_each_of_fabrics_choices_is_taken_or_refused_with_a_reason(name: str, choice: str) -> None:
    if choice in ALLOWED[name]:
        check_choice(name, choice)
        return
    with pytest.raises(ConfigError, match=rf"must be one of {', '.join(ALLOWED[name])}; ."):
        check_choice(name, choice)


def test_fabric_has_no_fsdp_on_the_cpu_either() -> None:
    """The day that this fails, FSDP can at least be tried without GPUs."""
    with pytest.raises(ValueError, match="only available on GPU"):
        Fabric(accelerator="cpu", devices=2, strategy="fsdp")


@pytest.mark.parametrize(
    ("launcher", "accelerator", "cuda"), itertools.product([False, True], ["cuda", "gpu", "auto", None], [False, True])
)
def test_16_mixed_is_taken_where_a_gpu_trains(
    monkeypatch: pytest.MonkeyPatch, launcher: bool, accelerator: str | None, cuda: bool
) -> None:
    """Chosen beside the script or for the launcher, as the accelerator is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    options = {"precision": "16-mixed"} | ({"accelerator": accelerator} if accelerator else {})
    if launcher:
        for name, value in options.items():
            monkeypatch.setenv(f"LT_{name.upper()}", value)
        options = {}
    if accelerator in ("cuda", "gpu") or (accelerator == "auto" and cuda):
        assert launch_module._half_precision_device(options) == "cuda"
    else:
        with pytest.raises(ConfigError, match="16-bit floats are for GPUs"):
            launch_module._half_precision_device(options)
