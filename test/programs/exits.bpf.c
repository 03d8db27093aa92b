// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// Counts the threads that end. Little work for the verifier, so that what else
// loading costs shows. It needs no headers.

#define SEC(name) __attribute__((section(name), used))

enum { ARRAY = 2 };

struct {
	int (*type)[ARRAY];
	int (*max_entries)[1];
	unsigned int *key;
	unsigned long long *value;
} exits SEC(".maps");

static void *(*const map_lookup_elem)(void *map, const void *key) = (void *)1;

SEC("raw_tp/sched_process_exit")
int count(void *context)
{
	unsigned int key = 0;
	unsigned long long *value = map_lookup_elem(&exits, &key);

	if (value)
		__sync_fetch_and_add(value, 1);
	return 0;
}
