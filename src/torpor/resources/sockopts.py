"""The options of sockets of all families that can be read back (SOL_SOCKET).

Image: sk_opts_entry. CRIU's fields hold those that it knows; the others, where they are not as in a new socket
of that kind, are in ``more``. Kernel: net/core/sock.c, sk_getsockopt().
"""

from __future__ import annotations

import ctypes  # noqa: F401
