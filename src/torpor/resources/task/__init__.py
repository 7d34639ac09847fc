"""The parts of a task's and a thread's state, in the order in which a restored task gets them.

======  =========  ================  ==============================================================
ORDER   per        module            why there
======  =========  ================  ==============================================================
10      process    thp               before memory, where the engine can: it decides the page sizes
20      process    sigactions        setting a signal to "ignore" throws away what is pending, in
                                     all threads: so before any ``pending``
25      process    process_prctls    child subreaper, memory merging, membarrier
30      thread     tid_address       what the kernel writes to in the task's memory: the memory must
30      thread     robust_list       have been restored
32      thread     rseq
35      thread     sigaltstack
40      thread     thread_prctls     name, timer slack (before ``sched``), TSC, speculation, …
45      thread     personality       after memory: READ_IMPLIES_EXEC changes what mmap(2) does
48      thread     mempolicy         moves the pages that are there
50      process    proc_files        nothing in the task: written from outside
50      process    loginuid          nothing: it is born with it
50      process    autogroup         nothing in the task: written from outside
50      process    userfault_ranges  nothing touches the memory after it
60      thread     pending           before ``rlimits``, one of which bounds the queue
61      thread     guest_signal      after ``pending``: its handler is then the first that runs
65      process    posix_timers      all threads must exist; CLOCK_*_ALARM needs a capability, and a
66      process    itimers           timer takes part in RLIMIT_SIGPENDING: before both
75      thread     sched             real-time policies as late as their capability allows
80      process    rlimits           narrows what the calls before it need
81      process    mlockall          all memory must be there, and the capability
82      process    mdwe              no new executable memory from here on
85      thread     seccomp           needs CAP_SYS_ADMIN or no_new_privs: before ``creds``; the
                                     tracer has suspended it (PTRACE_O_SUSPEND_SECCOMP)
90      thread     creds             takes privileges away
91      thread     io_uring          a kernel thread that polls a ring has its maker's credentials
92      thread     dumpable          a change of credentials resets both
92      thread     pdeath_signal
======  =========  ================  ==============================================================

``sigmask``, ``syscall_dispatch`` and ``ldt`` restore nothing here; the engine sets masks with ptrace.

What the engine has to see to:

* Zombies among the children have ended before a task's ORDER 20 (SIGCHLD ignored means that a child
  which ends leaves no zombie); ORDER 20 throws away a SIGCHLD that restoring caused.
* All threads exist before the main thread's 65. No thread begins its 60 before the main thread has
  passed 20 (:data:`ALONE`), and the main thread begins its 80 (:data:`TOGETHER`) when all of them
  have passed 75: limits and filters with TSYNC concern all threads.
* Every signal is blocked meanwhile, but the tracer's own; ``pending.stops`` and ``pending.late`` tell what is
  left to the engine for the end.
* A thread that was stopped in a restartable sequence goes on elsewhere: ``rseq.abort_address``,
  asked before any program runs in it.
* ``check`` of each resource is called before anything is created, ``outside`` when the programs are
  through and the task is still held.
"""

#: Below this ORDER the main thread goes alone, before the others begin.
ALONE = 30
#: From this ORDER on a thread waits until all have come that far.
TOGETHER = 80
