"""Back ends of environments: how fast PPO is with each, what the environments alone and the network alone would allow.

    pip install -e '.[mujoco,atari,envpool]' --group dev
    python benchmarks/backends.py --table        CartPole-v1 with 1 to 1 024 environments, each back end
    python benchmarks/backends.py --cartpole     256 native environments: steps per second, seconds to the end, return
    python benchmarks/backends.py --halfcheetah  HalfCheetah-v5 with EnvPool beside sync, the whole of PPO
    python benchmarks/backends.py --games        processor time of a step of Pong, 8 games, of each back end
    python benchmarks/backends.py --pong         Pong, native and with EnvPool, beside the floor: game and network alone
    python benchmarks/backends.py --tensors      256 CartPoles that are tensors beside 256 native ones, compiled or not
    python benchmarks/backends.py --jax          CartPoles and Pendulums that are tensors beside rejax, which is all JAX
    python benchmarks/backends.py --gpu-task T   on a GPU, T: tensors-4096, beside the sketch of it; tensors-16384;
                                                 solved, the seconds until 4 096 are; pong, beside the floor;
                                                 pong-64, in bf16-mixed; rejax-cartpole, rejax-pendulum

The table goes to benchmarks/results/backends.md, the others to speed.csv and speed.md as those of speed.py do. Let
nothing else run meanwhile. Exit code 1: a bar was missed.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gymnasium.spaces import Discrete
from speed import (
    DRY_HELP,
    PPO,
    ROOT,
    Comparison,
    bench,
    late_sps,
    machine,
    on_gpu,
    ours,
    repeat,
    run,
    sketched,
    spread,
    theirs,
    timed,
)
from torch import Tensor

from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PRESETS, PPOArgs
from fabricrl.algos.ppo.loss import policy_loss, value_loss
from fabricrl.envs import make_envs
from fabricrl.utils.batch import Batch
from fabricrl.utils.process import keep_memory
from fabricrl.utils.records import Records
from fabricrl.utils.update import Runner

COUNTS = (1, 4, 16, 64, 256, 1024)
BACKENDS = ("sync", "async", "native", "envpool")
# Fewer steps each where there are more environments; four epochs of eight minibatches, whatever the number
CARTPOLE = "--env-id CartPole-v1 --num-minibatches 8 --update-epochs 4 --learning-rate 3e-3"
TENSORS = "--num-steps 32 --update-epochs 4 --learning-rate 3e-3 --compile"
SHORT_TENSORS = "--no-compile --num-envs 64 --total-timesteps 20480"  # in a dry run
NATIVE_PONG = f"{PPO} --preset atari --vectorization native"
SHORT_PONG = "--num-envs 8 --num-steps 16 --update-epochs 1 --total-timesteps 512 --log-every 128"
GAMES = ("native", *(["envpool"] if importlib.util.find_spec("envpool") else []))  # that play in C++


def steps_alone(args: PPOArgs, seconds: float) -> float:
    """Steps per second of the environments of `args` with random actions, and nothing else."""
    envs = make_envs(args, 1, Path("."))
    envs.reset(seed=list(range(args.num_envs)))
    envs.action_space.seed(1)
    actions = [envs.action_space.sample() for _ in range(64)]
    for action in actions[:16]:
        envs.step(action)
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        envs.step(actions[count % 64])
        count += 1
    envs.close()
    return count * args.num_envs / passed


def bench_table(options: argparse.Namespace) -> bool:
    """Writes backends.md: of each number of environments and back end, the environments alone, and PPO."""
    lines = ["| environments | " + " | ".join(f"{kind}: alone / PPO" for kind in BACKENDS) + " |"]
    lines.append("|-" * (len(BACKENDS) + 1) + "|")
    for count in COUNTS:
        steps = max(8, 2048 // count)
        cells = []
        for kind in BACKENDS:
            if kind == "async" and count > 64:
                cells.append("–")  # a process each
                continue
            alone = steps_alone(PPOArgs(num_envs=count, num_steps=steps, vectorization=kind), options.seconds)
            total = (40 if count < 16 and kind != "async" else 20) * count * steps
            speeds = []
            for repetition in range(options.repetitions):
                with tempfile.TemporaryDirectory() as folder:
                    flags = f"--vectorization {kind} --num-envs {count} --num-steps {steps} --seed {repetition + 1}"
                    command = f"{PPO} {CARTPOLE} {flags} --total-timesteps {total}"
                    speeds.append(timed(ours(command, folder, options)).sps)
            cells.append(f"{alone:,.0f} / {statistics.median(speeds):,.0f}".replace(",", " "))
            print(f"{count} environments, {kind}: {alone:.0f} alone, {spread(speeds)} of PPO", flush=True)
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    head = ["Steps per second of CartPole-v1: the environments alone, with random actions, and PPO as a whole"]
    head.append(f"(`{CARTPOLE}`, 2 048 steps an iteration or 8 of each environment; median of {options.repetitions}).")
    source = f"`python benchmarks/backends.py --table --repetitions {options.repetitions}`, on {machine()}"
    text = "\n".join(["\n".join(head), "", *lines, "", source, ""])
    (options.out / "backends.md").write_text(text)
    print(text)
    return True


def bench_cartpole(options: argparse.Namespace) -> bool:
    """Steps per second with 256 native environments, and the seconds of a run that solves CartPole."""
    flags = f"{CARTPOLE} --vectorization native --num-envs 256 --num-steps 32 --total-timesteps 1000000"
    comparisons = [
        Comparison("steps/s", "PPO, 256 native environments, 4 epochs", "one step a second", "a / b", ">= 100000"),
        Comparison("s from the command to the end", "PPO", "nothing", "a - b", "<= 20"),
        Comparison("greedy return over 100 episodes", "PPO", "0", "a - b", ">= 475"),
    ]

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        started = time.perf_counter()
        sps = timed(ours(f"{PPO} {flags} --seed {seed}", folder, options)).sps
        wall = time.perf_counter() - started
        (made,) = Path(folder).glob("ppo/*/*")
        output, _ = run([sys.executable, "fabricrl/evaluate.py", str(made), "--mode", "greedy", "--json"])
        return [(sps, 1.0), (wall, 0.0), (json.loads(output)["greedy"]["return_mean"], 0.0)]

    return bench("native-cartpole", comparisons, measure, options)


def bench_halfcheetah(options: argparse.Namespace) -> bool:
    """Steps per second of the whole of PPO, with EnvPool's threads and with a loop over environments."""
    flags = f"{PPO} --env-id HalfCheetah-v5 --preset mujoco --num-envs 8 --num-steps 256 --total-timesteps 61440"
    comparisons = [Comparison("steps/s", "PPO, 8 environments of EnvPool", "PPO, 8 environments, sync", "a / b")]

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        kinds = ("envpool", "sync")
        a, b = (timed(ours(f"{flags} --vectorization {kind} --seed {seed}", folder, options)).sps for kind in kinds)
        return [(a, b)]

    return bench("envpool-halfcheetah", comparisons, measure, options)


def seconds_of(work: Callable[[], object], repetitions: int, device: str) -> float:
    """Median time of a call, until the device has done what it starts."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(repetitions + 1):
        wait()
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def floor(args: PPOArgs, device: str = "cpu", seconds: float = 5.0) -> float:
    """Steps per second if there were nothing but the environments, and the network's products: one forward pass to act,
    and one forward and backward pass a minibatch and epoch, on data that is there already; on a GPU as CUDA graphs."""
    space = Records({}, {"image": (84, 84)})
    sizes = {"frame_stack": args.frame_stack, "cnn_features": args.cnn_features}
    agent = PPOAgent(space, Discrete(6), args.hidden_sizes, **sizes).to(device)
    runner = Runner(compile=False, capture=device == "cuda", modules=[agent], optimizers=[])
    batch = args.num_envs * args.num_steps // args.num_minibatches
    rng = np.random.default_rng(0)
    shown = torch.from_numpy(rng.integers(0, 255, (args.num_envs, 4, 7056), np.uint8)).to(device)
    seen = agent.prepare(torch.from_numpy(rng.integers(0, 255, (batch, 4, 7056), np.uint8)).to(device))
    actions, ones = torch.zeros(batch, 1, dtype=torch.int64, device=device), torch.ones(batch, device=device)
    data = Batch(obs=seen, actions=actions)

    def learn() -> tuple[Tensor, ...]:
        for _ in range(args.num_minibatches):
            logprobs, entropy, values = agent(data)
            loss = policy_loss(logprobs, ones, 0.1) + value_loss(values, ones, ones, 0.1, True) - 0.01 * entropy.mean()
            loss.backward()
        return ()

    noise = agent.head.noise((args.num_envs,), torch.Generator()).to(device)
    with torch.inference_mode():
        act = seconds_of(runner.captured(partial(agent.act, shown, noise), reused=True), 200, device)
    epoch = seconds_of(runner.captured(learn), 8, device)
    env = args.num_envs / steps_alone(args, seconds)
    steps = args.num_steps * (act + env) + args.update_epochs * epoch
    print(f"floor: act {act * 1e3:.2f} ms, environments {env * 1e3:.2f} ms, epoch {epoch * 1e3:.1f} ms", flush=True)
    return args.num_steps * args.num_envs / steps


def atari(kind: str) -> PPOArgs:
    return PPOArgs(**PRESETS["atari"] | {"vectorization": kind})


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for file in files for child in file.read_text().split()]
    return [one for child in found for one in (child, *descendants(child))]


def processor_seconds() -> float:
    """Processor time of this process, and of those that it has started and that still run."""
    seconds = time.process_time()
    for pid in descendants(os.getpid()):
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13]
        seconds += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return seconds


def bench_games(options: argparse.Namespace) -> bool:
    """Processor time of a step of Pong, 8 games that are played in turn by each back end, with random actions."""
    others = [kind for kind in (*GAMES, "sync", "async") if kind != "native"]
    bars = {"envpool": "<= 1.0"}
    comparisons = [
        Comparison("µs of processor time a step of a game", "native", kind, "a / b", bars.get(kind, ""))
        for kind in others
    ]

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        made = {kind: make_envs(atari(kind), 1, Path(folder)) for kind in ("native", *others)}
        spent = dict.fromkeys(made, 0.0)
        steps = int(600 * options.seconds)
        for envs in made.values():
            envs.reset(seed=[seed * 100 + i for i in range(8)])
        actions = np.random.default_rng(seed).integers(6, size=(steps, 8))
        for part in np.array_split(actions, 10):  # each back end in turn, ten times
            for kind, envs in made.items():
                started = processor_seconds()
                for action in part:
                    envs.step(action)
                spent[kind] += processor_seconds() - started
        for envs in made.values():
            envs.close()
        each = {kind: seconds / steps / 8 * 1e6 for kind, seconds in spent.items()}
        return [(each["native"], each[kind]) for kind in others]

    return bench("atari-games", comparisons, measure, options)


def bench_pong(options: argparse.Namespace) -> bool:
    """Steps per second of PPO on Pong, as a share of what game and network allow, and native beside EnvPool."""
    flags = f"{PPO} --preset atari --num-threads {options.num_threads}"
    flags += f" --total-timesteps {options.total_timesteps or 32768}"
    names = {"native": "PPO, 8 native games", "envpool": "PPO, 8 games of EnvPool"}
    comparisons = [Comparison("steps/s", names[kind], "the floor", "a / b", ">= 0.8") for kind in GAMES]
    if "envpool" in GAMES:
        comparisons.append(Comparison("steps/s", *names.values(), "a / b", ">= 1.0"))
    torch.set_num_threads(options.num_threads)
    keep_memory()  # as the script does

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        pairs = []
        for kind in GAMES:
            command = ours(f"{flags} --vectorization {kind} --seed {seed}", folder, options)
            pairs.append((timed(command).sps, floor(atari(kind))))
        return pairs + [(pairs[0][0], pairs[1][0])] * (len(GAMES) - 1)

    return bench("pong", comparisons, measure, options)


def bench_tensors(options: argparse.Namespace) -> bool:
    """Steps per second with 256 CartPoles that are tensors, beside native ones; as they are, and with --compile."""
    flags = f"{PPO} {CARTPOLE} --num-envs 256 --num-steps 32 --total-timesteps 1000000"
    kinds = {"as it is": ("", ">= 100000"), "with --compile": ("--compile", "")}
    comparisons = [
        Comparison(f"steps/s, {kind}", "PPO, 256 CartPoles of tensors", "one step a second", "a / b", bar)
        for kind, (_, bar) in kinds.items()
    ]
    comparisons += [
        Comparison(f"beside native, {kind}", "PPO, 256 CartPoles of tensors", "256 native ones", "a / b")
        for kind in kinds
    ]

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        pairs = []
        for more, _ in kinds.values():
            command = f"{flags} {more} --seed {seed}"
            tensors = f"{command} --env-id torch/CartPole-v1"
            pairs.append(
                tuple(timed(ours(c, folder, options)).sps for c in (tensors, f"{command} --vectorization native"))
            )
        return [(a, 1.0) for a, _ in pairs] + pairs

    return bench("tensors-cartpole", comparisons, measure, options)


def bench_tensors_gpu(count: int, bars: tuple[str, str, str] | None, options: argparse.Namespace) -> bool:
    """Steps per second of a rollout and update that never leave a GPU, statistics and logs on; and the return.

    Args:
        bars: of the speed, of the return, and of the speed beside the sketch's; None: only the numbers, no sketch.
    """
    command = f"{PPO} --env-id torch/CartPole-v1 {TENSORS} --num-minibatches 4 --num-envs {count}"
    command += f" --total-timesteps 60000000 --log-every 2000000 {on_gpu(SHORT_TENSORS, options)}"
    what = f"PPO, {count} CartPoles on the GPU"
    speed, mean_return, share = bars or ("", "", "")
    comparisons = [
        Comparison("steps/s", what, "one step a second", "a / b", speed),
        Comparison("mean return", what, "0", "a - b", mean_return),
    ]
    comparisons += [Comparison("steps/s", what, "the sketch", "a / b", share)] if bars else []

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        output, _ = run(ours(f"{command} --seed {seed}", folder, options))
        sps, mean = (float(found) for found in re.findall(r" (?:sps|return_mean)=([\d.]+)", output))
        sketch = [(sps, sketched(f"gpu_environment.py {count} 1", options))] if bars else []
        return [(sps, 1.0), (mean, 0.0), *sketch]

    return bench(f"gpu-tensors-{count}", comparisons, measure, options)


def bench_solved(options: argparse.Namespace) -> bool:
    """Seconds from the command until 4 096 CartPoles on a GPU are solved, and the process has ended."""
    command = f"{PPO} --env-id torch/CartPole-v1 --num-envs 4096 --num-steps 32 --num-minibatches 16 "
    command += "--learning-rate 3e-3 --total-timesteps 20000000 --checkpoint-every 0 --eval-every 1310720 "
    command += f"--stop-at-return 475 {on_gpu('--num-envs 64 --total-timesteps 20480 --eval-every 10240', options)}"
    comparisons = [
        Comparison("s from the command to the end", "PPO, 4096 CartPoles on the GPU", "nothing", "a - b", "<= 10"),
        Comparison("greedy return over 10 episodes", "PPO, 4096 CartPoles on the GPU", "0", "a - b", ">= 475"),
    ]

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        output, wall = run(ours(f"{command} --seed {seed}", folder, options))
        return [(wall, 0.0), (float(re.findall(r"eval_return_mean=([\d.]+)", output)[0]), 0.0)]

    return bench("gpu-solved", comparisons, measure, options)


def bench_pong_gpu(options: argparse.Namespace) -> bool:
    """Steps per second of PPO on Pong, 8 native games and a GPU, as a share of what games and network allow there."""
    command = f"{NATIVE_PONG} --total-timesteps 65536 "
    command += on_gpu(SHORT_PONG, options)
    device, seconds = ("cpu", 0.5) if options.dry else ("cuda", 5.0)
    comparisons = [Comparison("steps/s", "PPO, 8 native games", "the floor", "a / b", ">= 0.85")]

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        return [(late_sps(command, seed, folder, options), floor(atari("native"), device, seconds))]

    return bench("gpu-pong", comparisons, measure, options)


def bench_pong_64(options: argparse.Namespace) -> bool:
    """Steps per second of PPO on Pong, 64 native games and a GPU, in bf16-mixed."""
    command = f"{NATIVE_PONG} --num-envs 64 --precision bf16-mixed --total-timesteps 196608 "
    command += on_gpu(SHORT_PONG, options)
    comparisons = [Comparison("steps/s", "PPO, 64 native games", "one step a second", "a / b", ">= 12000")]

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        return [(late_sps(command, seed, folder, options), 1.0)]

    return bench("gpu-pong-64", comparisons, measure, options)


def bench_jax(
    options: argparse.Namespace, names: tuple[str, ...] = ("CartPole-v1", "Pendulum-v1"), gpu: bool = False
) -> bool:
    """Steps per second of PPO with --compile on tensor environments, beside rejax's PPO on gymnax's."""
    count, minibatches, steps = (4096, 4, 60_000_000) if gpu else (256, 8, 1_000_000)
    comparisons = [Comparison(f"steps/s, {count} x {name}", "PPO, --compile", "rejax", "a / b") for name in names]
    flags = f"{TENSORS} --num-minibatches {minibatches} --num-envs {count} --accelerator {'cuda' if gpu else 'cpu'}"
    same = {"num_envs": count, "num_steps": 32, "num_minibatches": minibatches, "num_epochs": 4, "learning_rate": 3e-3}
    same |= {"gamma": 0.99, "gae_lambda": 0.95, "clip_eps": 0.2, "ent_coef": 0.01, "max_grad_norm": 0.5}
    total = options.total_timesteps or steps

    def measure(seed: int, folder: str) -> list[tuple[float, float]]:
        pairs = []
        for name in names:
            command = f"{PPO} --env-id torch/{name} {flags} --total-timesteps {total} --seed {seed}"
            peer = theirs("peer_rejax", {"ppo": same | {"env": name}, "total_timesteps": total, "seed": seed}, options)
            pairs.append((timed(ours(command, f"{folder}/{name}", options)).sps, timed(peer).sps))
        return pairs

    return bench(f"gpu-rejax-{'-'.join(names)}" if gpu else "jax", comparisons, measure, options)


GPU: dict[str, Callable[[argparse.Namespace], bool]] = {
    "tensors-4096": partial(bench_tensors_gpu, 4096, (">= 5000000", ">= 475", ">= 0.56")),
    "tensors-16384": partial(bench_tensors_gpu, 16384, None),
    "solved": bench_solved,
    "pong": bench_pong_gpu,
    "pong-64": bench_pong_64,
    "rejax-cartpole": partial(bench_jax, names=("CartPole-v1",), gpu=True),
    "rejax-pendulum": partial(bench_jax, names=("Pendulum-v1",), gpu=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = {
        "table": bench_table,
        "cartpole": bench_cartpole,
        "halfcheetah": bench_halfcheetah,
        "games": bench_games,
        "pong": bench_pong,
        "tensors": bench_tensors,
        "jax": bench_jax,
    }
    for name, job in jobs.items():
        parser.add_argument(f"--{name}", action="store_true", help=(job.__doc__ or "").split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3, help="default: 3")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement of environments alone")
    parser.add_argument("--num-threads", type=int, default=2, help="of PyTorch, for Pong (default: 2)")
    parser.add_argument("--ours-args", default="", help="more flags for our script")
    parser.add_argument("--total-timesteps", type=int, help="instead of the benchmark's, for a quick look")
    parser.add_argument("--peer-python", default=".venv-peers/bin/python", help="default: .venv-peers/bin/python")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the results")
    parser.add_argument("--gpu-task", choices=GPU, action="append", default=[], help="on a GPU; can be repeated")
    parser.add_argument("--dry", action="store_true", help=DRY_HELP)
    options = parser.parse_args()
    options.machine = machine(bool(options.gpu_task) and not options.dry)
    torch.set_num_threads(1)
    asked = {f"--{name}": job for name, job in jobs.items() if getattr(options, name)}
    asked |= {f"--gpu-task {name}": GPU[name] for name in options.gpu_task}
    reached = []
    for flag, job in (asked or {f"--{name}": job for name, job in jobs.items() if name != "jax"}).items():
        options.command = f"python benchmarks/backends.py {flag} {repeat(options)}"
        reached.append(job(options))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
