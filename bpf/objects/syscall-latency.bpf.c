// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// How long system calls take, and how many fail. 32-bit ones, whose numbers
// mean something else, are left out.

#include "common.h"

#if defined(ARCH_amd64)
#include "syscalls_amd64.h"
#elif defined(ARCH_arm64)
#include "syscalls_arm64.h"
#endif

struct syscall_key {
	enum syscall syscall;
};

struct syscall_latency {
	counter errors;
	struct log2_histogram duration_ns;
};

// There are fewer than 512 system calls on every architecture.
MAP(PERCPU_HASH, 512, struct syscall_key, struct syscall_latency) syscalls SEC(".maps");

// The system call that a thread is in. Task storage would go with the thread by
// itself, but Linux 7.2 gives none here.
struct call {
	__u64 since; // 0: none
	__u32 number;
};

// Threads beyond these aren't seen.
MAP(HASH, 65536, __u32, struct call) calls SEC(".maps");

// What a system call starts with: the stack has no room for it.
static const struct syscall_latency nothing;

struct thread_info___x86 {
	unsigned int status;
} CORE;

struct task_struct___x86 {
	struct thread_info___x86 thread_info;
} CORE;

struct thread_info___arm64 {
	unsigned long flags;
} CORE;

struct task_struct___arm64 {
	struct thread_info___arm64 thread_info;
} CORE;

// Says whether the current thread makes a 32-bit system call.
INLINE int compat(void *task, long number)
{
#if defined(ARCH_amd64)
	struct task_struct___x86 *t = task;

	// TS_COMPAT of asm/thread_info.h, __X32_SYSCALL_BIT of asm/unistd.h
	return number & 0x40000000 || READ(t, thread_info.status) & 2;
#elif defined(ARCH_arm64)
	struct task_struct___arm64 *t = task;

	(void)number;
	return READ(t, thread_info.flags) & 1 << 22; // TIF_32BIT of asm/thread_info.h
#endif
}

SEC("raw_tp/sys_enter")
int enter(__u64 *arguments) // struct pt_regs *, long number
{
	__u32 thread = get_pid_tgid();
	struct call started = {};
	struct call *call;

	if ((long)arguments[1] < 0 || compat(current_task(), arguments[1]))
		return 0;
	call = map_lookup(&calls, &thread);
	if (!call) {
		map_update(&calls, &thread, &started, NOEXIST);
		call = map_lookup(&calls, &thread);
	}
	if (call) {
		call->number = arguments[1];
		call->since = ktime();
	}
	return 0;
}

// Some system calls never come back.
SEC("raw_tp/sched_process_exit")
int forget(void *context)
{
	__u32 thread = get_pid_tgid();

	map_delete(&calls, &thread);
	return 0;
}

SEC("raw_tp/sys_exit")
int leave(__u64 *arguments) // struct pt_regs *, long result
{
	__u32 thread = get_pid_tgid();
	struct call *call = map_lookup(&calls, &thread);
	struct syscall_latency *latency;
	struct syscall_key key = {};

	if (!call || !call->since)
		return 0;
	key.syscall = call->number;
	latency = map_lookup(&syscalls, &key);
	if (!latency) {
		map_update(&syscalls, &key, &nothing, NOEXIST);
		latency = map_lookup(&syscalls, &key);
	}
	if (latency) {
		observe(&latency->duration_ns, ktime() - call->since);
		if ((long)arguments[1] < 0 && (long)arguments[1] >= -4095)
			latency->errors++;
	}
	call->since = 0;
	return 0;
}
