"""Snapshots of programs that use an NVIDIA GPU by CUDA, and copies of them on the same GPU.

    python cuda.py dump PID DIR         what is on the GPU comes into memory, then all of it is dumped
    python cuda.py restore DIR
    python cuda.py clone DIR -n COPIES  each in a network namespace, with the GPU memory that the program had

The driver moves a process off its GPUs and back by itself (CUDA driver API, cuCheckpointProcess…, since driver 570):
in between it holds no device, and is a process like any other. See docs/gpu.md.
"""

import argparse
import contextlib
import ctypes
import os
import sys

import torpor

ARGUMENTS_BYTES = 64  # CUcheckpointLockArgs and the like: zeros ask for nothing


class Driver:
    """The CUDA driver, as far as it is needed here. It is loaded when Torpor is through: nothing of it is inherited."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._check("cuInit", self._cuda.cuInit(0))

    def _check(self, call: str, result: int) -> None:
        if result:
            name = ctypes.c_char_p()
            self._cuda.cuGetErrorName(result, ctypes.byref(name))
            raise SystemExit(f"{call}: {(name.value or b'error').decode()} ({result})")

    def do(self, what: str, pid: int) -> None:
        """Lock, Checkpoint, Restore or Unlock a process."""
        call = f"cuCheckpointProcess{what}"
        self._check(f"{call}({pid})", getattr(self._cuda, call)(pid, ctypes.create_string_buffer(ARGUMENTS_BYTES)))

    def bring_back(self, root: int) -> None:
        """Give those of a tree their GPU memory again, and let them go on."""
        pids = with_cuda(root)
        for what in ("Restore", "Unlock"):
            for pid in pids:
                self.do(what, pid)


def tree(root: int) -> list[int]:
    """A process and its descendants."""
    found = [root]
    for pid in found:
        for tid in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{tid}/children") as file:
                found += map(int, file.read().split())
    return found


def with_cuda(root: int) -> list[int]:
    """Those of them that have loaded the driver."""
    found = []
    for pid in tree(root):
        with open(f"/proc/{pid}/maps", "rb") as file:
            if b"libcuda.so" in file.read():
                found.append(pid)
    return found


def dump(pid: int, folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    driver, pids = Driver(), with_cuda(pid)
    with contextlib.ExitStack() as undo:  # what fails leaves them running, on their GPUs
        for what, back in (("Lock", "Unlock"), ("Checkpoint", "Restore")):
            for each in pids:
                driver.do(what, each)
                undo.callback(driver.do, back, each)
        torpor.dump(pid, folder, tcp_established=True)
        undo.pop_all()


def restore(folder: str) -> None:
    root = torpor.restore(folder, tcp_established=True).pid
    print(root, flush=True)
    Driver().bring_back(root)


def clone(folder: str, count: int) -> None:
    # The driver's own sockets have abstract names, of which a network has each but once.
    with torpor.template(folder, tcp_close=True) as template:
        copies = [template.clone(net="new").pid for _ in range(count)]
    driver = Driver()
    for root in copies:
        print(root, flush=True)
        driver.bring_back(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("dump", "restore", "clone"))
    parser.add_argument("rest", nargs="+", metavar="[PID] DIR")
    parser.add_argument("-n", type=int, default=1, metavar="COPIES")
    args = parser.parse_args()
    try:
        if args.verb == "dump" and len(args.rest) == 2:
            dump(int(args.rest[0]), args.rest[1])
        elif args.verb != "dump" and len(args.rest) == 1:
            restore(args.rest[0]) if args.verb == "restore" else clone(args.rest[0], args.n)
        else:
            parser.error(f"{args.verb}: what, and where?")
    except torpor.TorporError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
