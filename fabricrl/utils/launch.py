"""Starting a script: Fabric under every launcher, and ranks that meet."""

import contextlib
import os
import random
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import CUDAAccelerator
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed import TCPStore

from fabricrl.utils.choices import ALLOWED, check_choice
from fabricrl.utils.ending import is_of_peers, one_line, reason
from fabricrl.utils.errors import ConfigError, LostPeerError, RunError, require
from fabricrl.utils.model import parameter_hash
from fabricrl.utils.network import LOOPBACK, check_address, find_store, is_loopback, open_store, prepare_network
from fabricrl.utils.peers import STARTED_BY, Peers, patience, waited
from fabricrl.utils.precision import HalfPrecision
from fabricrl.utils.process import (
    PLACE,
    STORE_IS_KEPT,
    available_cores,
    check_launcher,
    cores_of_others,
    environ_number,
    follow_launcher,
    keep_memory,
    need,
    own_rank,
    under_srun,
)
from fabricrl.utils.ranks import all_gather

ATTEMPT = "fabricrl/attempt"  # under which the store of an attempt is known
ONE_TRY = 2.0  # seconds


def launch(args: Any) -> Fabric:
    """Builds Fabric from the launcher's environment and the arguments that the user set, and starts all ranks.

    `fabric run` and `lightning run model` hand their choices over in LT_* variables, torchrun in its own; both have
    started the processes already. Otherwise Fabric starts them: one for each of `--devices`, on each node.

    Raises:
        ConfigError: devices that do not exist, a port in use, a choice made twice, variables that make no sense.
        LostPeerError: another rank, or the launcher, has ended before all had met.
    """
    check_launcher()
    follow_launcher()
    keep_memory()
    asked = _options(args)
    half = _half_precision_device(asked)
    with _explaining(asked):
        options, device = _placed(args, asked)
        if half is not None:
            options["plugins"] = [HalfPrecision(device or half)]
        elif device is not None and _choice("precision", asked) in ("bf16-mixed", "bf16"):
            options["plugins"] = [MixedPrecision("bf16-mixed", device)]
        if "plugins" in options:
            options.pop("precision", os.environ.pop("LT_PRECISION", None))  # it is given once
        # Buffers are statistics that ranks agree on themselves; DDP would broadcast them inside a compiled update
        strategy = DDPStrategy(timeout=patience(args.timeout), broadcast_buffers=False)
        if "LT_CLI_USED" in os.environ:  # its constructor has the ranks meet, and it forbids `launch`
            if several := _prepare_meeting(args.timeout):
                os.environ.pop("LT_STRATEGY", None)  # a strategy is given once
            fabric = Fabric(**options | ({"strategy": strategy} if several else {}))
        else:
            fabric = Fabric(**options)
            if isinstance(fabric.strategy, DDPStrategy):
                fabric = Fabric(**options | {"strategy": strategy})
                _meet(strategy, args.timeout)
            fabric.launch()
    if half is not None and device is None:
        fabric.strategy.precision.scaler.to(fabric.device)  # type: ignore[attr-defined]
    PLACE.rank = fabric.global_rank
    if PLACE.peers is not None:
        PLACE.peers.look()
    torch.set_num_threads(_threads(args, fabric))  # after launch(): launchers set it too, and wrongly
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.manual_seed(args.seed)  # the same on every rank: parameters start equal
    random.seed(args.seed + fabric.global_rank)  # this and the next for environments that draw from global generators
    np.random.seed(args.seed + fabric.global_rank)
    return fabric


def _options(args: Any) -> dict[str, Any]:
    """Arguments for Fabric's constructor: the user's choices, and the launcher's.

    Raises:
        ConfigError: a choice made twice, or that these scripts do not offer.
    """
    names = ("accelerator", "strategy", "devices", "num_nodes", "precision")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.cuda:
        options.setdefault("accelerator", "cuda")
    if "LT_CLI_USED" in os.environ:
        _refuse(options, [name for name in options if f"LT_{name.upper()}" in os.environ])
        need("LT_CLI_USED", "TORCHELASTIC_RUN_ID")
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        _refuse(options, [name for name in options if name in ("devices", "num_nodes")])
        local_world = int(os.environ["LOCAL_WORLD_SIZE"])
        options |= {"devices": local_world, "num_nodes": int(os.environ["WORLD_SIZE"]) // local_world}
    else:
        options.setdefault("devices", "1")
        _set_nodes(args)
    if "LT_ACCELERATOR" not in os.environ:
        options.setdefault("accelerator", "cpu")  # small networks train slower on a GPU
    for name in ALLOWED:
        check_choice(name, _choice(name, options))  # launchers offer more than these scripts do
    return options


def _choice(name: str, options: dict[str, Any]) -> str | None:
    """The choice of the user or the launcher."""
    return options.get(name, os.environ.get(f"LT_{name.upper()}"))


def _half_precision_device(options: dict[str, Any]) -> str | None:
    """The kind of device that trains in 16-bit floats, if one is to.

    Raises:
        ConfigError: it is none that does.
    """
    if _choice("precision", options) not in ("16-mixed", "16"):
        return None
    accelerator = _choice("accelerator", options)
    there = accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
    allowed = "bf16-mixed or 32-true without --accelerator cuda: 16-bit floats are for GPUs"
    require(there, "precision", "16-mixed", allowed)
    return "cuda"


def _placed(args: Any, options: dict[str, Any]) -> tuple[dict[str, Any], Literal["cpu", "cuda"] | None]:
    """Options with which ranks meet on the CPU, and the kind of this one's device, if players act beside GPUs.

    So they do in a decoupled script with `--player-device cpu`, whose trainers own the GPUs; each notes its own in
    PLACE. `--devices` are the GPUs: each gets a trainer, and players come on top. With torchrun, or several nodes, it
    is the processes of a node. In all other cases the options are as they were, and the kind is None.

    Raises:
        ValueError, MisconfigurationException: GPUs that are not there.
    """
    on_gpus = _choice("accelerator", options) in ("cuda", "gpu", "auto") and CUDAAccelerator.is_available()
    if not on_gpus or not hasattr(args, "players") or args.player_device != "cpu":
        return dict(options), None
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    alone = not elastic and args.num_nodes in (None, 1)
    gpus: list[int] = []
    if elastic:
        node, processes = environ_number("GROUP_RANK") or 0, int(os.environ["LOCAL_WORLD_SIZE"])
    else:
        node = (environ_number("SLURM_NODEID") or 0) if under_srun() else args.node_rank
        gpus = CUDAAccelerator.parse_devices("-1" if options["devices"] == "auto" else options["devices"]) or []
        processes = len(gpus) + (args.players if alone else 0)
    players = min(max(args.players - node * processes, 0), processes)  # of this node
    if elastic and players < processes:
        gpus = CUDAAccelerator.parse_devices(list(range(processes - players))) or []
    local_rank = environ_number("SLURM_LOCALID" if under_srun() else "LOCAL_RANK") or 0
    if local_rank >= players:
        PLACE.gpu = gpus[local_rank - players]
        torch.cuda.set_device(PLACE.gpu)
    for name in ("accelerator", "devices"):
        os.environ.pop(f"LT_{name.upper()}", None)
    return options | {"accelerator": "cpu", "devices": str(processes)}, "cpu" if PLACE.gpu is None else "cuda"


def _refuse(options: dict[str, Any], names: list[str]) -> None:
    if names:
        flag = f"--{names[0].replace('_', '-')}"
        raise ConfigError(
            f"{flag} {options[names[0]]} is given to the script, but the launcher has already set it: give it only once"
        )


def _set_nodes(args: Any) -> None:
    """Tells Fabric's launcher where this node stands among several."""
    if args.num_nodes is None or args.num_nodes == 1 or under_srun():
        return
    os.environ["NODE_RANK"] = str(args.node_rank)
    os.environ["MASTER_ADDR"] = args.main_address
    os.environ["MASTER_PORT"] = str(args.main_port)
    check_address(args.main_address, "--main-address")


def _prepare_meeting(minutes: float) -> bool:
    """Prepares how ranks meet that `fabric run` has started; tells if there are several."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    prepare_network(address, world_size == int(os.environ["LOCAL_WORLD_SIZE"]))
    if world_size > 1:
        PLACE.peers = Peers(address, port, rank, world_size, minutes, keeps_store=False)
    return world_size > 1


def _meet(strategy: DDPStrategy, minutes: float) -> None:
    """Prepares how the ranks find each other: the first of all listens for them, before it starts any other.

    Raises:
        ConfigError: the port is in use, the address is not this machine's, or variables for PyTorch make no sense.
        LostPeerError: nobody listens.
    """
    ranks, one_node = strategy.cluster_environment, strategy.num_nodes == 1
    assert ranks is not None
    launched = STARTED_BY in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    kept = launched and os.environ.get(STORE_IS_KEPT) == "True"
    if not kept:
        _open_store(ranks, one_node)
    elif STARTED_BY not in os.environ:
        _open_store_of_attempt(ranks, one_node, patience(minutes).total_seconds())
    if isinstance(ranks, LightningEnvironment) and not ranks.creates_processes_externally:
        os.environ[STARTED_BY] = str(os.getpid())
    prepare_network(ranks.main_address, one_node)
    if (world_size := strategy.num_nodes * strategy.num_processes) > 1:
        here = isinstance(ranks, LightningEnvironment)  # it knows the number among all only when it has launched
        rank = ranks.node_rank() * strategy.num_processes + ranks.local_rank() if here else ranks.global_rank()
        PLACE.peers = Peers(ranks.main_address, ranks.main_port, rank, world_size, minutes)


def _open_store(ranks: ClusterEnvironment, one_node: bool) -> None:
    """Opens the store in which the ranks note where they are, if this is the first; all others are to look for it."""
    named, port = "MASTER_PORT", 0  # 0: any that is free
    if not isinstance(ranks, LightningEnvironment):
        first, port = ranks.global_rank() == 0, ranks.main_port
    else:
        if one_node:
            os.environ["NODE_RANK"] = "0"
        first = ranks.node_rank() == ranks.local_rank() == 0
        given = [name for name in ("MASTER_PORT", "STANDALONE_PORT") if name in os.environ]
        if given:
            named, number = "--main-port" if not one_node else given[0], environ_number(given[0])
            if number is None or number >= 2**16:
                raise ConfigError(f"{named} is {os.environ[given[0]]!r}: it must be a port, from 0 to 65535")
            port = number
    address = LOOPBACK if one_node else ranks.main_address
    if isinstance(ranks, SLURMEnvironment) and not one_node:
        check_address(address, "MASTER_ADDR")
    if first:
        PLACE.store = open_store(address, port, named)
        port = PLACE.store.port
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), STORE_IS_KEPT: "True"}


def _open_store_of_attempt(ranks: ClusterEnvironment, one_node: bool, seconds: float) -> None:
    """Opens a store for this attempt of torchrun's alone, of which its agent's store tells the ranks.

    The agent keeps its store from restart to restart, and there PyTorch finds the addresses of ranks that have died
    (pytorch#135712), also where TORCHELASTIC_RESTART_COUNT is what it was, as after a node has joined.

    Raises:
        LostPeerError: rank 0 does not open one in this time.
    """
    rank, address = ranks.global_rank(), LOOPBACK if one_node else ranks.main_address
    agents = find_store(ranks.main_address, ranks.main_port, seconds)
    if rank == 0:
        everywhere = not one_node and is_loopback(address)  # some machines' names stand for it
        PLACE.store = open_store("0.0.0.0" if everywhere else address, 0, "MASTER_PORT")
        port, token = PLACE.store.port, secrets.token_hex(8)
        PLACE.store.set(ATTEMPT, token)
        agents.set(ATTEMPT, f"{port} {token}")
    else:
        port = _store_of_attempt(agents, address, seconds)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _store_of_attempt(agents: TCPStore, address: str, seconds: float) -> int:
    """The port of the store that rank 0 has opened; what an earlier rank 0 has left is gone with it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, RuntimeError):  # not there yet, or no longer
            if agents.check([ATTEMPT]):
                port, token = agents.get(ATTEMPT).decode().split()
                if find_store(address, int(port), ONE_TRY).get(ATTEMPT).decode() == token:
                    return int(port)
        time.sleep(0.05)
    raise LostPeerError(
        f"rank {own_rank()} could not reach the others at {address}: no answer {waited(seconds)}; rank 0 never arrived"
    )


@contextmanager
def _explaining(options: dict[str, Any]) -> Iterator[None]:
    """Makes an error of ours of what Fabric and PyTorch raise until all ranks have met."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        if is_of_peers(error):
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise LostPeerError(f"rank {own_rank()} could not reach the others at {place}: {reason(error)}") from error
        given = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
        wants_gpu = options.get("accelerator") in ("cuda", "gpu") and not torch.cuda.is_available()
        cause = _no_gpu() if wants_gpu else one_line(error)
        raise ConfigError(f"{given} is not available here: {cause}") from error


def _no_gpu() -> str:
    """The reason why there is no GPU, and what to do about it."""
    instead = "or train with --accelerator cpu"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is without CUDA: install one with it (https://pytorch.org), {instead}"
    return f"PyTorch finds no GPU: nvidia-smi must list one, and CUDA_VISIBLE_DEVICES not hide it, {instead}"


def _threads(args: Any, fabric: Fabric) -> int:
    """Those asked for, else two if each rank here can have two cores: threads that share one spend it waiting."""
    if args.num_threads is not None:
        return args.num_threads
    cores, ranks = available_cores(), ranks_here(fabric)
    if cores < 2 * ranks:
        return 1
    if fabric.global_rank == 0 and (busy := cores_of_others()) > cores - 2 * ranks + (ranks - 1) + 0.5:
        text = f"other processes keep {busy:.1f} of {cores:g} cores busy, and threads wait for each other"
        print(f"warning: {text}: runs side by side are faster with --num-threads 1", file=sys.stderr, flush=True)
    return 2


def ranks_to_start(args: Any) -> int:
    """The ranks that this run is going to have; 0 if a launcher has started them, or if only the machine can tell."""
    started = {"LT_CLI_USED", "TORCHELASTIC_RUN_ID", "LOCAL_RANK"} & os.environ.keys() or under_srun()
    devices = args.devices or "1"
    if started or args.cuda or args.accelerator not in (None, "cpu") or not devices.isascii() or not devices.isdigit():
        return 0
    return int(devices) * (args.num_nodes or 1)


def ranks_here(fabric: Fabric) -> int:
    """Ranks on this machine."""
    if fabric.world_size == 1:
        return 1
    local = os.environ.get("LOCAL_WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if local:
        return min(int(local), fabric.world_size)  # the player is none of the trainers
    return -(-fabric.world_size // getattr(fabric.strategy, "num_nodes", 1))


def check_ranks(fabric: Fabric, module: nn.Module, obs: Tensor) -> None:
    """At start, parameters must be equal on all ranks and first observations different; warns about equal ones.

    Raises:
        RunError: the ranks start from different parameters.
    """
    if fabric.world_size == 1:
        return
    check_parameters(fabric, module)
    if obs.dtype == torch.uint8 or not obs.numel():  # frames: games start alike
        return
    firsts = all_gather(fabric, obs.flatten())  # [W, ...]
    if fabric.global_rank == 0 and len(firsts.unique(dim=0)) < len(firsts):
        text = "right if every episode begins alike; if not, does reset use its seed?"
        print(f"warning: some ranks start from equal observations: {text}", file=sys.stderr)


def check_parameters(fabric: Fabric, module: nn.Module) -> None:
    """Raises RunError unless the module has the same parameters on all ranks."""
    hashes = all_gather(fabric, parameter_hash(module)).tolist()
    if len(set(hashes)) > 1:
        raise RunError(f"ranks start from different parameters: hashes by rank are {hashes}")
