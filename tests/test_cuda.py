"""On a GPU every script does what it does on a CPU; where there is none, these tests are skipped."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import torch
import torch._inductor

from fabricrl import evaluate
from fabricrl.algos.droq import droq
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac
from fabricrl.data import DeviceReplayBuffer
from fabricrl.models.distributions import TanhNormalHead
from fabricrl.models.models import DropoutMasks
from fabricrl.utils import Adam, average_gradients
from fabricrl.utils import device as device_module
from fabricrl.utils.errors import ConfigError, NonFiniteError
from fabricrl.utils.precision import LossScale
from fabricrl.utils.update import Runner
from tests.conftest import Trained
from tests.process import differences, load, run_team
from tests.tensor_envs import Simulator
from tests.test_tensor_runs import SCRIPTS
from tests.test_tensors import LATER, NUMBERED_RUN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Episodes of 8 steps: they end where iterations and checkpoints do
COMMON = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--hidden-sizes", 16, 16, "--keep-checkpoints", 9]
CONTINUOUS = ["--env-kwargs", '{"continuous": true, "truncate": true}', "--norm-obs", "--num-threads", 1]
OFF_POLICY = [*CONTINUOUS, "--learning-starts", 32, "--batch-size", 16, "--total-timesteps", 96]
RUNS: dict[str, tuple[Callable[[], int], list]] = {
    "ppo": (ppo.main, [*CONTINUOUS, "--norm-reward", "--num-steps", 16, "--total-timesteps", 96]),
    "ppo, discrete": (ppo.main, ["--num-steps", 16, "--total-timesteps", 96]),
    "ppo_recurrent": (
        ppo_recurrent.main,
        [*CONTINUOUS, "--norm-reward", "--num-steps", 16, "--total-timesteps", 96, "--prev-action"],
    ),
    "sac": (sac.main, OFF_POLICY),
    "droq": (droq.main, [*OFF_POLICY, "--replay-ratio", 2]),
}
CUDA = ["--accelerator", "cuda"]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch lets cuDNN round what goes into convolutions and recurrent cores to TF32, whatever products are told."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, train: Callable[..., Any]) -> Callable[..., Any]:
    """Trains one of the scripts with further flags."""
    main, flags = RUNS[request.param]
    return lambda *more: train(main, *([] if "--resume" in more else [*COMMON, *flags]), *more)


EAGER = ["--no-cuda-graphs"]
HOST_RING = ["--buffer-device", "cpu"]
COMPILED = [name for name in RUNS if name != "ppo, discrete"]  # Inductor takes its time
EACH_MODE = pytest.mark.parametrize(
    ("run", "flags"),
    [
        pytest.param(name, flags, id=f"{name}-{mode}")
        for flags, mode in (
            (["--compile"], "compiled"),
            ([], "captured"),
            (EAGER, "as it is"),
        )  # what takes longest first
        for name in (COMPILED if flags == ["--compile"] else RUNS)
    ],
    indirect=["run"],
)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights that each run starts from, as `Trained.weights` has those that it ends with."""
    reset, found = Run.reset, []

    def noted(run: Run) -> Any:
        state = run._parts["agent"].state_dict().items()
        found.append(torch.cat([value.reshape(-1).cpu() for name, value in state if "normalizer" not in name]))
        return reset(run)

    monkeypatch.setattr(Run, "reset", noted)
    return found


def apart(ours: Trained, theirs: Trained, start: torch.Tensor) -> float:
    """The distance between the ends of two runs, of their way: about 1 if one learns nothing, or something else."""
    first, second = (trained.weights.cpu() - start for trained in (ours, theirs))
    assert first.any()
    assert second.any()
    return ((first - second).norm() / second.norm()).item()


def draw_on_the_cpu() -> None:
    """Updates of SAC and DroQ draw the numbers that they draw on a CPU; a graph could not."""
    noise = TanhNormalHead.noise
    Run.draw_on = lambda run, device: None  # type: ignore[method-assign]
    TanhNormalHead.noise = lambda *args: noise(*args).cuda()  # type: ignore[method-assign]


def test_as_on_the_cpu(
    run: Callable[..., Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, flags = run(), []
    if "sac" in request.node.name or "droq" in request.node.name:
        for holder, name in ((TanhNormalHead, "noise"), (Run, "draw_on")):
            monkeypatch.setattr(holder, name, getattr(holder, name))  # to be put back
        draw_on_the_cpu()
        flags = [*EAGER, *HOST_RING]
    there = run(*CUDA, *flags)
    assert "on cuda" in there.output
    assert not here.weights.equal(torch.zeros_like(here.weights))
    torch.testing.assert_close(there.weights.cpu(), here.weights, rtol=0, atol=2e-4)


def test_captured_is_as_it_is(run: Callable[..., Any]) -> None:
    captured, eager = run(*CUDA), run(*CUDA, *EAGER)
    torch.testing.assert_close(captured.weights.cpu(), eager.weights.cpu(), rtol=0, atol=2e-4)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Iterations that wait for the GPU anywhere but in `fabricrl.utils.device.wait` fail; how often each did."""
    wait, iterations, checkpoint, waits = device_module.wait, Run.iterations, Run.checkpoint, []

    def may_wait(where: torch.device) -> None:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        wait(where)
        torch.cuda.set_sync_debug_mode(mode)
        if waits:
            waits[-1] += 1

    def watched(run: Run, steps: int) -> Iterator[int]:
        for step in iterations(run, steps):
            waits.append(0)
            torch.cuda.set_sync_debug_mode("error")
            yield step
            torch.cuda.set_sync_debug_mode("default")

    def unwatched(run: Run, *args: Any, **parts: Any) -> None:
        if run.checkpoint_is_due:  # what is saved has to be read
            torch.cuda.set_sync_debug_mode("default")
        checkpoint(run, *args, **parts)
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(device_module, "wait", may_wait)
    monkeypatch.setattr(Run, "iterations", watched)
    monkeypatch.setattr(Run, "checkpoint", unwatched)
    yield waits
    torch.cuda.set_sync_debug_mode("default")


ON_CPU, ON_GPU = ["--player-device", "cpu"], ["--player-device", "cuda"]
PICTURES = ["--env-id", "tests.image_envs:Drift-v0", "--env-kwargs", "{}", "--frame-stack", 2, "--cnn-features", 8]


@pytest.mark.parametrize("flags", [ON_CPU, ON_GPU, [*ON_GPU, "--precision", "bf16-mixed"]], ids=["cpu", "gpu", "bf16"])
def test_iterations_wait_in_one_place(
    run: Callable[..., Any], flags: list[Any], strict: list[int], request: pytest.FixtureRequest
) -> None:
    assert run(*CUDA, *flags, "--log-every", 1_000).code == 0
    off_policy = "sac" in request.node.name or "droq" in request.node.name
    if off_policy and flags != ON_CPU:
        assert max(strict[:-1]) == 1  # the actions; the last iteration is logged
    if not off_policy and flags == ON_CPU:
        assert max(strict[:-1]) <= 2  # weights to act with, and the losses


@pytest.mark.parametrize(("algo", "player", "most"), [("ppo", ON_CPU, 2), ("ppo", ON_GPU, 16 + 1), ("sac", ON_GPU, 1)])
def test_iterations_on_images_wait_in_one_place(
    algo: str, player: list[Any], most: int, train: Callable[..., Any], strict: list[int]
) -> None:
    main, flags = RUNS[algo]
    assert train(main, *COMMON, *flags, *PICTURES, *CUDA, *player, "--log-every", 1_000).code == 0
    assert 0 < max(strict[:-1]) <= most  # weights or actions, and PPO's losses


TENSORS = ["--num-envs", 64, "--num-steps", 16, "--total-timesteps", 16384, "--norm-obs", "--norm-reward"]
ON_TENSORS = pytest.mark.parametrize(
    "more",
    [
        ["--env-id", "torch/CartPole-v1"],
        ["--env-id", "torch/Reach-v0"],
        ["--env-id", "tests.tensor_envs:Numbered-v0", "--env-kwargs", '{"autoreset_mode": "next_step"}'],
    ],
    ids=["cartpole", "reach", "next step"],
)


@ON_TENSORS
def test_of_tensors_only_logs_leave_the_gpu(more: list[Any], train: Callable[..., Any], strict: list[int]) -> None:
    assert train(ppo.main, *TENSORS, *more, *CUDA, "--log-every", 10**9).code == 0
    assert max(strict[:-1]) == 2  # episodes, and losses


class LookingAway(Simulator):
    """Asks for no value; what it returns is all on its device."""

    looks = False


gym.register("LookingAway-v0", vector_entry_point=LookingAway)  # type: ignore[arg-type]
TENSOR_SCRIPTS = SCRIPTS | {"ppo": (ppo, NUMBERED_RUN)}
TENSOR_ENVS = {
    "code": [],
    "next step": ["--env-kwargs", LATER],
    "simulator": ["--env-id", "tests.test_cuda:LookingAway-v0"],
}


@pytest.mark.parametrize("kind", TENSOR_ENVS)
@pytest.mark.parametrize("algo", TENSOR_SCRIPTS)
def test_nothing_of_tensors_leaves_the_gpu_but_for_logs(
    algo: str, kind: str, train: Callable[..., Any], strict: list[int]
) -> None:
    script, flags = TENSOR_SCRIPTS[algo]
    assert train(script.main, *flags, *TENSOR_ENVS[kind], *CUDA, "--log-every", 10**9).code == 0
    assert max(strict[:-1]) == (2 if "ppo" in algo else 0)  # of a rollout episodes, and losses


@ON_TENSORS
def test_rollouts_of_tensors_are_the_same_captured_compiled_and_resumed(
    more: list[Any], train: Callable[..., Any], starts: list[torch.Tensor], tmp_path: Path
) -> None:
    line = [*TENSORS, *more, *CUDA, "--checkpoint-every", 8192, "--keep-checkpoints", 9]
    captured, eager, compiled = (train(ppo.main, *line, *flags) for flags in ([], EAGER, ["--compile"]))
    torch.testing.assert_close(captured.weights, eager.weights, rtol=0, atol=2e-3)
    assert apart(compiled, eager, starts[0]) < 0.1  # two actions of 16384 that turn out otherwise make 0.05 on a CPU
    half = captured.checkpoint.with_name(f"step_{8192:012d}.ckpt")
    resumed = train(ppo.main, "--resume", half, "--log-dir", tmp_path / "resumed")
    assert differences(captured.state["envs"], resumed.state["envs"]) == []
    on_cpu = train(ppo.main, "--resume", half, "--accelerator", "cpu", "--log-dir", tmp_path / "cpu")
    assert on_cpu.result["steps"] == "16384"


@pytest.mark.parametrize("flags", [[], ["--vectorization", "native"]], ids=["images", "native"])
@pytest.mark.parametrize("algo", [ppo, ppo_recurrent], ids=["ppo", "ppo_recurrent"])
def test_stacked_images_and_skipped_steps_as_on_the_cpu(algo: Any, flags: list, train: Callable[..., Any]) -> None:
    images = ["--env-id", "tests.envs:PictureDict-v0", "--frame-stack", 3, "--cnn-features", 16, "--clip-reward"]
    line = [*(flags or images), "--num-envs", 4, "--num-steps", 16, "--num-minibatches", 2, "--norm-obs"]
    acts = ["--player-device", "cuda"]  # and stacks frames there
    here, *there = (train(algo.main, *line, "--total-timesteps", 128, *where) for where in ([], CUDA, [*CUDA, *acts]))
    for one in there:
        assert "on cuda" in one.output
        torch.testing.assert_close(one.weights.cpu(), here.weights, rtol=0, atol=1e-3)


@EACH_MODE
def test_a_run_is_the_same_again_and_the_same_resumed(run: Callable[..., Any], flags: list[str], tmp_path: Any) -> None:
    line = [*CUDA, *flags, "--checkpoint-every", 32, *ON_CPU]  # auto measures, and a new run may choose otherwise
    straight, again = (run(*line, "--log-dir", tmp_path / name) for name in ("first", "second"))
    half = straight.checkpoint.with_name(f"step_{64:012d}.ckpt")
    resumed = run("--resume", half, "--log-dir", tmp_path / "resumed")
    before, *states = (
        {k: v for k, v in load(path).items() if k not in ("args", "best_return")}
        for path in (half, straight.checkpoint, again.checkpoint, resumed.checkpoint)
    )
    assert differences(states[0], states[1]) == []
    assert differences(states[0], states[2]) == []
    assert differences(before["agent"], states[0]["agent"])


def test_a_resumed_run_acts_where_it_was_found_faster(run: Callable[..., Any], tmp_path: Any) -> None:
    straight = run(*CUDA, "--checkpoint-every", 32)
    half = straight.checkpoint.with_name(f"step_{64:012d}.ckpt")
    resumed = run("--resume", half, "--log-dir", tmp_path / "resumed")
    states = [{k: v for k, v in one.state.items() if k not in ("args", "best_return")} for one in (straight, resumed)]
    assert differences(*states) == []
    assert ("player_device" in states[0]) == ("player device: " in straight.output)
    assert "player device: " not in resumed.output


def test_checkpoint_changes_devices(run: Callable[..., Any], script: Callable[..., int], tmp_path: Any) -> None:
    half = run(*CUDA, "--checkpoint-every", 32).checkpoint.with_name(f"step_{64:012d}.ckpt")
    assert script(evaluate.main, half, "--episodes", 2) == 0
    on_cpu = run("--resume", half, "--log-dir", tmp_path / "cpu", "--accelerator", "cpu")
    assert "on cpu" in on_cpu.output
    assert on_cpu.result["steps"] == "96"


# How far a parameter may be off, and the average one. On a CPU bf16-mixed takes them 0.005 and 9e-5 from each other,
# and compiling 1e-6; PPO's may move by 0.024 in all, SAC's and DroQ's by more
FASTER = [
    (["--precision", "bf16-mixed"], 0.01, 5e-4),
    (["--matmul-precision", "high"], 5e-3, 2e-4),
    (["--compile"], 1e-3, 5e-5),
    (["--compile", *EAGER], 1e-3, 5e-5),
    (["--compile", "--precision", "bf16-mixed"], 0.01, 5e-4),
]


def product() -> torch.Tensor:
    """Multiplies two matrices in the precision that the last run has chosen."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).cuda()
    return x @ x


def test_faster_ways(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    compiled, inductor = [], torch._inductor.compile
    monkeypatch.setattr(torch._inductor, "compile", lambda *given: compiled.append(1) or inductor(*given))
    plain, exact = run(*CUDA), product()
    assert not compiled
    for flags, most, average in FASTER:  # in one test, as Inductor finds on disk what the one before has made
        if "--compile" in flags and request.node.callspec.params["run"] not in COMPILED:
            continue
        compiled.clear()
        off = (run(*CUDA, *flags).weights.cpu() - plain.weights.cpu()).abs()
        assert off.max() <= most, flags
        assert off.mean() <= average, flags
        # Each flag has done something
        assert bool(compiled) == ("--compile" in flags), flags
        assert torch.equal(product(), exact) == ("--matmul-precision" not in flags), flags
        assert off.max() > 1e-5 or "--precision" not in flags, flags  # on a CPU 2e-4


def steps_taken(trained: Trained) -> list[float]:
    """Steps of each optimizer that have not been left out."""
    parts = [part for name, part in trained.state.items() if name.endswith("optimizer")]
    return [float(part["state"][0]["step"].max()) for part in parts]


@EACH_MODE
def test_16_bits_with_a_scaled_loss(
    run: Callable[..., Any], flags: list[str], starts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled, scale = [], LossScale.scale
    monkeypatch.setattr(LossScale, "scale", lambda scaler, loss: scaled.append(1) or scale(scaler, loss))
    plain = run(*CUDA)
    assert not scaled
    half = run(*CUDA, "--precision", "16-mixed", *flags)
    assert scaled
    assert half.weights.isfinite().all()
    assert 0 < half.state["scaler"]["scale"] <= 2.0**16  # halved wherever a gradient has overflowed
    for steps, most in zip(steps_taken(half), steps_taken(plain), strict=True):
        assert most / 2 < steps <= most  # the others have overflowed
    assert apart(half, plain, starts[0]) < 0.5  # on a CPU it is 0.01, and with a step that is left out up to 0.2


@pytest.mark.parametrize("algo", ["sac", "droq"])
@pytest.mark.parametrize("there", ["cpu", "cuda"])
def test_replay_changes_devices(algo: str, there: str, train: Callable[..., Any], tmp_path: Path) -> None:
    main, flags = RUNS[algo]
    line = [*COMMON, *flags, *CUDA, "--buffer-device", there, "--checkpoint-every", 32]
    first = train(main, *line)
    assert ("per rank, on cuda" in first.output) == (there == "cuda")
    half, here = first.checkpoint.with_name(f"step_{64:012d}.ckpt"), {"cpu": "cuda", "cuda": "cpu"}[there]
    other = train(main, "--resume", half, "--buffer-device", here, "--log-dir", tmp_path / "other")
    assert other.result["steps"] == "96"
    kept = [load(r.checkpoint)["shard"]["records"][: len(load(half)["shard"]["records"]) // 2] for r in (first, other)]
    assert torch.equal(*kept)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Some iterations after the graphs were captured, what a script learns from is NaN; the calls so far."""
    calls: list[int] = []

    def spoil(gae: Callable[..., Any]) -> Callable[..., Any]:
        def gae_of_spoiled(rewards: torch.Tensor, *rest: Any) -> Any:
            calls.append(1)
            if len(calls) >= 3:
                rewards.fill_(math.nan)
            return gae(rewards, *rest)

        return gae_of_spoiled

    for module in (ppo, ppo_recurrent):
        monkeypatch.setattr(module, "gae", spoil(module.gae))
    add = DeviceReplayBuffer.add

    def add_and_spoil(rb: DeviceReplayBuffer, *step: Any, **infos: Any) -> None:
        add(rb, *step, **infos)
        calls.append(1)
        if len(calls) >= 60:
            rb._columns["rewards"].fill_(math.nan)  # on the GPU: on the CPU the step itself would be refused

    monkeypatch.setattr(DeviceReplayBuffer, "add", add_and_spoil)
    return calls


def test_nan_in_a_graph_ends_the_run_at_once(
    run: Callable[..., Any], spoiled: list[int], request: pytest.FixtureRequest
) -> None:
    with pytest.raises(NonFiniteError):
        run(*CUDA, "--log-every", 10**6, "--checkpoint-every", 10**6, "--total-timesteps", 10_000)
    assert len(spoiled) <= (4 if "ppo" in request.node.name else 62)


def test_a_run_captures_nothing_after_its_start(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs: list[tuple[Run, int]] = []
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: runs.append((run, run.runner.recordings)) or reset(run))
    first = run(*CUDA, "--checkpoint-every", 32)
    run("--resume", first.checkpoint.with_name(f"step_{64:012d}.ckpt"), "--log-dir", tmp_path / "resumed")
    for made, at_start in runs:
        assert made.runner.recordings == at_start > 0


def test_ranks_are_averaged_inside_a_graph(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        layer = torch.nn.Linear(3, 1, bias=False, device="cuda")
        optimizer = Adam(layer.parameters(), 0.1)
        pair: Any = SimpleNamespace(world_size=2)  # of which this one is there: the mean is half its own
        runner = Runner(False, True, [layer], [optimizer])

        def update(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            optimizer.zero_grad()
            loss = layer(x).sum()
            loss.backward()
            return average_gradients(pair, optimizer, loss[None]), optimizer.gradient

        captured = runner.captured(update)
        for x in torch.randn(3, 5, 3, device="cuda"):
            loss, gradient = captured(x)
            torch.testing.assert_close(gradient, x.sum(0) / 2)
            torch.testing.assert_close(loss, layer(x).sum()[None].detach() / 2)
        assert runner.recordings == 1
    finally:
        torch.distributed.destroy_process_group()


def test_masks_of_dropout_keep_what_is_not_dropped() -> None:
    mask = DropoutMasks(0.1).draw(10**6, torch.Generator("cuda").manual_seed(1))
    assert mask.mean().item() == pytest.approx(0.9, abs=0.002)  # six standard errors
    assert ((mask == 0) | (mask == 1)).all()


def test_more_gpus_than_there_are(run: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="is not available here"):
        run(*CUDA, "--devices", torch.cuda.device_count() + 1)


def trainers_draw_on_the_cpu(rank: int) -> None:
    if rank > 0:
        draw_on_the_cpu()


@pytest.mark.parametrize("algo", ["ppo", "ppo_recurrent", "sac", "droq"])
def test_player_on_the_cpu_and_trainer_on_the_gpu(algo: str, train: Callable[..., Any], tmp_path: Path) -> None:
    main, flags = RUNS[algo]
    here = train(main, *COMMON, *flags, "--checkpoint-every", 32)
    twin, line = f"fabricrl.algos.{algo}.{algo}_decoupled", [*COMMON, *flags, "--checkpoint-every", 32, "--max-lag", 0]
    line += [*CUDA, "--player-device", "cpu", *([*EAGER, *HOST_RING] if algo in ("sac", "droq") else [])]
    folders = ["--log-dir", tmp_path / "there"]
    there = run_team(twin, *line, *folders, folder=tmp_path / "team", prepare=trainers_draw_on_the_cpu)
    state = load(there.result["checkpoint"])
    weights = torch.cat([v.reshape(-1) for name, v in state["agent"].items() if "normalizer" not in name])
    torch.testing.assert_close(weights, here.weights, rtol=0, atol=2e-4)
    assert (
        train(main, "--resume", there.result["checkpoint"], "--log-dir", tmp_path / "resumed").result["steps"] == "96"
    )
