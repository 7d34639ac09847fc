"""Character devices: which keep nothing in the open description, so that opening them again is all there is to do.

Documentation/admin-guide/devices.txt; numbers of the major 10 that are given as a driver comes are in /proc/misc.
"""

from __future__ import annotations

import os

MEMORY, MISC = 1, 10  # /dev/null, zero, full, random, urandom, kmsg; all kinds of single devices
#: Drivers of the major 10 that only take requests, by their names in /proc/misc
STATELESS = ("autofs", "btrfs-control", "hw_random", "kvm", "loop-control", "userfaultfd", "vsock")

_CLOSE = "close it before the dump and open it again after the restore"
#: (major, minor or -1 for all) → (what it is, hint)
KEEPERS = {
    (10, 229): (
        "a connection to a FUSE file system (/dev/fuse), whose requests wait for answers",
        "unmount the file system before the dump, or dump its server and its users by themselves",
    ),
    (10, 130): ("a watchdog, which resets the machine if it is not served", "disarm it before the dump (write `V`)"),
    (10, 135): ("the real-time clock, with alarms of its own", _CLOSE),
    (10, 223): ("a virtual input device (/dev/uinput), which goes with its descriptor", _CLOSE),
    (10, 238): ("the network of a virtual machine (/dev/vhost-net)", "snapshot the guest by its own monitor"),
    (10, 241): ("the sockets of a virtual machine (/dev/vhost-vsock)", "snapshot the guest by its own monitor"),
    (10, 242): ("a switch for radio transmitters (/dev/rfkill), with events that wait", _CLOSE),
    (10, 203): ("a character device in user space (/dev/cuse)", _CLOSE),
    (13, -1): ("an input device, with events that wait and with grabs", _CLOSE),
    (29, -1): ("a frame buffer", "switch to a text console first"),
    (81, -1): ("a camera or television card", _CLOSE),
    (108, -1): ("a PPP connection (/dev/ppp)", "hang up before the dump"),
    (116, -1): ("a sound device", "let the sound server hold it, and end it before the dump"),
    (195, -1): ("a GPU (nvidia)", "end the work on the GPU first: cuda-checkpoint can do it"),
    (226, -1): ("a GPU (/dev/dri)", "run the program without hardware acceleration"),
    (235, -1): ("a GPU of AMD (/dev/kfd)", "end the work on the GPU first"),
    (511, -1): ("a GPU (nvidia-uvm)", "end the work on the GPU first: cuda-checkpoint can do it"),
}
_BY_NAME = {
    "cpu_dma_latency": ("a demand for short latency (/dev/cpu_dma_latency), which lasts as long as it is open", _CLOSE),
    "uhid": ("a virtual input device (/dev/uhid), which goes with its descriptor", _CLOSE),
    "snapshot": ("a hibernation that is under way (/dev/snapshot)", "wait until it is over"),
    "vga_arbiter": ("the graphics arbiter, with locks that are held", _CLOSE),
}


def is_stateless(device: int) -> bool:
    """Does a character device (a dev_t) keep nothing about whoever has opened it?"""
    major = os.major(device)
    return major == MEMORY or (major == MISC and misc_name(os.minor(device)) in STATELESS)


def keeper(device: int) -> tuple[str, str]:
    """(what a device is that keeps more than can be seen, hint)"""
    major, minor = os.major(device), os.minor(device)
    known = KEEPERS.get((major, minor)) or KEEPERS.get((major, -1))
    if known is None and major == MISC:
        known = _BY_NAME.get(misc_name(minor))
    return known or (f"character device {major}:{minor}", _CLOSE)


def misc_name(minor: int) -> str:
    """The driver of a minor number of the major 10; "" if there is none."""
    try:
        with open("/proc/misc", encoding="ascii") as file:
            names = dict(line.split() for line in file)
    except FileNotFoundError:
        return ""
    return names.get(str(minor), "")
