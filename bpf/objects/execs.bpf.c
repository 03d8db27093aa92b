// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// The programs that are executed.

#include "common.h"

struct exec_event {
	__u64 boot_time_ns; // CLOCK_MONOTONIC
	__u32 process;
	__u32 parent;
	__u32 uid;
	__u32 gid;
	char command[16];
	char file[256];
	char arguments[256]; // with blanks between them; perhaps cut off
};

// Of struct exec_event.
RING(256 * 1024) events SEC(".maps");

struct command {
	__u32 uid;
	char command[16];
};

struct command_total {
	counter execs;
};

// The commands of late, by user.
MAP(LRU_HASH, 4096, struct command, struct command_total) commands SEC(".maps");

enum exec_counter { EXECS, LOST };

struct exec_counter_key {
	enum exec_counter counter;
};

struct exec_total {
	counter count;
};

// All of them, and those that found no room in events.
MAP(PERCPU_HASH, 2, struct exec_counter_key, struct exec_total) totals SEC(".maps");

struct mm_struct {
	unsigned long arg_start;
	unsigned long arg_end;
} CORE;

struct task_struct {
	int tgid;
	struct task_struct *real_parent;
	struct mm_struct *mm;
} CORE;

struct linux_binprm {
	const char *filename;
} CORE;

INLINE void count(enum exec_counter counter)
{
	struct exec_counter_key key = {counter};
	struct exec_total *total = map_lookup(&totals, &key);
	struct exec_total one = {1};

	if (total)
		total->count++;
	else if (map_update(&totals, &key, &one, NOEXIST)) {
		// Another processor was first.
		total = map_lookup(&totals, &key);
		if (total)
			total->count++;
	}
}

RECORD void read_arguments(struct exec_event *event, struct task_struct *task)
{
	struct mm_struct *mm = READ(task, mm);
	unsigned long start = READ(mm, arg_start);
	unsigned long size = READ(mm, arg_end) - start;

	if (size > sizeof(event->arguments))
		size = sizeof(event->arguments);
	__builtin_memset(event->arguments, 0, sizeof(event->arguments));
	// What isn't in memory can't be read here.
	if (!size || read_user(event->arguments, size, (void *)start))
		return;
	for (unsigned int i = 0; i + 1 < sizeof(event->arguments); i++)
		if (i + 1 < size && !event->arguments[i])
			event->arguments[i] = ' ';
	event->arguments[sizeof(event->arguments) - 1] = 0;
}

SEC("raw_tp/sched_process_exec")
int executed(__u64 *arguments) // struct task_struct *, pid_t old, struct linux_binprm *
{
	struct task_struct *task = (void *)arguments[0];
	struct linux_binprm *program = (void *)arguments[2];
	struct command command = {.uid = get_uid_gid()};
	struct command_total *total, one = {1};
	struct exec_event *event;

	count(EXECS);
	get_comm(command.command, sizeof(command.command));
	total = map_lookup(&commands, &command);
	if (!total && map_update(&commands, &command, &one, NOEXIST))
		total = map_lookup(&commands, &command);
	if (total)
		__sync_fetch_and_add(&total->execs, 1);

	event = ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		count(LOST);
		return 0;
	}
	event->boot_time_ns = ktime();
	event->process = get_pid_tgid() >> 32;
	event->parent = READ(READ(task, real_parent), tgid);
	event->uid = command.uid;
	event->gid = get_uid_gid() >> 32;
	__builtin_memcpy(event->command, command.command, sizeof(event->command));
	__builtin_memset(event->file, 0, sizeof(event->file));
	read_kernel_str(event->file, sizeof(event->file), READ(program, filename));
	read_arguments(event, task);
	ringbuf_submit(event, 0);
	return 0;
}
