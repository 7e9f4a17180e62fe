"""Addresses, ports and network interfaces: ranks listen to nobody but each other."""

import contextlib
import ipaddress
import os
import socket
import struct
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import DebugLevel, TCPStore

from fabricrl.utils.errors import ConfigError

SIOCGIFADDR = 0x8915
LOOPBACK = "127.0.0.1"


def check_address(address: str, name: str) -> None:
    """Raises ConfigError unless the address is known here, and one that other machines may know, too."""
    try:
        found = ipaddress.ip_address(socket.getaddrinfo(address, None)[0][4][0])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} {address} is not known here: {reason}") from error
    if found.is_loopback and not means_loopback(address):  # some machines' names stand for it
        raise ConfigError(f"{name} {address} is {found} here: give the address by which other machines know it")


def means_loopback(address: str) -> bool:
    """Tells if an address means this machine wherever it is read."""
    return address == "localhost" or address == "::1" or address.startswith("127.")


def is_loopback(address: str) -> bool:
    """Tells if an address leads to loopback from here."""
    return ipaddress.ip_address(socket.getaddrinfo(address, None)[0][4][0]).is_loopback


def open_store(address: str, port: int, named: str) -> TCPStore:
    """A store that listens on this address only, where PyTorch's own would on all that the machine has.

    Raises:
        ConfigError: port or address cannot be had; `named` is what the user knows the port as.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(2048)
            port = listener.getsockname()[1]
            return TCPStore(address, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())
    except OSError as error:
        raise ConfigError(f"{named} {port} on {address} cannot be used: {error.strerror}; try another") from error


def find_store(address: str, port: int, seconds: float) -> TCPStore:
    """Connects to a store that another process keeps; raises OSError or RuntimeError if none answers in this time."""
    deadline = time.monotonic() + seconds
    while True:  # PyTorch waits, too, but prints a page if nobody comes
        try:
            socket.create_connection((address, port), min(seconds, 60)).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    return TCPStore(address, port, None, False, timeout=timedelta(seconds=seconds))


def prepare_network(address: str, one_node: bool) -> None:
    """Has Gloo and NCCL listen at one interface: loopback if all ranks are here, else the one towards the address.

    Left to themselves they take what the machine's name stands for, or any. What the user has chosen is kept.

    Raises:
        ConfigError: the user's choice is not there, or PyTorch is told to do what crashes it.
    """
    if torch.distributed.get_debug_level() == DebugLevel.DETAIL:
        raise ConfigError(
            "TORCH_DISTRIBUTED_DEBUG is DETAIL, with which PyTorch crashes when it averages gradients: it must be INFO "
            "or OFF with several ranks"
        )
    if sys.platform != "linux":
        return
    there = interfaces()
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        usable = [name for name, addresses in there.items() if addresses]
        for name in chosen.split(","):
            if name not in usable:
                raise ConfigError(f"GLOO_SOCKET_IFNAME is {chosen}: {name} must be one of {', '.join(usable)}")
        return
    own = LOOPBACK if one_node else _own_address(address)
    if not one_node and ipaddress.ip_address(own).is_loopback and not means_loopback(address):
        return  # where other machines cannot reach this one
    for name, addresses in there.items():
        if own in addresses:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # =: this one, not all that begin so
            return


def interfaces() -> dict[str, set[str]]:
    """The addresses of each network interface (Linux)."""
    import fcntl

    found: dict[str, set[str]] = {name: set() for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in found:
            with contextlib.suppress(OSError):  # it has none of this kind
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name].add(socket.inet_ntoa(answer[20:24]))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        number, *_, name = line.split()
        found.setdefault(name, set()).add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(number)))
    return found


def _own_address(address: str) -> str:
    """This machine's address on the way to another one.

    Raises:
        ConfigError: there is no way.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"the main address {address} cannot be reached from here: {error.strerror}") from error
