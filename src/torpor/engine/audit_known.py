"""What is known to keep secrets or random state in memory, and how it is recognised: a table, for audit.py.

The facts are those of the libraries' own sources: what they draw random numbers from, and by what they notice that they
have been copied. That is a process id for most of them, and a woken copy has the same one.
"""

from __future__ import annotations

#: How bad it is that copies share something. SECRET: whoever has one copy, or sees what another one sends, can break
#: or foretell the others. STATE: copies do the same where they should not. FIXED: nobody can renew it in a running
#: process. NOTE: for the reader to know.
SECRET, STATE, FIXED, NOTE = "secret", "state", "fixed", "note"
SEVERITIES = (SECRET, STATE, FIXED, NOTE)

GUEST_ADVICE = "have the program take part (torpor.guest, docs/guest-protocol.md), or snapshot it before its first use"


class Known:
    """A library or runtime. ``files``: beginnings of the names of what it is mapped from."""

    __slots__ = ("advice", "files", "severity", "text", "tls", "what")

    def __init__(
        self, what: str, files: tuple[str, ...], severity: str, text: str, *, tls: bool = False,
        advice: str = GUEST_ADVICE,
    ) -> None:  # fmt: skip
        self.what, self.files, self.severity, self.text, self.advice = what, files, severity, text, advice
        #: May a connection of a process that has it be a TLS session?
        self.tls = tls


KNOWN: tuple[Known, ...] = (
    Known(
        "openssl", ("libcrypto.so", "libcrypto-", "libssl.so", "libssl-"), SECRET,
        "OpenSSL: the state of RAND_bytes, from which keys, nonces and session ids are made; it reseeds when the "
        "process id changes, which a copy's does not, and otherwise by the hour", tls=True,
    ),
    Known(
        "cryptography", ("cryptography/hazmat/bindings/_rust",), SECRET,
        "Python's cryptography: an OpenSSL of its own, from which private keys are made", tls=True,
    ),
    Known("gnutls", ("libgnutls.so", "libgnutls-"), SECRET, "GnuTLS: the state of gnutls_rnd()", tls=True),
    Known("nss", ("libfreebl", "libnss3.so", "libsoftokn"), SECRET, "NSS: the state of its generator", tls=True),
    Known("libgcrypt", ("libgcrypt.so",), SECRET, "Libgcrypt: the pool of gcry_randomize()"),
    Known("mbedtls", ("libmbedcrypto.so", "libmbedtls.so"), SECRET, "Mbed TLS: the state of its generators", tls=True),
    Known("wolfssl", ("libwolfssl.so",), SECRET, "wolfSSL: the state of its generators", tls=True),
    Known("botan", ("libbotan",), SECRET, "Botan: the state of its generators", tls=True),
    Known(
        "node", ("node", "nodejs", "libnode.so"), SECRET,
        "Node: an OpenSSL of its own, which seeds crypto.randomBytes(); and Math.random()", tls=True,
        advice="Node cannot renew it: have it draw from /dev/urandom (examples/fresh.cjs) and make no keys in copies, "
        "or clone the program before it has any",
    ),
    Known("libuuid", ("libuuid.so",), STATE, "libuuid: clock sequence and last time of time-based UUIDs"),
    Known(
        "libsodium", ("libsodium.so", "libsodium-"), NOTE,
        "libsodium: draws from the kernel every time, unless the program has chosen randombytes_internal",
        advice="call randombytes_stir() in the copy if it has",
    ),
    Known(
        "jvm", ("libjvm.so",), STATE,
        "Java: java.util.Random, Math.random(), ThreadLocalRandom, hash seeds; SecureRandom draws from /dev/urandom "
        "(NativePRNG), other providers keep a state", tls=True,
    ),
    Known("perl", ("perl", "libperl.so"), STATE, "Perl: the state of rand() and the hash seed"),
    Known("ruby", ("ruby", "libruby"), STATE, "Ruby: the state of Random::DEFAULT and the hash seed", tls=False),
    Known("php", ("php", "libphp"), STATE, "PHP: the state of mt_rand()"),
    Known(
        "numpy", ("numpy/random/",), STATE, "NumPy: the state of its generators",
    ),
)  # fmt: skip

PYTHON = Known(
    "python", ("python2", "python3", "python", "libpython"), STATE,
    "Python: the states of random, uuid.uuid1() and tempfile names, the key of multiprocessing",
)  # fmt: skip
PYTHON_HASH = Known(
    "hash-seed", (), FIXED, "Python: the seed of str and bytes hashes, from which collisions can be made",
    advice="do not hand out what depends on the order of sets; start anew where an adversary chooses many keys",
)  # fmt: skip
GO = Known(
    "go", (), STATE,
    "Go: math/rand and the seeds of maps; crypto/rand draws from the kernel every time, TLS keeps ticket keys",
    tls=True,
)  # fmt: skip
#: Names of the files by which a program is seen to use what identifies the machine.
MACHINE_ID_FILES = ("/etc/machine-id", "/var/lib/dbus/machine-id")
MACHINE_ID_LIBRARIES = ("libsystemd.so", "libdbus-1.so")


def matches(known: Known, path: str, *, executable: bool = False) -> bool:
    """Is a mapped file one of those? Names without a dot or a slash are programs'."""
    name = path.rpartition("/")[2]
    for start in known.files:
        if "/" in start:
            if f"/{start}" in path:
                return True
        elif "." in start or start.startswith("lib"):
            if name.startswith(start):
                return True
        elif executable and name.startswith(start) and not name[len(start) :].strip("0123456789.-"):
            return True
    return False
