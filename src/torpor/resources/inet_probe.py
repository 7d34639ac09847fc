"""What this kernel can do for sockets of IPv4 and IPv6, asked by trying."""

from __future__ import annotations

import os

from ..linux import sockets
from ..linux.inet_diag import AF_INET, AF_INET6
from . import inet_options, sockopts, tcp
from .inet_options import SOCK_DGRAM, SOCK_RAW, SOCK_STREAM, get, put

IPPROTO_RAW = 255


def half_closed() -> bool:
    """Can connections be repaired, with their windows, so that FINs find their place?"""
    fd = sockets.socket(AF_INET, SOCK_STREAM)
    try:
        tcp.repair(fd, on=True)
        return get(fd, inet_options.SOL_TCP, tcp.TCP_REPAIR_WINDOW, 20) is not None
    finally:
        os.close(fd)


def raw() -> bool:
    """Can raw sockets be looked at? All that we want of one, it tells itself."""
    os.close(sockets.socket(AF_INET, SOCK_RAW, IPPROTO_RAW))
    os.close(sockets.socket(AF_INET6, SOCK_RAW, IPPROTO_RAW))
    return True


def six_freebind() -> bool:
    """Is there IPV6_FREEBIND?"""
    fd = sockets.socket(AF_INET6, SOCK_DGRAM)
    try:
        put(fd, inet_options.SOL_IPV6, inet_options.IPV6_FREEBIND, 1)
        return True
    finally:
        os.close(fd)


def buffer_lock() -> bool:
    """Is there SO_BUF_LOCK?"""
    fd = sockets.socket(AF_INET, SOCK_DGRAM)
    try:
        return get(fd, sockets.SOL_SOCKET, sockopts.SO_BUF_LOCK, 4) is not None
    finally:
        os.close(fd)


def nftables_lock() -> bool:
    """Is there an nft(8) that can hold back packets here? A lock is set for a connection that cannot be, and lifted."""
    from .network_lock import NFTABLES, lock

    nobody = (bytes((192, 0, 2, 1)), 9, bytes((192, 0, 2, 2)), 9)  # TEST-NET-1, RFC 5737
    made = lock([nobody], "nftables")
    made.lift()
    return made.method == NFTABLES


def iptables() -> bool:
    """Is there an iptables(8) that works?"""
    from .network_lock import program_works

    return program_works("iptables", "-w", "-L", "-n")
