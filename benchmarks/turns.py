"""Two processes that take turns and talk over Gloo, with nothing of ours: the least that messages between them cost.

    python benchmarks/turns.py 192 269464 1 6

One works for 1 ms and sends 192 bytes, the other for 6 ms and answers with 269 464. Prints the milliseconds of a turn
beside the work, the mean of some hundred.
"""

import os
import socket
import sys
import time

import torch
import torch.distributed as dist
from torch import multiprocessing

TURNS, WARM_UP = 400, 50


def work(milliseconds: float) -> None:
    """Keeps a core busy."""
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end:
        pass


def take_turns(rank: int, port: int, sizes: list[int], milliseconds: list[float]) -> None:
    """Takes turns with the other rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    order, answer = (torch.zeros(size, dtype=torch.uint8) for size in sizes)
    for turn in range(WARM_UP + TURNS):
        if turn == WARM_UP:
            started = time.perf_counter()
        if rank == 0:
            work(milliseconds[0])
            sending = dist.isend(order, 1)
            dist.recv(answer, 1)
        else:
            dist.recv(order, 0)
            work(milliseconds[1])
            sending = dist.isend(answer, 0)
        sending.wait()
    if rank == 0:
        turn_ms = 1e3 * (time.perf_counter() - started) / TURNS
        print(f"result milliseconds={turn_ms - sum(milliseconds):.4f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    numbers = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    given = port, [int(number) for number in numbers[:2]], [float(number) for number in numbers[2:]]
    multiprocessing.spawn(take_turns, given, nprocs=2)
