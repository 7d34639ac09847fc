"""Inter-process communication with names in the system: POSIX and System V, gone or still there at the restore."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

import torpor
from kit import Target, Targets, Verbs, host_state, round_trip

from .conftest import Survives

QUEUES = """
#include <mqueue.h>
#include <sys/epoll.h>
#include <sys/socket.h>

static char name[64];
static volatile int told_of;
static volatile long told_value;

static UNUSED void on_message(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	told_of++;
	told_value = (long)info->si_value.sival_ptr;
}

static UNUSED mqd_t make(int flags, long maxmsg, long msgsize)
{
	struct mq_attr attr = {.mq_maxmsg = maxmsg, .mq_msgsize = msgsize};

	snprintf(name, sizeof(name), "/kit-%d", getpid());
	return MUST(mq_open(name, flags | O_CREAT | O_EXCL, 0640, &attr));
}

static UNUSED void expect(mqd_t queue, const char *text, unsigned priority)
{
	char area[8192];
	unsigned got = 99;
	long size = MUST(mq_receive(queue, area, sizeof(area), &got));

	CHECK_EQ(size, strlen(text));
	CHECK(memcmp(area, text, size) == 0);
	CHECK_EQ(got, priority);
}
"""


def queues(body: str) -> str:
    return QUEUES + "int main(void)\n{\n" + body + "\n\tpass();\n}\n"


def test_message_queue(survives: Survives) -> None:
    """Messages, two descriptions with different flags, epoll, one in flight, notification, blocked receiver."""
    survives(
        queues(
            """
	mqd_t queue = make(O_RDWR, 5, 200), reader = MUST(mq_open(name, O_RDONLY | O_NONBLOCK));
	mqd_t quiet, parcel;
	int watch = MUST(epoll_create1(0)), pair[2], status, child;
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 77};
	struct sigaction action = {.sa_sigaction = on_message, .sa_flags = SA_SIGINFO};
	struct sigevent wanted = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
	char control[CMSG_SPACE(sizeof(int))] = {0}, byte = 'x', text[64];
	struct iovec vector = {&byte, 1};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	MUST(mq_unlink(name));
	strcpy(text, name);
	MUST(epoll_ctl(watch, EPOLL_CTL_ADD, reader, &event));
	MUST(mq_send(queue, "low", 3, 1));
	MUST(mq_send(queue, "high", 4, 31));
	MUST(mq_send(queue, "", 0, 31));
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	quiet = make(O_RDWR, 2, 16);
	wanted.sigev_value.sival_ptr = (void *)0x123456789aul;
	MUST(sigaction(SIGUSR1, &action, NULL));
	MUST(mq_notify(quiet, &wanted));
	MUST(mq_unlink(name));
	CMSG_FIRSTHDR(&message)->cmsg_level = SOL_SOCKET;
	CMSG_FIRSTHDR(&message)->cmsg_type = SCM_RIGHTS;
	CMSG_FIRSTHDR(&message)->cmsg_len = CMSG_LEN(sizeof(int));
	parcel = make(O_RDWR, 3, 32);
	MUST(mq_unlink(name));
	MUST(mq_send(parcel, "in flight", 9, 2));
	memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &parcel, sizeof(int));
	MUST(sendmsg(pair[0], &message, 0));
	MUST(close(parcel));
	parcel = make(O_RDWR, 3, 8000);
	MUST(mq_unlink(name));
	child = fork();
	if (child == 0) {  /* asleep in the call, which goes on */
		CHECK(told_of == 0);
		expect(parcel, "for the child", 0);
		_exit(0);
	}
	ready();
	wait_told("go");
	MUST(epoll_wait(watch, &event, 1, 0) - 1);
	CHECK_EQ(event.data.u64, 77);
	expect(reader, "high", 31);
	expect(queue, "", 31);
	expect(reader, "low", 1);
	CHECK(mq_receive(reader, text, 200, NULL) == -1 && errno == EAGAIN);
	CHECK_EQ(told_of, 0);
	MUST(mq_send(quiet, "ring", 4, 0));
	CHECK_EQ(told_of, 1);
	CHECK_EQ(told_value, 0x123456789al);
	message.msg_controllen = sizeof(control);
	MUST(recvmsg(pair[1], &message, 0));
	memcpy(&queue, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
	expect(queue, "in flight", 2);
	MUST(mq_send(parcel, "for the child", 13, 0));
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);"""
        ),
        flags=("-lrt",),
    )


NAMED = queues(
    """
	mqd_t queue = make(O_RDWR, 5, 200);
	MUST(mq_send(queue, "kept", 4, 7));
	tell("name", name + 1);
	ready();
	wait_told("go");
	expect(queue, "kept", 7);
	CHECK_EQ(MUST(mq_open(name, O_RDONLY)) > 0, 1);
	MUST(mq_unlink(name));"""
)


def remove_queue(name: str) -> None:
    from torpor.linux.mqueue import unlink

    unlink(name.encode())


def test_a_named_queue_that_is_still_there(survives: Survives) -> None:
    survives(NAMED, flags=("-lrt",))


def test_a_named_queue_that_is_gone(start: Targets, images: str) -> None:
    target = start.c(NAMED, flags=("-lrt",))
    torpor.dump(target.pid, images)
    target.wait_gone()
    remove_queue(target.read("name"))
    torpor.restore(images)
    target.go()


def test_a_queue_of_that_name_that_is_another(start: Targets, images: str) -> None:
    from torpor.linux.mqueue import mq_open

    target = start.c(NAMED, flags=("-lrt",))
    name = target.read("name").encode()
    torpor.dump(target.pid, images)
    target.wait_gone()
    remove_queue(name.decode())
    before = host_state(images)
    other = mq_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, (1, 8))
    try:
        with pytest.raises(torpor.Unsupported, match="another queue has its name"):
            torpor.restore(images)
        assert os.fstat(other).st_nlink == 1
    finally:
        os.close(other)
        remove_queue(name.decode())
    assert host_state(images) == before
    torpor.restore(images)
    target.go()


# ---------------------------------------------------------------------------------------- /dev/shm

SHM = """
#include <semaphore.h>

static char sem_name[64], shm_name[64], path[128];
static sem_t *sem, *lock;
static char *shared, *again;

static UNUSED char *map(int fd, size_t size)
{
	char *place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	CHECK(place != MAP_FAILED);
	return place;
}

/* A semaphore and a segment with names, of which the segment is also still open. */
static UNUSED int make(void)
{
	int fd;

	snprintf(sem_name, sizeof(sem_name), "/kit-sem-%d", getpid());
	snprintf(shm_name, sizeof(shm_name), "/kit-shm-%d", getpid());
	sem = sem_open(sem_name, O_CREAT | O_EXCL, 0640, 3);
	CHECK(sem != SEM_FAILED);
	fd = MUST(shm_open(shm_name, O_CREAT | O_EXCL | O_RDWR, 0604));
	MUST(ftruncate(fd, 1 << 22));
	shared = map(fd, 1 << 22);
	strcpy(shared + (1 << 21), "deep inside");
	MUST(sem_wait(sem));
	tell("names", (snprintf(path, sizeof(path), "%s %s", sem_name + 1, shm_name + 1), path));
	return fd;
}

static UNUSED void expect(int fd)
{
	int value;
	struct stat status, other;
	sem_t *second = sem_open(sem_name, 0);

	MUST(sem_getvalue(sem, &value));
	CHECK_EQ(value, 2);
	CHECK(second != SEM_FAILED);
	MUST(sem_post(second));
	MUST(sem_getvalue(sem, &value));
	CHECK_EQ(value, 3);  /* one and the same, by its name too */
	CHECK(strcmp(shared + (1 << 21), "deep inside") == 0 && shared[0] == 0);
	MUST(fstat(fd, &status));
	CHECK_EQ(status.st_mode, S_IFREG | 0604);
	snprintf(path, sizeof(path), "/dev/shm%s", shm_name);
	MUST(stat(path, &other));
	CHECK_EQ(status.st_ino, other.st_ino);
	CHECK_EQ(pwrite(fd, "seen", 4, 0), 4);
	CHECK(memcmp(shared, "seen", 4) == 0);
	snprintf(path, sizeof(path), "/dev/shm/sem.%s", sem_name + 1);
	MUST(stat(path, &other));
	CHECK_EQ(other.st_mode, S_IFREG | 0640);
	CHECK_EQ(other.st_nlink, 1);
}

static UNUSED void clean(void)
{
	MUST(sem_unlink(sem_name));
	MUST(shm_unlink(shm_name));
}
"""
NAMED_SHM = SHM + """
int main(void)
{
	int fd = make();

	ready();
	wait_told("go");
	expect(fd);
	clean();
	pass();
}
"""


def shm_paths(target: Target) -> tuple[str, str]:
    sem, segment = target.read("names").split()
    return f"/dev/shm/sem.{sem}", f"/dev/shm/{segment}"


def links_left() -> list[str]:
    return [f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if name.startswith("link_remap")]


def test_named_shared_memory_that_is_still_there(survives: Survives) -> None:
    survives(NAMED_SHM, flags=("-lrt", "-pthread"))


def test_named_shared_memory_that_is_still_there_with_link_remap(survives: Survives) -> None:
    survives(NAMED_SHM, flags=("-lrt", "-pthread"), options={"link_remap": True})
    assert not links_left()


@pytest.mark.parametrize("link_remap", [False, True])
@pytest.mark.parametrize("gone", ["semaphore", "segment", "both"])
def test_named_shared_memory_that_is_gone(start: Targets, images: str, gone: str, link_remap: bool) -> None:
    """As on another machine; with --link-remap without the link, too, which nobody has to copy."""
    target = start.c(NAMED_SHM, flags=("-lrt", "-pthread"))
    paths = shm_paths(target)
    torpor.dump(target.pid, images, link_remap=link_remap)
    target.wait_gone()
    links = links_left()
    assert len(links) == link_remap
    for path in [*links, *({"semaphore": paths[:1], "segment": paths[1:], "both": paths}[gone])]:
        os.unlink(path)
    torpor.restore(images)
    assert not links_left()
    target.go()


def test_a_failed_restore_leaves_no_shared_memory(start: Targets, images: str) -> None:
    target = start.c(NAMED_SHM, flags=("-lrt", "-pthread"))
    paths = shm_paths(target)
    torpor.dump(target.pid, images)
    target.wait_gone()
    for path in paths:
        os.unlink(path)
    os.rename(target.path("stdout"), target.path("away"))
    before = host_state(images)
    with pytest.raises(torpor.TorporError, match="stdout"):
        torpor.restore(images)
    assert host_state(images) == before and not any(map(os.path.exists, paths))
    os.rename(target.path("away"), target.path("stdout"))
    torpor.restore(images)
    target.go()


def test_another_file_in_place_of_shared_memory(start: Targets, images: str) -> None:
    target = start.c(NAMED_SHM, flags=("-lrt", "-pthread"))
    path, _ = shm_paths(target)
    torpor.dump(target.pid, images)
    target.wait_gone()
    os.unlink(path)
    with open(path, "wb") as file:
        file.write(bytes(32))
    before = host_state(images)
    with pytest.raises(torpor.Unsupported, match=f"another file is called {path} now") as caught:
        torpor.restore(images)
    assert "remove it if nobody needs it" in caught.value.hint
    assert host_state(images) == before and os.path.getsize(path) == 32
    os.unlink(path)
    torpor.restore(images)
    target.go()


def test_what_was_made_anew_is_known_again(start: Targets, images: str) -> None:
    """A second restore finds what the first one made and its tasks have changed since."""
    target = start.c(NAMED_SHM, flags=("-lrt", "-pthread"))
    paths = shm_paths(target)
    torpor.dump(target.pid, images)
    target.wait_gone()
    for path in paths:
        os.unlink(path)
    torpor.restore(images)
    with open(paths[1], "r+b") as file:
        file.write(b"changed")
    target.end()
    target.wait_gone()
    torpor.restore(images)
    with open(paths[1], "r+b") as file:
        assert file.read(7) == b"changed"
        file.seek(0)
        file.write(bytes(7))
    target.go()


def test_shared_memory_beyond_the_limit(start: Targets, images: str) -> None:
    target = start.c(
        SHM + """
int main(void)
{
	int fd = make();

	memset(shared, 'x', 1 << 20);
	ready();
	wait_told("go");
	CHECK(shared[1000] == 'x' && fd > 0);
	clean();
	pass();
}
""",
        flags=("-lrt", "-pthread"),
    )
    _, path = shm_paths(target)
    torpor.dump(target.pid, images)
    target.wait_gone()
    shutil.move(path, target.path("segment"))
    with pytest.raises(torpor.TorporError) as caught:
        torpor.restore(images)
    assert "--ghost-limit" in caught.value.hint
    shutil.copy(target.path("segment"), path)
    os.chmod(path, 0o604)
    torpor.restore(images)
    target.go()


DELETED = SHM + """
int main(void)
{
	int fd = make(), fd2, pid, status;

	snprintf(path, sizeof(path), "/dev/shm%s", shm_name);
	fd2 = MUST(open(path, O_RDWR));  /* another description of what will be deleted */
	again = map(fd2, 4096);
	snprintf(path, sizeof(path), "/kit-lock-%d", getpid());
	lock = sem_open(path, O_CREAT | O_EXCL, 0600, 0);
	MUST(sem_unlink(path));
	clean();
	pid = fork();
	if (pid == 0) {
		MUST(sem_wait(lock));  /* asleep in a futex */
		CHECK(strcmp(again, "from the parent") == 0);
		strcpy(shared, "from the child");
		MUST(sem_post(sem));
		_exit(0);
	}
	ready();
	wait_told("go");
	strcpy(shared, "from the parent");
	CHECK(strcmp(again, "from the parent") == 0);
	MUST(sem_post(lock));
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK(strcmp(again, "from the child") == 0);
	CHECK_EQ(pread(fd2, path, 15, 0), 15);
	CHECK(strcmp(path, "from the child") == 0);
	CHECK(strcmp(shared + (1 << 21), "deep inside") == 0);
	MUST(sem_getvalue(sem, &status));
	CHECK_EQ(status, 3);
	CHECK(access(strcat(strcpy(path, "/dev/shm"), shm_name), F_OK) == -1);
	close(fd);
	pass();
}
"""


def test_deleted_shared_memory_and_semaphores(survives: Survives) -> None:
    survives(DELETED, flags=("-lrt", "-pthread"))


def test_deleted_shared_memory_over_the_limit(start: Targets, images: str) -> None:
    target = start.c(DELETED, flags=("-lrt", "-pthread"))
    with pytest.raises(torpor.TorporError, match="it is deleted and holds") as caught:
        torpor.dump(target.pid, images, ghost_limit=1000)
    assert not os.listdir(images)
    assert "--ghost-limit" in str(vars(caught.value)) or "--ghost-limit" in caught.value.hint
    target.go()


def test_multiprocessing(start: Targets, verbs: Verbs, images: str) -> None:
    """Python's own: semaphores without a name, pipes, a segment that has one, a pool at work."""
    target = start.python("""
import multiprocessing as mp
from multiprocessing import shared_memory

def work(number):
    return number * number

def serve(tasks, results, lock, total, segment):
    memory = shared_memory.SharedMemory(name=segment)
    while (item := tasks.get()) is not None:
        with lock:
            total.value += item
            memory.buf[item] = item
        results.put(item)
    memory.close()

if __name__ == "__main__":
    context = mp.get_context("fork")
    tasks, results, lock = context.Queue(), context.Queue(), context.Lock()
    total = context.Value("i", 0, lock=False)
    segment = shared_memory.SharedMemory(create=True, size=100)
    workers = [context.Process(target=serve, args=(tasks, results, lock, total, segment.name)) for _ in range(2)]
    for worker in workers:
        worker.start()
    pool = context.Pool(2)
    assert pool.map(work, range(5)) == [0, 1, 4, 9, 16]
    tasks.put(1)
    assert results.get() == 1
    held = context.Semaphore(3)
    held.acquire()
    ready()
    wait_told("go")
    for item in range(2, 20):
        tasks.put(item)
    assert sorted(results.get() for _ in range(18)) == list(range(2, 20))
    assert total.value == sum(range(20))
    assert list(segment.buf[:20]) == list(range(20))
    assert pool.map(work, range(7)) == [n * n for n in range(7)]
    assert held.get_value() == 2
    for _ in workers:
        tasks.put(None)
    for worker in workers:
        worker.join()
    pool.close()
    pool.join()
    segment.close()
    segment.unlink()
    done(True)
""")
    round_trip(verbs, target, images)
    target.go(timeout=60)


# ---------------------------------------------------------------------------------------- System V

SYSV = """
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

static int set, queue, segment;
static char *attached;
static struct { long type; char text[100]; } message;

static UNUSED int change(int number, int by, int flags)
{
	struct sembuf operation = {number, by, flags};

	return semop(set, &operation, 1);
}

static UNUSED void make(void)
{
	char line[100];
	int key = 0x70000000 + getpid();

	set = MUST(semget(key, 3, IPC_CREAT | IPC_EXCL | 0640));
	queue = MUST(msgget(key, IPC_CREAT | IPC_EXCL | 0604));
	segment = MUST(shmget(key, 8192, IPC_CREAT | IPC_EXCL | 0600));
	attached = shmat(segment, NULL, 0);
	CHECK(attached != (void *)-1);
	strcpy(attached, "segment");
	MUST(semctl(set, 0, SETVAL, 1));
	MUST(semctl(set, 1, SETVAL, 5));
	MUST(change(0, -1, SEM_UNDO));  /* a lock that we hold */
	MUST(change(1, 2, SEM_UNDO));
	MUST(change(2, 4, 0));
	message.type = 7;
	strcpy(message.text, "first");
	MUST(msgsnd(queue, &message, 6, 0));
	message.type = 3;
	MUST(msgsnd(queue, &message, 0, 0));
	snprintf(line, sizeof(line), "%d %d %d", set, queue, segment);
	tell("ids", line);
}

static UNUSED void expect(void)
{
	int pid, status;
	struct shmid_ds state;

	CHECK_EQ(MUST(semget(0x70000000 + getpid(), 3, 0)), set);
	CHECK_EQ(MUST(semctl(set, 0, GETVAL)), 0);
	CHECK_EQ(MUST(semctl(set, 1, GETVAL)), 7);
	CHECK_EQ(MUST(semctl(set, 2, GETVAL)), 4);
	CHECK_EQ(MUST(msgrcv(queue, &message, 100, 3, IPC_NOWAIT)), 0);
	CHECK_EQ(MUST(msgrcv(queue, &message, 100, 0, IPC_NOWAIT)), 6);
	CHECK_EQ(message.type, 7);
	CHECK(strcmp(message.text, "first") == 0);
	CHECK(strcmp(attached, "segment") == 0);
	MUST(shmctl(segment, IPC_STAT, &state));
	CHECK_EQ(state.shm_perm.mode, 0600);  /* it is not to go when we do */
	pid = fork();
	if (pid == 0)
		_exit(change(0, -1, IPC_NOWAIT) == 0);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
}
"""
HOLDER = SYSV + """
int main(void)
{
	int pid, status;

	set = -1;
	pid = fork();
	if (pid == 0) {
		make();
		tell("made", "");
		wait_told("go");
		expect();
		_exit(0);  /* what it had is given back */
	}
	wait_told("made");
	{
		char line[100] = {0};
		int fd = MUST(open(kit_path("ids"), O_RDONLY));

		MUST(read(fd, line, 99));
		CHECK_EQ(sscanf(line, "%d %d %d", &set, &queue, &segment), 3);
		close(fd);
	}
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK_EQ(MUST(semctl(set, 0, GETVAL)), 1);
	CHECK_EQ(MUST(semctl(set, 1, GETVAL)), 5);
	CHECK_EQ(MUST(semctl(set, 2, GETVAL)), 4);
	MUST(semctl(set, 0, IPC_RMID));
	MUST(msgctl(queue, IPC_RMID, NULL));
	MUST(shmctl(segment, IPC_RMID, NULL));
	pass();
}
"""


def ids(target: Target) -> list[int]:
    return [int(word) for word in target.read("ids").split()]


def remove_sysv(target: Target, kinds: str = "sqm") -> None:
    numbers = dict(zip("sqm", ids(target), strict=True))
    for kind in kinds:
        subprocess.run(["ipcrm", f"-{kind}", str(numbers[kind])], check=True)


def test_system_v_that_is_still_there(survives: Survives) -> None:
    """What the kernel gave back when the tasks were killed they have again."""
    survives(HOLDER)


@pytest.mark.parametrize("gone", ["sqm", "s", "q"])
def test_system_v_that_is_gone(start: Targets, images: str, gone: str) -> None:
    target = start.c(HOLDER)
    torpor.dump(target.pid, images)
    target.wait_gone()
    remove_sysv(target, gone)
    torpor.restore(images)
    target.go()


def sem_value(semid: int, number: int, value: int | None = None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.semctl(semid, number, 12) if value is None else libc.semctl(semid, number, 16, value)


def test_a_semaphore_that_somebody_else_has_taken(start: Targets, images: str) -> None:
    target = start.c(HOLDER)
    torpor.dump(target.pid, images)
    target.wait_gone()
    semid = ids(target)[0]
    assert sem_value(semid, 0) == 1  # given back
    sem_value(semid, 0, 0)
    before = host_state(images)
    with pytest.raises(torpor.Unsupported, match="somebody else has it"):
        torpor.restore(images)
    assert host_state(images) == before and sem_value(semid, 1) == 5
    sem_value(semid, 0, 1)
    torpor.restore(images)
    target.go()


@pytest.mark.parametrize("kind", ["s", "q"])
def test_system_v_whose_key_is_taken(start: Targets, images: str, kind: str) -> None:
    target = start.c(HOLDER)
    torpor.dump(target.pid, images)
    target.wait_gone()
    remove_sysv(target)
    libc = ctypes.CDLL(None, use_errno=True)
    key = 0x70000000 + max(target.seen)
    other = libc.semget(key, 1, 0o1600) if kind == "s" else libc.msgget(key, 0o1600)
    assert other >= 0
    before = sysv_state()
    with pytest.raises(torpor.Unsupported, match=f"another one has its key {key:#x}") as caught:
        torpor.restore(images)
    assert "ipcrm" in caught.value.hint
    assert sysv_state() == before
    subprocess.run(["ipcrm", f"-{kind}", str(other)], check=True)
    torpor.restore(images)
    target.go()


def sysv_state() -> list[list[str]]:
    """Identifiers of all System V objects."""
    found = []
    for name in ("sem", "msg", "shm"):
        with open(f"/proc/sysvipc/{name}") as file:
            found.append(sorted(line.split()[1] for line in file))
    return found


def test_a_failed_restore_leaves_no_system_v_objects(start: Targets, images: str) -> None:
    target = start.c(HOLDER)
    torpor.dump(target.pid, images)
    target.wait_gone()
    remove_sysv(target)
    before = sysv_state()
    with faults_after_launch(), pytest.raises(torpor.TorporError, match="on purpose"):
        torpor.restore(images)
    assert sysv_state() == before
    torpor.restore(images)
    target.go()


@contextlib.contextmanager
def faults_after_launch() -> Iterator[None]:
    from torpor.engine import conduct

    def fail(*_: object) -> None:
        raise torpor.Unsupported("on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct.Conductor, "set_registers", fail)
        yield
