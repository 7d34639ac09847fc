"""Programs that people have: a shell, Python with threads, a pipeline, an editor's deleted file."""

from __future__ import annotations

import os
import signal

from kit import Targets, Verbs, round_trip, wait_until

from .conftest import Survives

SHELL = """
count=0
trap 'count=$((count + 1))' USR1
sleep 1000 & echo $! > child
echo '' > ready
while ! wait $!; do [ -e go ] && break; done
kill $!
[ "$count" = 2 ] && echo pass > result.new || echo "fail: $count signals" > result.new
mv result.new result
"""


def test_a_sleeping_shell(start: Targets, verbs: Verbs, images: str) -> None:
    target = start.command("bash", "-c", SHELL, wait=True)
    wait_until("sleep has been executed", lambda: len(target.pids()) == 2)
    wait_until("it is sleep", lambda: _comm(target.pids()[1]) == "sleep\n")
    os.kill(target.pid, signal.SIGUSR1)
    wait_until("bash waits", lambda: target.state() == "S")
    round_trip(verbs, target, images)
    target.tell("go")
    os.kill(target.pid, signal.SIGUSR1)
    target.go()


def _comm(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read()


THREADS = """
import threading, zlib, os

counts = [0] * 4
secret = os.urandom(100_000)
checksum = zlib.crc32(secret)
barrier = threading.Barrier(5)
stop = threading.Event()

def count(place):
    barrier.wait()
    while not stop.is_set():
        counts[place] += 1
        stop.wait(0.001)

threads = [threading.Thread(target=count, args=(place,), daemon=True) for place in range(4)]
for thread in threads:
    thread.start()
barrier.wait()
ready()
wait_told("go")
before = list(counts)
time.sleep(0.1)
after = list(counts)
stop.set()
for thread in threads:
    thread.join(5)
done(all(a > b > 0 for a, b in zip(after, before)) and zlib.crc32(secret) == checksum
     and not any(thread.is_alive() for thread in threads), f"{before} {after}")
"""


def test_python_with_four_threads(start: Targets, survives: Survives) -> None:
    survives(start.python(THREADS))


PIPELINE = """
int main(void)
{
	int out[2], back[2];
	char buffer[70000], answer[8];

	MUST(pipe(out));
	MUST(pipe(back));
	if (fork() == 0) {
		close(out[1]);
		close(back[0]);
		wait_told("go");
		for (size_t n = 0; n < 50000;)  /* what was written before the dump */
			n += MUST(read(out[0], buffer + n, 50000 - n));
		MUST(write(back[1], filled(buffer, 50000, 5) ? "good" : "lost", 4));
		for (size_t n = 0, r; (r = MUST(read(out[0], buffer, sizeof(buffer)))); n += r)
			;  /* until the other end is closed */
		MUST(write(back[1], "end", 3));
		return 0;
	}
	close(out[0]);
	close(back[1]);
	fill(buffer, 50000, 5);
	MUST(write(out[1], buffer, 50000));
	MUST(write(out[1], "", 0));
	ready();
	CHECK_EQ(read(back[0], answer, 8), 4);
	CHECK(memcmp(answer, "good", 4) == 0);
	MUST(write(out[1], buffer, 100));
	close(out[1]);
	CHECK_EQ(read(back[0], answer, 8), 3);
	CHECK_EQ(read(back[0], answer, 8), 0);
	pass();
}
"""


def test_parent_and_child_with_pipes_in_flight(survives: Survives) -> None:
    survives(PIPELINE)


DELETED = """
int main(void)
{
	char text[6000];
	int fd = MUST(open("scratch", O_CREAT | O_RDWR, 0640)), same;

	fill(text, sizeof(text), 1);
	MUST(write(fd, text, sizeof(text)));
	same = MUST(open("scratch", O_RDONLY));
	MUST(unlink("scratch"));
	MUST(lseek(fd, 1000, SEEK_SET));
	ready();
	wait_told("go");
	CHECK_EQ(lseek(fd, 0, SEEK_CUR), 1000);
	CHECK_EQ(pread(same, text, sizeof(text), 0), 6000);
	CHECK(filled(text, sizeof(text), 1));
	MUST(pwrite(fd, "new", 3, 3));
	CHECK_EQ(pread(same, text, 3, 3), 3);  /* still one file */
	CHECK(memcmp(text, "new", 3) == 0);
	CHECK(access("scratch", F_OK) < 0);
	pass();
}
"""


def test_the_holder_of_a_deleted_file(survives: Survives) -> None:
    survives(DELETED)
