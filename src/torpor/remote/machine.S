# The machine: walks an array of 96-byte records and does the system call of each. See machine.py for the record.
# x86-64. %r15 is the current record; nothing else is kept in registers and the stack is never touched.
# `machine.py` holds the assembled bytes; a test assembles this file and compares.

        .macro  run
1:      mov     (%r15), %rax            # number + 1: a zeroed record is the end
        sub     $1, %rax
        jc      9f
        mov     8(%r15), %rdi
        mov     16(%r15), %rsi
        mov     24(%r15), %rdx
        mov     32(%r15), %r10
        mov     40(%r15), %r8
        mov     48(%r15), %r9
        syscall
        mov     80(%r15), %rcx          # where the child of a clone goes on
        test    %rax, %rax
        jnz     2f
        test    %rcx, %rcx
        jz      2f
        mov     %rcx, %r15
        jmp     1b
2:      mov     %rax, 56(%r15)
        cmp     $-4095, %rax
        jae     5f
        mov     64(%r15), %rcx          # where else the result is wanted
        test    %rcx, %rcx
        jz      3f
        mov     %rax, (%rcx)
3:      cmpq    $0, 88(%r15)            # a transfer, to be repeated until all has moved
        je      4f
        test    %rax, %rax
        jz      9f                      # nothing more to be had
        add     %rax, 16(%r15)
        add     %rax, 32(%r15)
        sub     %rax, 24(%r15)
        jnz     1b
4:      add     $96, %r15
        jmp     1b
5:      neg     %rax
        cmp     $63, %rax
        ja      9f
        bt      %rax, 72(%r15)          # tolerated errnos
        jc      4b
9:
        .endm

# In stubs of our own: stops are records of the program (tgkill); coming here is a failure.
        .globl  stub_start, stub_end
stub_start:
        run
        int3
stub_end:

# In tasks that are not ours. If whoever set it going dies at any instant, the task finds its way back alone: each stop is a
# signal that the task ignores, and all registers come from the frame. Signals are blocked here, though the tracer does so
# as well: it may have died in between.
        .globl  guest_start, guest_end
guest_start:
        mov     $2, %edi
        lea     blocked(%rip), %rsi
        xor     %edx, %edx
        mov     $8, %r10d
        mov     $14, %eax
        syscall
        xor     %edi, %edi              # an arena; shared, so that it does not count for RLIMIT_DATA
        mov     arena_bytes(%rip), %rsi
        mov     $3, %edx
        mov     $0x21, %r10d
        mov     $-1, %r8
        xor     %r9d, %r9d
        mov     $9, %eax
        syscall
        xor     %ebp, %ebp
        cmp     $-4095, %rax
        jae     8f
        mov     %rax, %rbx              # the arena
        mov     %rax, %r15
        mov     arena_bytes(%rip), %rbp
        mov     pid(%rip), %rdi         # stop 1: the program may be written to the arena
        mov     tid(%rip), %rsi
        mov     signal(%rip), %rdx
        mov     $234, %eax
        syscall
        .globl  guest_run
guest_run:
        run
        mov     pid(%rip), %rdi         # stop 2: the results may be read, another program started at guest_run
        mov     tid(%rip), %rsi
        mov     signal(%rip), %rdx
        mov     $234, %eax
        syscall
        mov     %rbx, %rdi
        mov     %rbp, %rsi
        mov     $11, %eax
        syscall
8:      mov     pid(%rip), %rdi         # stop 3: nothing of ours is left but registers and signal mask
        mov     tid(%rip), %rsi
        mov     signal(%rip), %rdx
        mov     $234, %eax
        syscall
        mov     $2, %edi                # the tracer may have died after it had unblocked them
        lea     blocked(%rip), %rsi
        xor     %edx, %edx
        mov     $8, %r10d
        mov     $14, %eax
        syscall
        lea     flags(%rip), %rsp       # every signal is blocked: nobody pushes here
        popf
        mov     stack(%rip), %rsp
        mov     $2, %edi
        lea     sigmask(%rip), %rsi
        mov     $0, %edx                # not xor: the flags are the task's again
        mov     $8, %r10d
        mov     $14, %eax
        syscall
        mov     regs+0(%rip), %r15
        mov     regs+8(%rip), %r14
        mov     regs+16(%rip), %r13
        mov     regs+24(%rip), %r12
        mov     regs+32(%rip), %rbp
        mov     regs+40(%rip), %rbx
        mov     regs+48(%rip), %r11
        mov     regs+56(%rip), %r10
        mov     regs+64(%rip), %r9
        mov     regs+72(%rip), %r8
        mov     regs+80(%rip), %rax
        mov     regs+88(%rip), %rcx
        mov     regs+96(%rip), %rdx
        mov     regs+104(%rip), %rsi
        mov     regs+112(%rip), %rdi
        jmp     *ip(%rip)
        .balign 8
        .globl  frame
frame:                                  # the words that follow the code
        .set    pid, frame
        .set    tid, frame + 8
        .set    signal, frame + 16
        .set    arena_bytes, frame + 24
        .set    sigmask, frame + 32
        .set    flags, frame + 40
        .set    stack, frame + 48
        .set    ip, frame + 56
        .set    blocked, frame + 64
        .set    regs, frame + 72
guest_end:

# The init of a pid namespace of ours: it runs a program, then reaps whoever ends, and ends as the process %rbx does: the
# kernel kills the rest then. %r12: 8 bytes for statuses; %r13, %r14: what to unmap first, if anything.
        .globl  init_start, init_end
init_start:
        run
        mov     %r13, %rdi
        mov     %r14, %rsi
        mov     $11, %eax               # munmap
        syscall
1:      mov     $-1, %rdi
        mov     %r12, %rsi
        mov     $0x40000000, %edx       # __WALL
        xor     %r10d, %r10d
        mov     $61, %eax               # wait4
        syscall
        cmp     $-4, %rax               # EINTR
        je      1b
        test    %rax, %rax
        js      3f                      # there is no child, or none any more
        cmp     %rbx, %rax
        jne     1b
        mov     (%r12), %eax
        mov     %eax, %edi
        and     $0x7f, %edi
        jz      2f
        add     $128, %edi
        jmp     4f
2:      movzbl  %ah, %edi
        jmp     4f
3:      mov     $1, %edi
4:      mov     $231, %eax              # exit_group
        syscall
        hlt
init_end:

# What earns a task each of the signals that a fault is answered with, for one that nothing else ends (machine.FAULTS).
        .globl  fault_4, fault_5, fault_7, fault_8, fault_11, fault_31, faults_end
fault_4:                                # SIGILL
        ud2
fault_5:                                # SIGTRAP
        int3
fault_7:                                # SIGBUS: no address at all, in the stack segment
        movabs  $0x8000000000000000, %rbp
        mov     (%rbp), %eax
fault_8:                                # SIGFPE
        xor     %ecx, %ecx
        div     %ecx
fault_11:                               # SIGSEGV
        hlt
fault_31:                               # SIGSYS: calls are to be dispatched by then (prctl PR_SET_SYSCALL_USER_DISPATCH)
        syscall
faults_end:

# In ourselves, as a function of C: from the record in %rdi on; gives the one where it has ended or failed.
        .globl  own_start, own_end
own_start:
        push    %r15
        mov     %rdi, %r15
        run
        mov     %r15, %rax
        pop     %r15
        ret
own_end:
