"""Cost of an iteration on W ranks, coupled and decoupled: processor time, messages, bytes, and where the time goes.

    python benchmarks/scale.py                        → benchmarks/results/scale.md
    python benchmarks/scale.py --ranks 1 2 --tasks ppo --repeats 1

Ranks may be more than cores: then processor time, bytes and messages count, not wall time. With the right to make
network namespaces, two of them stand for two nodes, with the bandwidth and delay that `tc` gives the link between them;
they are gone afterwards. What this machine does not allow is left out, with a message.

What has been measured is kept in scale.json beside the report and not run again, so that an interrupted benchmark goes
on where it was; `--fresh` starts over. Exit code 1: a prediction is further than 20 % from what was measured.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import math
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/scale.md"
COMMON = ["--num-threads", "1", "--no-save-model", "--logger", "csv", "--vectorization", "sync", "--timeout", "2"]
# Steps of an iteration of all ranks stay as they are: W ranks have a W-th of the environments or of the batch each
PPO = ["--env-id", "CartPole-v1", "--num-steps", "128", "--num-minibatches", "4", "--update-epochs", "4"]
SAC = ["--env-id", "Pendulum-v1", "--learning-starts", "256", "--buffer-size", "10000", "--replay-ratio", "0.125"]
TASKS: dict[str, list[str]] = {"ppo": PPO, "sac": SAC}
ENVS = {"ppo": 8, "sac": 16}  # of all ranks, as their batch
BATCH = 256
WARM_UP = {"ppo": 3, "sac": 16}  # iterations that are not counted: of SAC those without updates, and some more
COUNTED = {"ppo": 12, "sac": 60}
CLONE_NEWNET = 0x40000000
LINKS = [("10gbit", 0.0), ("1gbit", 0.0), ("100mbit", 0.0), ("10gbit", 0.1), ("10gbit", 1.0), ("10gbit", 10.0)]
BURST = 5e-4  # seconds: a link that has rested passes on at once what it would take these for
PEERS = [8, 64, 512]  # trainers of the table on paper
TOLERANCE, MISSED = 0.2, " (beyond 20 %)"  # of a prediction
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
FIELDS = ("wall", "cpu", "compute", "wait", "calls", "messages", "bytes", "records", "record_bytes", "weights")
# Bytes of a row that a trainer cannot do without. PPO: 4 numbers seen, an action, its log-probability, value, advantage
# and return. SAC: 3 numbers seen, an action, a reward, and if the episode has ended, and how
ROW = {"ppo": 4 * 4 + 8 + 4 * 4, "sac": 3 * 4 + 4 + 4 + 2}
ROWS = {"ppo": 128 * ENVS["ppo"], "sac": ENVS["sac"]}  # of an iteration, all environments
FORKSERVER = multiprocessing.get_context("forkserver")  # ranks import nothing: that takes longer than they run
FORKSERVER.set_forkserver_preload([f"fabricrl.algos.{task}.{task}_decoupled" for task in TASKS])


# --- In a rank: counts what it sends, and how long it waits


class Meter:
    """Counts of a rank: seconds by the clock and of the processor, in messages and outside; messages and bytes sent.

    Of these, what players and trainers send to each other is counted again, as `records`, and of the bytes the weights.
    """

    def __init__(self) -> None:
        names = ("wait", "inside", "calls", "messages", "bytes", "records", "record_bytes", "weights")
        self.totals = dict.fromkeys(names, 0.0)
        self.marks: list[dict[str, float]] = []
        self._within = False  # what one message calls is part of it

    def counted(self, function: Callable[..., Any], sent: Callable[..., tuple[int, float]]) -> Callable[..., Any]:
        """The function, with its time counted as that of messages; `sent` says how many it sends, and their bytes."""

        def call(*given: Any, **more: Any) -> Any:
            if self._within:
                return function(*given, **more)
            started, thread, self._within = time.perf_counter(), time.thread_time(), True
            try:
                return function(*given, **more)
            finally:
                self._within = False
                self.totals["wait"] += time.perf_counter() - started
                self.totals["inside"] += time.thread_time() - thread
                messages, size = sent(*given, **more)
                self.totals["calls"] += messages > 0
                self.totals["messages"] += messages
                self.totals["bytes"] += size

        return call

    def record(self, packet: Any) -> tuple[int, float]:
        """Counts a record that is sent from one end to the other."""
        self.totals["records"] += 1
        self.totals["record_bytes"] += packet.message.nbytes
        self.totals["weights"] += packet.tensors[-1].nbytes if packet.name == "Answer" else 0
        return 1, packet.message.nbytes

    def mark(self) -> None:
        """Notes where the counts stand, once an iteration."""
        compute = time.thread_time() - self.totals["inside"]
        self.marks.append(self.totals | {"wall": time.perf_counter(), "cpu": time.process_time(), "compute": compute})

    def each(self, generator: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The generator, with a mark before each of its values."""

        def marked(*given: Any, **more: Any) -> Iterator[Any]:
            for value in generator(*given, **more):
                self.mark()
                yield value

        return marked

    def of_an_iteration(self, warm_up: int) -> dict[str, float]:
        """Means over the iterations after the first ones."""
        first, last = self.marks[min(warm_up, len(self.marks) - 2)], self.marks[-1]
        count = len(self.marks) - 1 - min(warm_up, len(self.marks) - 2)
        return {name: (last[name] - first[name]) / count for name in FIELDS}


def fork_rank(variables: dict[str, str], output: Path, place: str | None, *rank: Any) -> None:
    """Becomes a rank, in a process that has been forked, with these variables, its output in this file.

    `place`: the network namespace in which it is; None: the machine's own.
    """
    os.chdir(ROOT)
    if place is not None:
        descriptor = os.open(f"/run/netns/{place}", os.O_RDONLY)
        if ctypes.CDLL(None).setns(descriptor, CLONE_NEWNET):
            sys.exit(f"error: cannot enter {place}")
    os.environ |= variables
    with output.open("w") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    run_rank(*rank)


def run_rank(path: str, warm_up: int, module: str, flags: list[str]) -> None:
    """Runs a script as one of its ranks, and writes what an iteration has cost it."""
    from fabricrl.algos.decoupled import Player
    from fabricrl.algos.run import Run
    from fabricrl.utils import ranks
    from fabricrl.utils.decoupled import Channel
    from fabricrl.utils.errors import RunError

    meter, world_size = Meter(), int(os.environ["WORLD_SIZE"])

    def sent(collective: Any, first: Any, *others: Any, **_: Any) -> tuple[int, float]:
        if collective is ranks.gather:  # into the first, of what comes second
            return len(first) // max(len(others[0]), 1) - 1, first.nbytes - others[0].nbytes
        return 2 * (world_size - 1), 2 * (world_size - 1) / world_size * first.nbytes  # around a ring, part by part

    ranks.finish = meter.counted(ranks.finish, sent)
    Channel.send = meter.counted(Channel.send, lambda channel, packet, *_: meter.record(packet))  # type: ignore[method-assign]
    Channel.receive = meter.counted(Channel.receive, lambda *_: (0, 0))  # type: ignore[method-assign]
    Run.iterations = meter.each(Run.iterations)  # type: ignore[method-assign]
    Player.orders = meter.each(Player.orders)  # type: ignore[method-assign]
    sys.argv = [module, *flags]
    try:
        code = importlib.import_module(module).main()
    except RunError as error:
        sys.exit(f"error: {error}")
    Path(path).write_text(json.dumps(meter.of_an_iteration(warm_up)))
    sys.exit(code)


# --- Runs


def flags_of(task: str, ranks: int, players: int) -> list[str]:
    """The command line of a run on so many ranks, of which some play; 0 players: the coupled script."""
    per_rank = ENVS[task] if players else ENVS[task] // ranks
    steps = (WARM_UP[task] + COUNTED[task] + 1) * ENVS[task] * (128 if task == "ppo" else 1) + 256 * (task == "sac")
    flags = [*TASKS[task], *COMMON, "--num-envs", str(per_rank), "--total-timesteps", str(steps)]
    if task == "sac":
        flags += ["--batch-size", str(BATCH if players else BATCH // ranks)]
    return flags + (["--players", str(players)] if players else [])


def measure(task: str, ranks: int, players: int = 0, places: list[str] | None = None) -> list[dict[str, float]]:
    """The cost of an iteration to each rank.

    Args:
        places: the network namespace of each rank; None: all are on this machine, as they are.
    """
    module = f"fabricrl.algos.{task}.{task}" + "_decoupled" * (players > 0)
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags_of(task, ranks, players), "--log-dir", folder]
        warm_up = WARM_UP[task] + (256 // ENVS[task] if task == "sac" else 0)
        nodes = 1 if places is None else len(set(places))
        variables = {"MASTER_ADDR": "127.0.0.1" if places is None else ADDRESSES[0], "MASTER_PORT": str(free_port())}
        variables |= {"TORCHELASTIC_RUN_ID": "scale", "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        variables |= {"LOCAL_WORLD_SIZE": str(ranks // nodes), "PYTHONPATH": str(ROOT)}
        started = []
        texts = [Path(folder, f"{rank}.txt") for rank in range(ranks)]
        try:
            for rank in range(ranks):
                own = {"RANK": rank, "LOCAL_RANK": rank % (ranks // nodes), "GROUP_RANK": rank * nodes // ranks}
                environment = variables | {name: str(number) for name, number in own.items()}
                place = None if places is None else places[rank]
                given = (environment, texts[rank], place, f"{folder}/{rank}.json", warm_up, module, flags)
                started.append(FORKSERVER.Process(target=fork_rank, args=given))
                started[-1].start()
            for process in started:
                process.join(900)
        finally:
            for process in started:
                process.kill()
                process.join()
        codes = [process.exitcode for process in started]
        if any(code != 0 for code in codes):
            told = "\n".join(text.read_text() for text in texts)
            raise SystemExit(f"ranks of {module} ended with {codes}:\n{told}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Cells:
    """Costs that have been measured, kept in a file: those of each rank, for each run of each cell."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.kept: dict[str, Any] = {} if fresh or not path.exists() else json.loads(path.read_text())

    def has(self, repeats: int, task: str, ranks: int, link: str) -> bool:
        """Tells if so many runs of a coupled cell are there already."""
        return len(self.kept.get(f"{task}, {ranks} ranks, 0 players{link}", [])) >= repeats

    def measured(self, repeats: int, task: str, ranks: int, players: int = 0, link: str = "", **place: Any) -> Any:
        """The median of each figure of each rank over so many runs, of which those that are missing are made."""
        runs = self.kept.setdefault(f"{task}, {ranks} ranks, {players} players{link}", [])
        while len(runs) < repeats:
            runs.append(measure(task, ranks, players, **place))
            self.path.write_text(json.dumps(self.kept, indent=1) + "\n")
        return median_of(runs[:repeats])


def median_of(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The median of each figure of each rank over repeated runs."""
    return [
        {name: statistics.median(run[rank][name] for run in runs) for name in FIELDS} for rank in range(len(runs[0]))
    ]


# --- Two nodes


ADDRESSES = ["10.203.7.1", "10.203.7.2"]
NODES = [f"fabricrl-{os.getpid()}-{number}" for number in (1, 2)]


def call(*words: str) -> None:
    """Calls a command. Raises OSError with what it says if it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def two_nodes(rate: str, delay: float) -> Iterator[list[str]]:
    """Two network namespaces with a link of this rate and delay (milliseconds) between them.

    Raises:
        OSError: this machine does not allow it, or has no such queue.
    """
    try:
        for name in NODES:
            call("ip", "netns", "add", name)
        call("ip", "link", "add", "eth0", "netns", NODES[0], "type", "veth", "peer", "name", "eth0", "netns", NODES[1])
        for name, address in zip(NODES, ADDRESSES, strict=True):
            inside = ["ip", "netns", "exec", name]
            call(*inside, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                call(*inside, "ip", "link", "set", link, "up")
            queue = ["tbf", "rate", rate, "burst", f"{bits(rate) / 8 * BURST:.0f}", "latency", "400ms"]
            if delay:
                queue = ["netem", "delay", f"{delay}ms", "rate", rate]
            call(*inside, "tc", "qdisc", "add", "dev", "eth0", "root", *queue)
        yield NODES
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def bits(rate: str) -> float:
    """Bits per second of a rate as `tc` has it."""
    units = {"gbit": 1e9, "mbit": 1e6}
    return next(float(rate.removesuffix(unit)) * size for unit, size in units.items() if rate.endswith(unit))


# --- The model


Costs = dict[str, dict[int, dict[str, float]]]  # by kind of rank ("ppo", "ppo, player"), and how many of it there are


def predicted(kind: str, ranks: int, costs: Costs) -> float:
    """Processor time of a rank: what it computes at this share of the work, and what its messages cost.

    Computing is a + b / W: an update's fixed cost, and that of its rows, as fewer ranks have had it. A kind's
    collectives and records cost c each, and a message to one other rank m, whatever the kind: these are fitted to all
    cells but the kind's own with as many ranks or more.
    """
    import numpy as np

    def fit(rows: list[list[float]], costs: list[float]) -> Any:
        found, _, rank, _ = np.linalg.lstsq(np.array(rows), np.array(costs), rcond=None)
        return found if rank == len(found) else np.full(len(found), math.nan)  # too few cells

    below = {count: cost for count, cost in costs[kind].items() if count < ranks}
    if len(below) < 2:
        return math.nan
    fixed, rows = fit([[1.0, 1 / count] for count in below], [cost["compute"] for cost in below.values()])
    known = [
        (name, cost)
        for name, cells in costs.items()
        for count, cost in cells.items()
        if count > 1 and not (name == kind and count >= ranks)
    ]
    kinds = list(dict.fromkeys(name for name, _ in known))
    calls = [[cost["calls"] * (name == other) for other in kinds] + [cost["messages"]] for name, cost in known]
    *each, message = fit(calls, [cost["cpu"] - cost["compute"] for _, cost in known])
    call = dict(zip(kinds, each, strict=True)).get(kind, math.nan)
    own = costs[kind][ranks]
    return float(fixed + rows / ranks + call * own["calls"] + message * own["messages"])


def iteration(seconds: dict[str, float], count: int, cores: int) -> float:
    """Seconds that an iteration takes by the clock: those of the rank with the most work, or of all on these cores.

    Args:
        seconds: processor time of a rank of each kind, of which there are `count`.
    """
    return max(*seconds.values(), count * sum(seconds.values()) / cores)


def on_paper(task: str, costs: Costs, rate: float, delay: float) -> list[str]:
    """Rows for more trainers than there are, each with the work of one: as many sums as two trainers have.

    Each is a sum in 2 log2 W rounds, in which about twice the vector's bytes leave a rank. Orders and Answers travel
    while trainers compute; those to several players leave the first trainer one after the other.
    """
    one, two = costs[f"{task}, trainer"][1], costs[f"{task}, trainer"][2]
    sums, messages = two["calls"] - two["records"], two["messages"] - two["records"]
    size, handling = (two["bytes"] - two["record_bytes"]) / messages, (two["cpu"] - two["compute"]) / two["calls"]
    lines = []
    for trainers in PEERS:
        players = trainers // PEERS[0]
        waiting = sums * (2 * math.log2(trainers) * delay + handling + 2 * size * 8 / rate)
        answers = players * one["record_bytes"] * 8 / rate
        share = one["compute"] / (one["compute"] + waiting)
        cells = f"{1e3 * one['compute']:.1f} | {1e3 * waiting:.1f} | {share:.0%} | {1e3 * answers:.2f}"
        lines.append(f"| {task} | {players} + {trainers} | {cells} |")
    return lines


# --- The report


def row(task: str, kind: str, who: str, cost: dict[str, float]) -> str:
    cells = [1e3 * cost[name] for name in ("cpu", "compute", "wait", "wall")]
    numbers = " | ".join(f"{cell:.2f}" for cell in cells)
    sent = f"{cost['calls']:.1f} | {cost['messages']:.1f} | {cost['bytes'] / 1e3:.1f}"
    return f"| {task} | {kind} | {who} | {numbers} | {sent} |"


def travels(task: str, players: int, trainers: int, who: str, cost: dict[str, float]) -> str:
    """A row of what one end sends to each of the other, beside the bytes that it cannot do without."""
    plays = who == "player"
    peers = trainers if plays else players
    needed = ROWS[task] * ROW[task] / (players * trainers) if plays else cost["weights"] / peers
    sent, count = cost["record_bytes"] / peers, cost["records"] / peers
    cells = f"{count:.2f} | {sent:.0f} | {needed:.0f} | {sent / needed:.2f} | {sent - needed:.0f}"
    return f"| {task} | {players} + {trainers} | {who} | {cells} |"


def on_this_machine(
    cells: Cells, tasks: list[str], ranks: list[int], repeats: int
) -> tuple[list[str], list[str], Costs]:
    """Tables of what an iteration costs and of what travels, and the costs by kind of rank and their number."""
    between = ["| task | players + trainers | from a | messages to each | bytes | needed | ratio | more |"]
    between += ["|-|-|-|-|-|-|-|-|"]
    lines = [
        "| task | script | rank | processor ms | computing ms | in messages ms | wall ms | calls | messages | kB |"
    ]
    lines += ["|-|-|-|-|-|-|-|-|-|-|"]
    costs: Costs = {kind: {} for task in tasks for kind in (task, f"{task}, player", f"{task}, trainer")}
    for task in tasks:
        for count in ranks:
            found = cells.measured(repeats, task, count)
            costs[task][count] = {name: statistics.mean(rank[name] for rank in found) for name in FIELDS}
            lines.append(row(task, f"coupled, {count}", "each", costs[task][count]))
            print(lines[-1], flush=True)
        for count in (count for count in ranks if count > 1):
            players = count // 2
            found = cells.measured(repeats, task, count, players)
            for who, rank in (("player", 0), ("first trainer", players)):
                costs[f"{task}, {who.split()[-1]}"][players] = found[rank]
                lines.append(row(task, f"decoupled, {players} + {players}", who, found[rank]))
                between.append(travels(task, players, players, who, found[rank]))
                print(lines[-1], between[-1], sep="\n", flush=True)
    return lines, between, costs


def compared(guess: float, measured: float) -> str:
    """Cells of a table: a prediction beside what was measured, in milliseconds, and their ratio."""
    verdict = "" if abs(guess / measured - 1) <= TOLERANCE else MISSED
    return f"{1e3 * guess:.2f} | {1e3 * measured:.2f} | {guess / measured:.2f}{verdict}"


def check_model(costs: Costs, cores: int) -> tuple[list[str], list[str]]:
    """Tables of predictions: processor time of each kind of rank, and an iteration by the clock, on so many cores.

    The second goes from predicted processor times; where there are too few cells for these, from those measured.
    """
    times = ["| rank | how many | predicted ms | measured ms | ratio |", "|-|-|-|-|-|"]
    clock = ["| task | script | predicted ms | measured ms | ratio |", "|-|-|-|-|-|"]
    seconds: Costs = {kind: {} for kind in costs}  # type: ignore[assignment]
    for kind, cells in costs.items():
        for count in sorted(cells):
            guess = predicted(kind, count, costs)
            if not math.isnan(guess):
                times.append(f"| {kind} | {count} | {compared(guess, cells[count]['cpu'])} |")
            seconds[kind][count] = cells[count]["cpu"] if math.isnan(guess) else guess
    for task in (kind for kind in costs if "," not in kind):
        twins = {"coupled, {0}": [task], "decoupled, {0} + {0}": [f"{task}, player", f"{task}, trainer"]}
        for script, kinds in twins.items():
            for count in costs[kinds[0]]:
                guess = iteration({kind: seconds[kind][count] for kind in kinds}, count, cores)
                wall = statistics.mean(costs[kind][count]["wall"] for kind in kinds)
                clock.append(f"| {task} | {script.format(count)} | {compared(guess, wall)} |")
    return times, clock


def between_nodes(cells: Cells, tasks: list[str], repeats: int) -> list[str]:
    """Two coupled ranks on two nodes: measured, and as the bytes and the delay of their messages predict it.

    An iteration takes what it does on the fastest link, and its messages. Both ends send at once, and acknowledge what
    comes, so that neither has all of a link: the share that they get is that of the first task on the slowest link.
    """
    found: dict[tuple[str, str, float], dict[str, float]] = {}
    for rate, delay in LINKS:
        name, nodes = f", {rate}, {delay:g} ms", []
        with contextlib.ExitStack() as link:
            if not all(cells.has(repeats, task, 2, name) for task in tasks):
                try:
                    nodes = link.enter_context(two_nodes(rate, delay))
                except OSError as error:
                    print(f"left out: two nodes at {rate} with {delay:g} ms: {error}", flush=True)
                    continue
            for task in tasks:
                found[task, rate, delay] = cells.measured(repeats, task, 2, link=name, places=nodes)[0]
                print(f"{task}{name}: {1e3 * found[task, rate, delay]['wall']:.1f} ms", flush=True)
    first = tasks[0]
    slowest = min((rate for _, rate, delay in found if delay == 0), key=bits, default="")
    if (first, *LINKS[0]) not in found or slowest == LINKS[0][0]:
        return ["None: this machine does not allow the fastest link and a slower one."]
    base = {task: found[task, *LINKS[0]]["wall"] for task in tasks}
    cell = found[first, slowest, 0.0]
    share = cell["bytes"] * 8 / bits(slowest) / (cell["wall"] - base[first])
    lines = ["| task | link | delay ms | predicted ms | measured ms | ratio |", "|-|-|-|-|-|-|"]
    for (task, rate, delay), cost in found.items():
        guess = base[task] + cost["bytes"] * 8 / bits(rate) / share + cost["messages"] * delay / 1e3
        told = compared(guess, cost["wall"]) + " (fitted)" * (cost is cell)
        lines.append(f"| {task} | {rate} | {delay:g} | {told} |")
    return [*lines, "", f"Of a link messages get {share:.0%}."]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no network namespace behind
    cells = Cells(args.out.with_suffix(".json"), args.fresh)
    table, between, costs = on_this_machine(cells, args.tasks, args.ranks, args.repeats)
    times, clock = check_model(costs, CORES)
    parts = ["# An iteration on W ranks", f"`python benchmarks/scale.py --repeats {args.repeats}`", "\n".join(table)]
    parts += ["## Between players and trainers, an iteration", "\n".join(between)]
    parts += ["## The model against what was measured", "Processor time of a rank:", "\n".join(times)]
    parts += [f"An iteration by the clock, on {CORES} cores:", "\n".join(clock)]
    parts += ["## Two nodes", "\n".join(between_nodes(cells, args.tasks, args.repeats))]
    head = ["| task | players + trainers | computing ms | sums ms | computing, of all | answers ms |", "|-|-|-|-|-|-|"]
    made = (task for task in args.tasks if {1, 2} <= set(costs[f"{task}, trainer"]))
    rows = [line for task in made for line in on_paper(task, costs, 10e9, 1e-4)]
    parts += ["## More trainers, on paper: 10 Gbit, 0.1 ms", "\n".join(head + rows)]
    text = "\n\n".join(parts) + "\n"
    args.out.write_text(text)
    missed = [line for line in text.splitlines() if MISSED in line]
    print(*missed, sep="\n", end="\n" if missed else "")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
