"""Moving tensors between the CPU and a GPU: everything is queued, and one function waits.

A GPU works through a queue while the CPU goes on; a copy from ordinary memory, and whatever asks for a tensor's value,
makes the CPU wait until the queue is empty. Copies from page-locked ("pinned") memory are queued like everything else.
"""

import functools

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for it.

    A pinned tensor must not be written to before `to_host` has been called; others are copied first.
    """
    if tensor.device == device or device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # memory that is pinned already is taken as it is


Places = dict[tuple[int, torch.Size, torch.dtype], Tensor]  # pinned memory that values come to, again and again


def to_host(*tensors: Tensor, places: Places | None = None) -> list[Tensor]:
    """The tensors on the CPU. The one place that waits for a GPU: the values of all come in a single wait.

    `places`: where they come to, which makes that faster; the next values of these shapes come there, too.
    """
    copies, devices, places = [], set(), {} if places is None else places
    for tensor in tensors:
        if tensor.device.type != "cuda":
            copies.append(tensor.cpu())
            continue
        key = len(copies), tensor.shape, tensor.dtype
        if key not in places:
            places[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copies.append(places[key].copy_(tensor, non_blocking=True))
        devices.add(tensor.device)
    for device in devices:
        wait(device)
    return copies


def wait(device: torch.device) -> None:
    """Waits until a GPU has done everything that is queued."""
    queue_of(device).synchronize()


@functools.cache
def queue_of(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU that everything is queued on; to ask PyTorch for it takes longer than to wait for it.

    It is remembered: ask first where that stream is current, outside of `torch.cuda.stream`.
    """
    return torch.cuda.current_stream(device)


class Passed:
    """A mark in a GPU's queue: what was queued before it is done once `wait` returns."""

    def __init__(self, device: torch.device) -> None:
        self._event, self._queue = torch.cuda.Event(), queue_of(device)

    def mark(self) -> None:
        self._event.record(self._queue)

    def wait(self) -> None:
        """Waits for the last mark, if there is one."""
        self._event.synchronize()


def pinned(device: torch.device) -> bool:
    """True if memory that is copied to this device is better pinned."""
    return device.type == "cuda"
