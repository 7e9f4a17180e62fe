"""Speed beside others: every quantity is measured for A and for B in turn (A B A B ...), and compared pair by pair.

    python benchmarks/speed.py                          every task, against Stable-Baselines3 and SBX
    python benchmarks/speed.py --task ppo-cartpole-1env --ours-args=--compile
    python benchmarks/speed.py --task ppo-walker2d --before v0.1    not a peer, but an earlier revision of ours
    python benchmarks/speed.py --sampling               drawing from a full replay buffer, beside copying
    python benchmarks/speed.py --startup                from the command to the first environment step
    python benchmarks/speed.py --startup --ours-args=--compile      a warm start beside one without --compile
    python benchmarks/speed.py --memory                 resident memory after iteration 100 and after 2 000
    python benchmarks/speed.py --ranks                  two ranks beside one, with as much each or with half of it
    python benchmarks/speed.py --gpu                    a GPU: ours beside sketches of what it can do
    python benchmarks/speed.py --decoupled              a player and a trainer beside one rank; what their messages cost

Prints the median over repetitions with minimum and maximum, and writes them to benchmarks/results/speed.csv and .md,
where a benchmark replaces what it had there. Let nothing else run meanwhile. Exit code 1: a bar was missed.
"""

import argparse
import csv
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PPO, RECURRENT, SAC, DROQ = (f"fabricrl/algos/{name}/{name}.py" for name in ("ppo", "ppo_recurrent", "sac", "droq"))


class Comparison(NamedTuple):
    """A and B, how they are compared, and the bar for the median ("": none)."""

    quantity: str
    a_is: str
    b_is: str
    how: str  # "a / b" or "a - b"
    bar: str = ""  # such as ">= 2.3"


class Task(NamedTuple):
    """Equal settings in our words and in those of Stable-Baselines3, whose other defaults hold on both sides."""

    ours: str
    peer: dict[str, Any]
    bar: str


class UpdateTask(NamedTuple):
    """Equal settings again, for critic updates per second of a stretch of a run: after `warm_up` steps, to the end.

    Attributes:
        peer: what both peers have in common; "model" holds arguments of their SAC.
        bars: which peers, and what ours is to reach beside each.
    """

    ours: str
    updates_per_step: float
    warm_up: int
    peer: dict[str, Any]
    bars: dict[str, str]


# Stable-Baselines3 weighs the mean squared error of the value by vf_coef, we weigh half of it: ours is twice theirs.
# Its minibatches have a size, ours a number.
SB3 = "--learning-rate 3e-4 --no-anneal-lr --ent-coef 0 --no-clip-vloss --vf-coef 1.0"
PLAIN = {"learning_rate": 3e-4, "anneal_lr": False, "normalize": False, "total_timesteps": 65_536}
TASKS = {
    "ppo-cartpole-1env": Task(
        f"{PPO} --env-id CartPole-v1 --num-envs 1 --num-steps 128 --num-minibatches 2 --update-epochs 10 {SB3}",
        PLAIN | {"env_id": "CartPole-v1", "num_envs": 1, "ppo": {"n_steps": 128, "batch_size": 64, "n_epochs": 10}},
        ">= 3.1",
    ),
    "ppo-cartpole-4env": Task(
        f"{PPO} --env-id CartPole-v1 --num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 {SB3}",
        PLAIN | {"env_id": "CartPole-v1", "num_envs": 4, "ppo": {"n_steps": 128, "batch_size": 128, "n_epochs": 4}},
        ">= 2.4",
    ),
    "ppo-walker2d": Task(
        f"{PPO} --env-id Walker2d-v4 --preset mujoco",
        {
            "env_id": "Walker2d-v4",
            "num_envs": 1,
            "normalize": True,
            "learning_rate": 3e-4,
            "anneal_lr": True,
            "total_timesteps": 30 * 2048,
            "ppo": {"n_steps": 2048, "batch_size": 64, "n_epochs": 10, "clip_range_vf": 0.2, "vf_coef": 0.25},
        },
        ">= 2.1",
    ),
    # sb3-contrib cuts rollouts at the ends of episodes alone; hence sequences of up to all 128 steps here
    "ppo-recurrent-cartpole": Task(
        f"{RECURRENT} --env-id CartPole-v1 --mask-velocities --num-envs 8 --num-steps 128 --num-minibatches 4 "
        f"--update-epochs 4 --rnn-hidden-size 64 --hidden-sizes 64 64 --sequence-length 128 {SB3}",
        PLAIN
        | {
            "env_id": "CartPole-v1",
            "masked": [1, 3],
            "num_envs": 8,
            "policy": {"lstm_hidden_size": 64},
            "ppo": {"n_steps": 128, "batch_size": 256, "n_epochs": 4},
        },
        ">= 5.4",
    ),
}
# Learning starts early, so that few steps are random; what a peer compiles is compiled before the warm-up ends.
# Batches of 256 and layers of 256 × 256 are defaults on all sides.
UPDATE_TASKS = {
    "sac-lunarlander": UpdateTask(
        f"""{SAC} --env-id LunarLander-v3 --env-kwargs '{{"continuous":true}}' --num-envs 4 --replay-ratio 0.25 """
        "--policy-frequency 1 --policy-lr 3e-4 --q-lr 3e-4 --learning-starts 400",
        updates_per_step=1 / 4,
        warm_up=1_600,
        peer={
            "env_id": "LunarLander-v3",
            "env_kwargs": {"continuous": True},
            "num_envs": 4,
            "total_timesteps": 13_600,
            "model": {"learning_rate": 3e-4, "learning_starts": 400},
        },
        bars={"sb3": ">= 1.35", "sbx": ""},
    ),
    "droq-halfcheetah": UpdateTask(
        f"{DROQ} --env-id HalfCheetah-v5 --replay-ratio 20 --dropout 0.01 --layer-norm "
        "--policy-lr 3e-4 --q-lr 3e-4 --learning-starts 256",
        updates_per_step=20,
        warm_up=300,
        peer={
            "env_id": "HalfCheetah-v5",
            "num_envs": 1,
            "total_timesteps": 500,
            "model": {
                "learning_rate": 3e-4,
                "learning_starts": 256,
                "gradient_steps": 20,
                "policy_delay": 20,
                "policy_kwargs": {"dropout_rate": 0.01, "layer_norm": True},
            },
        },
        bars={"sbx": ">= 1.6"},
    ),
}
COMPILED: dict[str, Any] = {  # what is asked for with --compile
    "ppo-cartpole-1env": ">= 4",
    "ppo-cartpole-4env": ">= 4",
    "ppo-walker2d": ">= 3",
    "ppo-recurrent-cartpole": ">= 7",
    "sac-lunarlander": {"sb3": ">= 2", "sbx": ">= 1.3"},
    "droq-halfcheetah": {"sbx": ">= 2.3"},
}
PEERS = {"sb3": "Stable-Baselines3, faster of 1 and 2 threads", "sbx": "SBX"}
SHARED = "half of everything each"
WHOLE = "each with what one has"
RANKS = {  # arguments; those of one rank, and of each of two; what is asked for
    f"ppo-cartpole, {WHOLE}": (
        f"{PPO} --env-id CartPole-v1 --num-steps 128 --num-envs 16 --vectorization sync",
        "--total-timesteps 131072",
        "--total-timesteps 262144",
        ">= 1.5",
    ),
    f"ppo-walker2d, {WHOLE}": (
        f"{PPO} --env-id Walker2d-v4 --preset mujoco",
        "--total-timesteps 40960",
        "--total-timesteps 81920",
        ">= 1.5",
    ),
    f"sac-pendulum, {WHOLE}": (
        f"{SAC} --env-id Pendulum-v1 --num-threads 1 --learning-starts 1000 --log-every 500",
        "--total-timesteps 6000",
        "--total-timesteps 12000 --replay-ratio 0.5",
        ">= 1.5",
    ),
    f"ppo-cartpole, {SHARED}": (
        f"{PPO} --env-id CartPole-v1 --total-timesteps 131072",
        "--num-envs 8",
        "--num-envs 4",
        ">= 0.9",
    ),
    f"ppo-walker2d, {SHARED}": (
        f"{PPO} --env-id Walker2d-v4 --preset mujoco --total-timesteps 61440",
        "--num-envs 2",
        "--num-envs 1",
        ">= 0.9",
    ),
}
CHEETAH = "--env-id HalfCheetah-v5"
TF32 = "--matmul-precision high"  # as the sketches have it
PPO_GPU = f"{PPO} {CHEETAH} --preset mujoco --total-timesteps 24576 --log-every 2048 {TF32}"
SAC_GPU = f"{SAC} {CHEETAH} --learning-starts 1000 --total-timesteps 6000 --log-every 500 {TF32}"
DROQ_GPU = f"{DROQ} {CHEETAH} --learning-starts 500 --total-timesteps 2500 --log-every 250 {TF32}"
RECURRENT_GPU = f"{RECURRENT} --env-id CartPole-v1 --mask-velocities --total-timesteps 61440"
GPU = {  # arguments; the steps per second that are asked for; the sketch of the same update, if there is one
    "ppo": (PPO_GPU, 5000, "ppo"),
    "ppo, compiled": (f"{PPO_GPU} --compile", 5000, "ppoc"),
    "sac": (SAC_GPU, 1250, "sac"),
    "sac, compiled": (f"{SAC_GPU} --compile", 1250, "sacc"),
    "droq": (DROQ_GPU, 170, ""),
    "droq, compiled": (f"{DROQ_GPU} --compile", 350, ""),
    "recurrent ppo": (RECURRENT_GPU, 15_000, ""),
    "recurrent ppo, compiled": (f"{RECURRENT_GPU} --compile", 25_000, ""),
}
OF_SKETCH = ">= 0.75"
SHORT = {  # what --dry runs in place of that
    PPO: "--total-timesteps 8192",
    RECURRENT: "--total-timesteps 8192",
    SAC: "--learning-starts 380 --total-timesteps 400 --log-every 100",
    DROQ: "--learning-starts 380 --total-timesteps 400 --log-every 100",
}
HUMANOID = (
    f"--env-id Humanoid-v5 --num-envs 56 --replay-ratio {1 / 56} --policy-frequency 1 --learning-starts 2000 "
    "--total-timesteps 44800 --log-every 2240"
)
SLEEPING = """--env-id sleeping:Sleeping-v0 --vectorization sync --env-kwargs '{"milliseconds":"""
OVERLAP = {  # tasks on which playing and learning take about as long; threads of a rank; what is asked for
    "ppo-halfcheetah": (
        PPO,
        "--env-id HalfCheetah-v5 --num-envs 4 --num-steps 512 --num-minibatches 16 --update-epochs 7 "
        "--total-timesteps 102400 --log-every 8192",
        (1,),
        ">= 1.7",
    ),
    "sac-humanoid": (SAC, HUMANOID, (1, 2), ">= 1.3"),
    "ppo-recurrent-sleeping": (
        RECURRENT,
        f"{SLEEPING} 0.2}}' --num-envs 8 --update-epochs 16 --total-timesteps 40960 --log-every 4096",
        (1,),
        ">= 1.5",
    ),
    "droq-halfcheetah": (
        DROQ,
        "--env-id HalfCheetah-v5 --learning-starts 500 --total-timesteps 2500 --log-every 125",
        (1, 2),
        ">= 1.2",
    ),
}
# Two players share what one does alone: an iteration of 64 steps is 0.51 s of sleep for one
PLAYERS = f"{PPO} {SLEEPING} 2}}' --num-envs 4 --num-steps 64 --update-epochs 2 --total-timesteps 4096 --log-every 512"
# Tasks of which communication may take little; steps of an iteration; bytes each way, and about the ms of either's work
MESSAGES = {
    "ppo-cartpole": (
        PPO,
        "--env-id CartPole-v1 --num-envs 8 --num-steps 128 --total-timesteps 102400",
        1024,
        "42096 36760 30 30",
    ),
    "sac-pendulum": (
        SAC,
        "--env-id Pendulum-v1 --num-envs 4 --replay-ratio 0.25 --policy-frequency 1 --learning-starts 400 "
        "--total-timesteps 10000 --log-every 500",
        4,
        "192 269464 1 6",
    ),
}
MEMORY = {  # arguments, and the steps of an iteration
    "memory": ("--env-id CartPole-v1 --num-steps 32", 128),
    "memory-tensors": ("--env-id torch/CartPole-v1 --num-envs 4096 --num-steps 2 --update-epochs 1", 8192),
}
STARTS = {  # runs that are hardly more than a start
    "PPO": f"{PPO} --env-id CartPole-v1 --total-timesteps 512",
    "recurrent PPO": f"{RECURRENT} --env-id CartPole-v1 --total-timesteps 1024",
    "SAC": f"{SAC} --env-id Pendulum-v1 --learning-starts 256 --total-timesteps 266",
    "DroQ": f"{DROQ} --env-id Pendulum-v1 --learning-starts 256 --total-timesteps 266",
}
DRY_HELP = "short runs on the CPU of what needs a GPU, without sketches and bars, of which nothing is kept"
IMPORTS = "import os, torch; from lightning.fabric import Fabric; os._exit(0)"


class Outcome(NamedTuple):
    """Steps per second, and the seconds that the process took besides."""

    sps: float
    startup: float


def run(command: list[str], root: Path = ROOT, **environment: str) -> tuple[str, float]:
    """Standard output of a command that runs in the project's folder on one thread, and its wall-clock seconds."""
    paths = os.pathsep.join(filter(None, (str(root), str(root / "benchmarks"), os.environ.get("PYTHONPATH"))))
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=variables)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"error: exit code {done.returncode} of: {shlex.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout, seconds


def timed(command: list[str], root: Path = ROOT) -> Outcome:
    """Runs a script that prints a result line."""
    output, wall = run(command, root)
    fields = re.search(r"^result steps=(\d+) sps=([\d.]+)", output, re.MULTILINE)
    assert fields is not None, output
    steps, sps = int(fields[1]), float(fields[2])
    return Outcome(sps, wall - steps / sps)


def ours(arguments: str, log_dir: str, options: argparse.Namespace) -> list[str]:
    """The command of one of our runs; what `options` say comes last and wins."""
    steps = ["--total-timesteps", str(options.total_timesteps)] if options.total_timesteps else []
    return [sys.executable, *shlex.split(arguments), *steps, "--log-dir", log_dir, *shlex.split(options.ours_args)]


def theirs(script: str, settings: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """The command of one of a peer's runs."""
    return [str(ROOT / options.peer_python), f"benchmarks/{script}.py", json.dumps(settings)]


def logged(folder: str) -> list[dict[str, str]]:
    """Reads the metrics of the only run below a folder, made with `--logger csv`."""
    (metrics,) = Path(folder).rglob("metrics.csv")
    with metrics.open() as file:
        return list(csv.DictReader(file))


def bench_task(name: str, options: argparse.Namespace) -> bool:
    """Steps per second beside Stable-Baselines3's, each with its default logging: TensorBoard here, none there."""
    task = TASKS[name]
    bar = COMPILED[name] if "--compile" in options.ours_args else task.bar
    total = options.total_timesteps or task.peer["total_timesteps"]
    algo = "ppo_recurrent" if "policy" in task.peer else "ppo"
    peer = task.peer | {"algo": algo, "num_threads": 1, "total_timesteps": total}
    comparisons = [
        Comparison("steps/s", "fabricrl", "Stable-Baselines3", "a / b", bar),
        Comparison("start-up and end, s", "fabricrl", "Stable-Baselines3", "a - b"),
    ]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        arguments = f"{task.ours} --total-timesteps {total} --seed {seed}"
        a = timed(ours(arguments, log_dir, options))
        b = timed(theirs("peer_sb3", peer | {"seed": seed}, options))
        return list(zip(a, b, strict=True))

    return bench(name, comparisons, measure, options)


def bench_before(name: str, options: argparse.Namespace) -> bool:
    """Steps per second beside those of an earlier revision, which takes the same arguments."""
    comparisons = [Comparison("steps/s", "fabricrl", f"fabricrl at {options.before}", "a / b", ">= 1")]
    total = options.total_timesteps or TASKS[name].peer["total_timesteps"]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        command = ours(f"{TASKS[name].ours} --total-timesteps {total} --seed {seed}", log_dir, options)
        return [(timed(command).sps, timed(command, root).sps)]

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", root, options.before], cwd=ROOT, check=True)
        try:
            return bench(f"before-{name}", comparisons, measure, options)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", root], cwd=ROOT, check=True)


def fastest(which: str, settings: dict[str, Any], options: argparse.Namespace) -> float:
    """Updates per second of a peer, at its better number of threads; JAX takes what it finds."""
    speeds = []
    for threads in (1, 2) if which == "sb3" else (None,):
        output, _ = run(theirs(f"peer_{which}", settings | {"num_threads": threads}, options))
        fields = re.search(r"^result .*updates_per_second=(\S+)", output, re.MULTILINE)
        assert fields is not None, output
        speeds.append(float(fields[1]))
    return max(speeds)


def bench_updates(name: str, options: argparse.Namespace) -> bool:
    """Critic updates per second beside each peer, with acting and environment, without start and compilation.

    Ours logs to a file whose entries tell the seconds since the first reset, from which those of the stretch follow.
    """
    task = UPDATE_TASKS[name]
    total = options.total_timesteps or task.peer["total_timesteps"]
    if total <= task.warm_up:
        raise SystemExit(f"error: --total-timesteps {total}: {name} warms up for {task.warm_up}")
    peer = task.peer | {"algo": "sac", "total_timesteps": total, "warm_up": task.warm_up}
    bars = COMPILED[name] if "--compile" in options.ours_args else task.bars
    comparisons = [Comparison("updates/s", "fabricrl", PEERS[which], "a / b", bar) for which, bar in bars.items()]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        arguments = f"{task.ours} --total-timesteps {total} --seed {seed} --logger csv --log-every {task.warm_up}"
        run(ours(arguments, log_dir, options))
        entries = [(int(entry["step"]), float(entry["charts/SPS"])) for entry in logged(log_dir)]
        (first, *_, last) = [(step, step / sps) for step, sps in entries if step >= task.warm_up]
        a = task.updates_per_step * (last[0] - first[0]) / (last[1] - first[1])
        return [(a, fastest(which, peer | {"seed": seed}, options)) for which in task.bars]

    return bench(name, comparisons, measure, options)


def bench_sampling(options: argparse.Namespace) -> bool:
    """Drawing the batches of one step at an update-to-data ratio of 20, beside copying as many bytes."""
    stored = {"stored": "<= 2.0", "implicit": ""}
    comparisons = [
        Comparison(f"20 batches of 256, next observations {how}, ms", "sampling", "copying", "a / b", bar)
        for how, bar in stored.items()
    ]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        pairs = []
        for how in stored:
            settings = json.dumps({"implicit_next": how == "implicit", "seed": seed})
            output, _ = run([sys.executable, "benchmarks/sampling.py", settings])
            fields = re.search(r"^result sampling=(\S+) copying=(\S+)", output, re.MULTILINE)
            assert fields is not None, output
            pairs.append((float(fields[1]), float(fields[2])))
        return pairs

    return bench("sampling", comparisons, measure, options)


def bench_startup(options: argparse.Namespace) -> bool:
    """Seconds from the command to the first environment step, beside those that the imports alone take.

    With `--compile` among our flags: a start of each algorithm beside one without.
    """
    if "--compile" in options.ours_args:
        return bench_compiled_startup(options)
    comparisons = [Comparison("start-up, s", "command to first step", "importing torch and Fabric", "a - b", "<= 1.5")]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        command = ours(f"{PPO} --env-id first_step:FirstStep-v0", log_dir, options)
        _, a = run(command)
        _, b = run([sys.executable, "-c", IMPORTS])
        return [(a, b)]

    return bench("startup", comparisons, measure, options)


def bench_compiled_startup(options: argparse.Namespace) -> bool:
    """Seconds that runs take besides their steps, with `--compile` and without it.

    One of each goes first and counts nothing, after which Inductor has its programs on disk.
    """
    comparisons = [
        Comparison(f"start-up and end of {name}, s", "--compile, from disk", "without", "a - b", "<= 5")
        for name in STARTS
    ]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        pairs = []
        for arguments in STARTS.values():
            command = ours(arguments, log_dir, options)
            if seed == 1:
                timed(command)
            plain = [word for word in command if word != "--compile"]
            pairs.append((timed(command).startup, timed(plain).startup))
        return pairs

    return bench("startup", comparisons, measure, options)


def bench_memory(name: str, options: argparse.Namespace) -> bool:
    """Resident memory over 2 000 iterations that all log, and save every 50: what grows, grows visibly."""
    (flags, iteration), iterations = MEMORY[name], 2000
    comparisons = [Comparison("resident MiB", "iteration 2 000", "iteration 100", "a / b", "<= 1.01")]
    arguments = (
        f"{PPO} {flags} --total-timesteps {iteration * iterations} "
        f"--log-every {iteration} --checkpoint-every {50 * iteration}"
    )

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        command = ours(arguments, log_dir, options)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        by_step: dict[int, float] = {}  # resident memory when the checkpoint of this step was seen first
        while process.poll() is None:
            saved = max((int(path.stem[5:]) for path in Path(log_dir).rglob("step_*.ckpt")), default=0)
            found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            if found and saved not in by_step:
                by_step[saved] = int(found[1]) / 1024
            time.sleep(0.05)
        assert process.returncode == 0, command
        return [(by_step[max(by_step)], by_step[100 * iteration])]

    return bench(name, comparisons, measure, options)


def bench_ranks(name: str, options: argparse.Namespace) -> bool:
    """Two ranks beside one: steps per second of both together, and the shares of time/*; and two runs side by side that
    do not talk, which is as much as the machine has for two."""
    arguments, one, each_of_two, bar = RANKS[name]
    parts = ("act", "env", "train", "comm", "log")
    comparisons = [Comparison("steps/s", "two ranks", "one rank", "a / b", bar)]
    comparisons += [Comparison(f"share of time/{part}", "two ranks", "one rank", "a - b") for part in parts]
    comparisons += [Comparison("steps/s, side by side", "two runs that do not talk", "one rank", "a / b")]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        columns = []
        for case in (f"{each_of_two} --devices 2 --strategy ddp", one):
            folder = tempfile.mkdtemp(dir=log_dir)
            outcome = timed(ours(f"{arguments} --logger csv --seed {seed} {case}", folder, options))
            entries = logged(folder)
            shares = [statistics.mean(float(entry[f"time/{part}"]) for entry in entries) for part in parts]
            columns.append((outcome.sps, *shares))
        pair = [ours(f"{arguments} --seed {seed} {one}", tempfile.mkdtemp(dir=log_dir), options) for _ in range(2)]
        with ThreadPoolExecutor() as side_by_side:
            both = sum(outcome.sps for outcome in side_by_side.map(timed, pair))
        return [*zip(*columns, strict=True), (both, columns[1][0])]

    return bench(f"ranks-{name}", comparisons, measure, options)


def late_sps(arguments: str, seed: int, log_dir: str, options: argparse.Namespace) -> float:
    """Steps per second in the last half of a run: learning has started, everything is warm."""
    folder = tempfile.mkdtemp(dir=log_dir)
    run(ours(f"{arguments} --logger csv --seed {seed}", folder, options))
    entries = [(int(entry["step"]), float(entry["charts/SPS"])) for entry in logged(folder)]
    times = [(step, step / value) for step, value in entries]
    (first, *_), (*_, last) = times[len(times) // 2 :], times
    return (last[0] - first[0]) / (last[1] - first[1])


def bench_overlap(name: str, options: argparse.Namespace) -> bool:
    """A player and a trainer, an iteration apart, beside the coupled script on the same cores.

    Both with as many threads as make them faster.
    """
    script, arguments, threads, bar = OVERLAP[name]
    comparisons = [Comparison("steps/s", "decoupled", "coupled", "a / b", bar)]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        twin = script.replace(".py", "_decoupled.py")
        cases = (f"{twin} --devices 2 --max-lag 1", script)
        a, b = (
            max(late_sps(f"{case} --num-threads {count} {arguments}", seed, log_dir, options) for count in threads)
            for case in cases
        )
        return [(a, b)]

    return bench(f"overlap-{name}", comparisons, measure, options)


def bench_players(options: argparse.Namespace) -> bool:
    """Two players and a trainer beside one player and a trainer, on environments of 2 ms a step."""
    twin = PLAYERS.replace(".py", "_decoupled.py", 1) + " --max-lag 1 --num-threads 1"
    comparisons = [Comparison("steps/s", "two players, one trainer", "one player, one trainer", "a / b", ">= 1.7")]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        cases = ("--devices 3 --players 2", "--devices 2")
        a, b = (late_sps(f"{twin} {case}", seed, log_dir, options) for case in cases)
        return [(a, b)]

    return bench("players-sleeping", comparisons, measure, options)


def on_gpu(short: str, options: argparse.Namespace) -> str:
    """Flags of a run on a GPU; in a dry run on the CPU, with further ones that make it short."""
    return f"--accelerator cpu {short}" if options.dry else "--accelerator cuda"


def bench_gpu(name: str, options: argparse.Namespace) -> bool:
    """Steps per second on a GPU, and those of the sketch of the same update where there is one."""
    arguments, asked, sketch = GPU[name]
    command = f"{arguments} {on_gpu(SHORT[arguments.split()[0]], options)}"
    comparisons = [Comparison("steps/s", "fabricrl", "one step a second", "a / b", f">= {asked}")]
    if sketch:
        comparisons.append(Comparison("steps/s", "fabricrl", f"sketch {sketch}", "a / b", OF_SKETCH))

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        a = late_sps(command, seed, log_dir, options)
        return [(a, 1.0), *([(a, sketched(f"gpu_updates.py {sketch}", options))] if sketch else [])]

    return bench(f"gpu-{name}", comparisons, measure, options)


def sketched(command: str, options: argparse.Namespace) -> float:
    """Steps per second of a sketch, which needs a GPU: 1 in a dry run."""
    if options.dry:
        return 1.0
    output, _ = run([sys.executable, *f"benchmarks/sketches/{command}".split()])
    fields = re.search(r"^result .*: ([\d.]+) (M )?steps/s", output, re.MULTILINE)
    assert fields is not None, output
    return float(fields[1]) * (1e6 if fields[2] else 1)


def bench_messages(name: str, options: argparse.Namespace) -> bool:
    """Share of an iteration that is neither the player's work nor the trainer's, where they take turns; and its time,
    beside that of such messages alone."""
    script, arguments, steps, messages = MESSAGES[name]
    comparisons = [
        Comparison("share of an iteration", "communication", "all", "a / b", "<= 0.05"),
        Comparison("ms an iteration", "communication", "Gloo alone", "a / b"),
    ]

    def measure(seed: int, log_dir: str) -> list[tuple[float, float]]:
        twin = script.replace(".py", "_decoupled.py")
        case = f"{twin} --devices 2 --max-lag 0 --num-threads 1 --logger csv --seed {seed}"
        run(ours(f"{case} {arguments}", log_dir, options))
        entries = logged(log_dir)
        shares = [
            float(entry["time/comm"]) + float(entry["time/wait_player"]) - (1 - float(entry["time/wait_trainer"]))
            for entry in entries[len(entries) // 2 :]
        ]
        share, milliseconds = statistics.median(shares), 1e3 * steps / float(entries[-1]["charts/SPS"])
        output, _ = run([sys.executable, "benchmarks/turns.py", *messages.split()])
        fields = re.search(r"^result milliseconds=(\S+)", output, re.MULTILINE)
        assert fields is not None, output
        return [(share, 1.0), (share * milliseconds, float(fields[1]))]

    return bench(f"messages-{name}", comparisons, measure, options)


def bench(
    name: str,
    comparisons: list[Comparison],
    measure: Callable[[int, str], list[tuple[float, float]]],
    options: argparse.Namespace,
) -> bool:
    """Repeats a measurement of (A, B) for each comparison; prints and stores it. Whether every bar is reached.

    A dry run has no bars, and stores nothing that stays.
    """
    name = f"{name} {options.ours_args}".strip()
    if options.dry:
        comparisons = [comparison._replace(bar="") for comparison in comparisons]
    rows = []
    for repetition in range(1, options.repetitions + 1):
        with tempfile.TemporaryDirectory() as log_dir:
            pairs = measure(repetition, log_dir)
        for comparison, (a, b) in zip(comparisons, pairs, strict=True):
            compared = a / b if comparison.how == "a / b" else a - b
            row = {"benchmark": name, **comparison._asdict(), "repetition": str(repetition)}
            rows.append(row | {"a": number(a), "b": number(b), "compared": number(compared)})
        first = rows[-len(comparisons)]
        print(
            f"{name}, {repetition} of {options.repetitions}: {first['quantity']}, A {first['a']}, B {first['b']}, "
            f"{first['how']} = {first['compared']}",
            flush=True,
        )
    setup = {"command": options.command, "machine": options.machine}
    with tempfile.TemporaryDirectory() as folder:
        store([row | setup for row in rows], Path(folder) if options.dry else options.out)
    lines = summarize(rows)
    print("\n".join(lines), flush=True)
    return not any("MISSED" in line for line in lines)


def summarize(rows: list[dict[str, str]]) -> list[str]:
    """A line of a Markdown table for each quantity of each benchmark, beside each peer."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["benchmark"], row["quantity"], row["b_is"]), []).append(row)
    lines = []
    for (name, quantity, _), group in groups.items():
        a, b = (f"{group[0][side + '_is']}: {spread([float(row[side]) for row in group])}" for side in "ab")
        values = [float(row["compared"]) for row in group]
        verdict = ""
        if bar := group[0]["bar"]:
            sign, limit = bar.split()
            median = statistics.median(values)
            reached = median >= float(limit) if sign == ">=" else median <= float(limit)
            verdict = f"{bar}: {'reached' if reached else 'MISSED'}"
        lines.append(f"| {name} | {quantity} | {a} | {b} | {group[0]['how']} = {spread(values)} | {verdict} |")
    return lines


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spread(values: list[float]) -> str:
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def store(rows: list[dict[str, str]], folder: Path) -> None:
    """Replaces a benchmark's rows in speed.csv, and writes speed.md anew from all rows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "speed.csv"
    if path.exists():
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row["benchmark"] != rows[0]["benchmark"]] + rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = ["Medians over repetitions (minimum to maximum); every repetition is in [speed.csv](speed.csv).", ""]
    lines += ["| benchmark | quantity | A | B | compared, pair by pair | bar |", "|-|-|-|-|-|-|", *summarize(rows), ""]
    sources = {row["benchmark"]: f"- {row['benchmark']}: `{row['command']}`, on {row['machine']}" for row in rows}
    (folder / "speed.md").write_text("\n".join([*lines, *sources.values(), ""]))


def machine(gpu: bool = False) -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    cpu = found[1] if found else platform.processor() or platform.machine()
    if gpu:
        cpu += ", " + run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])[0].strip()
    return f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, torch {version('torch')}"


def repeat(options: argparse.Namespace) -> str:
    """The flags of a benchmark's command that say how it was run."""
    given = f"--repetitions {options.repetitions}"
    given += f" --ours-args={shlex.quote(options.ours_args)}" if options.ours_args else ""
    return given + (f" --total-timesteps {options.total_timesteps}" if options.total_timesteps else "")


def peer_versions(python: Path, names: tuple[str, ...]) -> str:
    code = f"from importlib.metadata import version\nprint(', '.join(f'{{n}} {{version(n)}}' for n in {names}))"
    return "; peer: " + run([str(python), "-c", code])[0].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", choices=[*TASKS, *UPDATE_TASKS], action="append", help="against a peer; can be repeated"
    )
    parser.add_argument("--before", metavar="REVISION", help="of git: tasks of PPO against ours as it was there")
    parser.add_argument("--sampling", action="store_true", help="instead of tasks: the replay buffer")
    parser.add_argument("--startup", action="store_true", help="instead of tasks: start-up")
    parser.add_argument("--memory", action="store_true", help="instead of tasks: memory (Linux)")
    parser.add_argument("--ranks", action="store_true", help="instead of tasks: two ranks beside one")
    parser.add_argument("--gpu", action="store_true", help="instead of tasks: a GPU, beside sketches of its limits")
    parser.add_argument(
        "--gpu-task", choices=GPU, action="append", default=[], help="one part of --gpu; can be repeated"
    )
    parser.add_argument("--dry", action="store_true", help=DRY_HELP)
    parser.add_argument("--decoupled", action="store_true", help="instead of tasks: a player and a trainer")
    parser.add_argument(
        "--decoupled-task",
        choices=[*OVERLAP, *(f"messages-{name}" for name in MESSAGES), "players"],
        action="append",
        default=[],
        help="one part of --decoupled; can be repeated",
    )
    parser.add_argument("--repetitions", type=int, default=5, help="pairs (default: 5)")
    parser.add_argument("--ours-args", default="", help="more flags for our script, such as --ours-args=--compile")
    parser.add_argument("--total-timesteps", type=int, help="instead of the benchmark's, for a quick look")
    parser.add_argument("--peer-python", default=".venv-peers/bin/python", help="default: .venv-peers/bin/python")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder of speed.csv and speed.md"
    )
    options = parser.parse_args()
    jobs: list[tuple[str, Callable[[argparse.Namespace], bool]]] = []
    jobs += [("--startup", bench_startup)] * options.startup
    jobs += [("--sampling", bench_sampling)] * options.sampling
    jobs += [("--memory", partial(bench_memory, name)) for name in MEMORY] * options.memory
    jobs += [("--ranks", partial(bench_ranks, name)) for name in RANKS] * options.ranks
    parts = [*GPU] if options.gpu else options.gpu_task
    jobs += [(f"--gpu-task {shlex.quote(name)}", partial(bench_gpu, name)) for name in parts]
    twins: dict[str, Callable[[argparse.Namespace], bool]] = {n: partial(bench_overlap, n) for n in OVERLAP}
    twins |= {f"messages-{name}": partial(bench_messages, name) for name in MESSAGES} | {"players": bench_players}
    chosen = [*twins] if options.decoupled else options.decoupled_task
    jobs += [(f"--decoupled-task {name}", twins[name]) for name in chosen]
    tasks = options.task or ([*TASKS, *UPDATE_TASKS] if not jobs else [])
    if options.before:
        tasks = options.task or [*TASKS]
        if others := UPDATE_TASKS.keys() & tasks:
            parser.error(f"--before takes tasks of PPO, not {', '.join(sorted(others))}")
        jobs += [(f"--task {name} --before {options.before}", partial(bench_before, name)) for name in tasks]
        tasks = []
    jobs += [(f"--task {name}", partial(bench_task if name in TASKS else bench_updates, name)) for name in tasks]
    options.machine = machine(bool(parts) and not options.dry)
    if tasks:
        python = ROOT / options.peer_python
        if not python.exists():
            parser.error(f"{options.peer_python} is not there; benchmarks/requirements-peers.txt says how to make it")
        jax = ("sbx-rl", "jax") if UPDATE_TASKS.keys() & tasks else ()
        options.machine += peer_versions(python, ("stable-baselines3", "sb3-contrib", "torch", *jax))
    reached = []
    for flag, job in jobs:
        options.command = f"python benchmarks/speed.py {flag} {repeat(options)}"
        reached.append(job(options))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
