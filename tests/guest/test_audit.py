"""audit: what copies would share is named, and ``--strict`` refuses secrets that nobody renews."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable

import pytest

import torpor
from kit import Library, Target, Targets, compile_c, run_torpor
from torpor.engine import audit as engine_audit
from torpor.engine.audit_known import KNOWN, matches
from torpor.options import Options

Program = Callable[..., Target]

SSL = "import ssl; ssl.RAND_bytes(8); context = ssl.create_default_context()\n"
WAITS = "ready()\nwait_told('go')\ndone(True)\n"
GUEST = "from torpor import guest; guest.enable()\n"


@pytest.fixture
def taken(program: Program, images: str) -> Callable[..., str]:
    """A snapshot of a Python program, and the folder that it is in."""

    def take(source: str, **options: object) -> str:
        target = program(source)
        target.pids()
        torpor.dump(target.pid, images, **options)
        target.wait_gone()
        take.target = target  # type: ignore[attr-defined]
        return images

    return take


def severities(found: engine_audit.Audit) -> dict[str, str]:
    return {one.what: one.severity for one in found.shared}


def test_a_program_that_does_not_take_part(taken: Callable[..., str]) -> None:
    found = torpor.audit(taken(SSL + WAITS))
    named = severities(found)
    assert named["openssl"] == "secret"
    assert named["python"] == "state"
    assert named["hash-seed"] == named["address-layout"] == named["stack-canary"] == "fixed"
    assert [one.what for one in found.refused()] == ["openssl"]
    assert found.refused(["openssl"]) == []
    assert found.guests == []
    assert [one.severity for one in found.shared] == sorted(
        (one.severity for one in found.shared), key=["secret", "state", "fixed", "note"].index
    )


def test_a_program_that_takes_part(taken: Callable[..., str]) -> None:
    images = taken(GUEST + SSL + WAITS)
    found = torpor.audit(images)
    assert len(found.guests) == 1
    openssl, seed = found.find("openssl"), found.find("hash-seed")
    assert openssl is not None and "is told" in openssl.renewed
    assert seed is not None and not seed.renewed, "nobody can"
    assert found.refused() == []
    assert torpor.audit(images, new_generation=False).refused(), "nobody tells it then"
    Library().restore(images, strict=True)


def test_strict_refuses_before_anything_is_made(taken: Callable[..., str]) -> None:
    images = taken(SSL + WAITS)
    with pytest.raises(torpor.Unsupported) as caught:
        Library().restore(images, strict=True)
    assert "copies would share a secret that nobody renews: openssl: OpenSSL: the state of RAND_bytes" in str(caught.value)
    assert "--allow-shared openssl" in caught.value.hint
    with pytest.raises(torpor.UsageError, match="nothing is called `opnssl`") as typo:
        Library().restore(images, strict=True, allow_shared=["opnssl"])
    assert "did you mean `openssl`" in typo.value.hint
    Library().restore(images, strict=True, allow_shared=["openssl"])
    taken.target.go()  # type: ignore[attr-defined]


def test_one_task_of_a_tree_that_does_not_take_part(taken: Callable[..., str]) -> None:
    source = SSL + GUEST + (
        "import subprocess, sys\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import ssl, time; print(1, flush=True); time.sleep(1000)'],"
        " stdout=subprocess.PIPE)\nother.stdout.readline()\n"
    )
    found = torpor.audit(taken(source + WAITS))
    openssl = found.find("openssl")
    assert openssl is not None
    assert len(openssl.pids) == 2
    assert openssl.open_pids == [pid for pid in openssl.pids if pid not in found.guests]
    assert openssl.renewed == ""
    assert [one.what for one in found.refused()] == ["openssl"]


def test_memory_of_files(taken: Callable[..., str], tmp_path: os.PathLike[str]) -> None:
    """Those with names are common to all copies, unless they are in an overlay; the others are made for each."""
    source = """
import mmap, os, sys
def mapped(path, unlink=False, prot=mmap.PROT_READ | mmap.PROT_WRITE):
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.truncate(fd, 4096)
    if unlink:
        os.unlink(path)
    return mmap.mmap(fd, 4096, prot=prot)
"""
    folder = os.fspath(tmp_path)
    kept = f"both = mapped('{folder}/gone', True), mapped('{folder}/read', prot=mmap.PROT_READ)\n"
    assert "shared-files" not in severities(torpor.audit(taken(source + kept + WAITS)))
    images = taken(f"{source}one = mapped('{folder}/file')\n{WAITS}")
    found = torpor.audit(images).find("shared-files")
    assert found is not None and found.severity == "state" and not found.renewed
    renewed = torpor.audit(images, own_pids=True, overlay=[f"{folder}/"]).find("shared-files")
    assert renewed is not None and renewed.renewed == "--overlay"


TLS = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
one = socket.create_connection(listener.getsockname())
two, _ = listener.accept()
"""


def test_connections(taken: Callable[..., str]) -> None:
    images = taken(GUEST + SSL + TLS + WAITS, tcp_established=True)
    found = torpor.audit(images)
    assert severities(found)["tls-sessions"] == "secret"
    assert [one.what for one in found.refused()] == ["tls-sessions"], "a guest has to close them before"
    closed = torpor.audit(images, tcp_close=True).find("tls-sessions")
    assert closed is not None and closed.renewed == "--tcp-close"


def test_connections_without_encryption(start: Targets, images: str) -> None:
    source = """
	#include <arpa/inet.h>
	#include <netinet/in.h>
	int main(void)
	{
		struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
		socklen_t size = sizeof(address);
		int listener = MUST(socket(AF_INET, SOCK_STREAM, 0)), one = MUST(socket(AF_INET, SOCK_STREAM, 0));
		MUST(bind(listener, (void *)&address, size));
		MUST(listen(listener, 1));
		MUST(getsockname(listener, (void *)&address, &size));
		MUST(connect(one, (void *)&address, size));
		MUST(accept(listener, NULL, NULL));
		ready();
		pause();
	}
	"""
    target = start.c(source)
    torpor.dump(target.pid, images, tcp_established=True)
    named = severities(torpor.audit(images))
    assert "tls-sessions" not in named
    assert named["tcp-connections"] == "state"


MEMORY = """
int main(int argc, char **argv)
{
	char *area = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (strchr(argv[1], 'w'))
		MUST(madvise(area, 4096, MADV_WIPEONFORK));
	if (strchr(argv[1], 'd'))
		MUST(madvise(area + 4096, 4096, MADV_DONTDUMP));
	if (strchr(argv[1], 'l'))
		MUST(mlock(area + 8192, 4096));
	memset(area, 1, 12288);
	ready();
	pause();
}
"""


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [("-", {}), ("w", {"wipe-on-fork": "secret"}), ("d", {"key-memory": "state"}), ("l", {"key-memory": "state"})],
)
def test_memory_that_says_what_it_holds(start: Targets, images: str, kinds: str, expected: dict[str, str]) -> None:
    target = start.c(MEMORY, kinds)
    torpor.dump(target.pid, images)
    fixed = {"address-layout": "fixed", "stack-canary": "fixed"}
    assert severities(torpor.audit(images)) == {**expected, **fixed}
    assert not torpor.audit(images, fresh=True).refused()
    assert len(torpor.audit(images).refused()) == ("w" in kinds)


GO_PROGRAM = """
#include <sys/prctl.h>
__attribute__((section(".note.go.buildid"), used, aligned(4)))
static const struct { unsigned name, size, kind; char who[4], id[8]; } note = {4, 8, 4, "Go\\0", "abcdefg"};
int main(void) { ready(); pause(); }
"""


def test_go_is_known_by_the_note_of_its_linker(start: Targets, images: str) -> None:
    target = start.c(GO_PROGRAM)
    torpor.dump(target.pid, images)
    assert severities(torpor.audit(images))["go"] == "state"


def test_node(start: Targets, images: str) -> None:
    if not shutil.which("node"):
        pytest.skip("needs node on PATH")
    target = start.command("node", "-e", "require('fs').writeFileSync('ready', ''); setInterval(() => {}, 1000)")
    target.wait_file("ready", timeout=30)
    torpor.dump(target.pid, images)
    found = torpor.audit(images)
    assert severities(found)["node"] == "secret"
    assert "/dev/urandom" in found.find("node").advice  # type: ignore[union-attr]


def test_the_machine_id(taken: Callable[..., str]) -> None:
    if not os.path.exists("/etc/machine-id"):
        pytest.skip("needs /etc/machine-id")
    found = torpor.audit(taken("file = open('/etc/machine-id')\n" + WAITS))
    assert severities(found)["machine-id"] == "note"


def test_the_command(taken: Callable[..., str], images: str) -> None:
    taken(SSL + WAITS)
    done = run_torpor("audit", images).must()
    assert "secret    openssl" in done.output
    assert "nobody" in done.output
    assert "Tasks that take part in snapshots: none." in done.output
    assert run_torpor("audit", images, "--strict").status == 1
    shown = json.loads(run_torpor("audit", images, "--json").must().output)
    assert shown["refused"] == ["openssl"]
    assert {"what", "severity", "pids", "open_pids", "renewed", "text", "advice"} == set(shown["shared"][0])
    same = json.loads(run_torpor("restore", images, "--audit", "--json").must().output)
    assert same == shown
    assert not taken.target.alive()  # type: ignore[attr-defined]
    refused = run_torpor("restore", images, "-d", "--strict")
    assert refused.status == 1 and "--allow-shared openssl" in refused.output
    run_torpor("restore", images, "-d", "--strict", "--allow-shared", "openssl").must()
    taken.target.go()  # type: ignore[attr-defined]


def test_no_such_snapshot(tmp_path: object) -> None:
    with pytest.raises(torpor.UsageError, match="No such file"):
        torpor.audit(f"{tmp_path}/none")
    with pytest.raises(torpor.ImageError, match=r"audit: pstree\.img"):
        torpor.audit(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "executable", "expected"),
    [
        ("/usr/lib/x86_64-linux-gnu/libcrypto.so.3", False, {"openssl"}),
        ("/app/numpy.libs/libcrypto-3f0e2b1c.so.1.1", False, {"openssl"}),
        ("/usr/bin/node", True, {"node"}),
        ("/usr/bin/nodejs", True, {"node"}),
        ("/usr/bin/nodelay", True, set()),
        ("/usr/bin/node", False, set()),
        ("/usr/bin/perl5.36.0", True, {"perl"}),
        ("/venv/lib/python3.11/site-packages/numpy/random/mtrand.cpython-311.so", False, {"numpy"}),
        ("/venv/cryptography/hazmat/bindings/_rust.abi3.so", False, {"cryptography"}),
        ("/usr/lib/jvm/java-17/lib/server/libjvm.so", False, {"jvm"}),
        ("", False, set()),
    ],
)
def test_what_files_are_recognised(path: str, executable: bool, expected: set[str]) -> None:
    assert {one.what for one in KNOWN if matches(one, path, executable=executable)} == expected


def test_names_are_told_apart() -> None:
    found = engine_audit.names()
    assert len(found) == len(set(found))
    assert Options(strict=True, allow_shared=["openssl"]).allow_shared == ("openssl",)


def test_the_c_compiler_is_not_needed_for_go() -> None:
    """The note as Go's own linker writes it, where Go is installed."""
    go = shutil.which("go")
    if not go:
        pytest.skip("needs go on PATH; the note is tested above without it")
    assert engine_audit._is_go(os.path.realpath(go))
    assert not engine_audit._is_go(compile_c("int main(void) { return 0; }"))
    assert subprocess.run([go, "version"], check=False).returncode == 0
