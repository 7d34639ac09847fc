"""What a Python test program may use; the same words as in ``kit.h``."""

import os
import time

DIR = os.environ["KIT_DIR"]


def tell(name: str, text: str = "") -> None:
    """Make a file appear with its whole content at once."""
    temporary = f"{DIR}/{name}.tmp.{os.getpid()}"
    with open(temporary, "w") as file:
        file.write(text)
    os.rename(temporary, f"{DIR}/{name}")


def ready() -> None:
    tell("ready")


def told(name: str) -> bool:
    return os.path.exists(f"{DIR}/{name}")


def wait_told(name: str) -> None:
    while not told(name):
        time.sleep(0.002)


def done(check: bool, why: str = "") -> None:
    tell("result", "pass\n" if check else f"fail: {why}\n")
