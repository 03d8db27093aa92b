// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// Counts packets. Made for bpftool, which takes programs from ELF files; it
// needs no headers.

#define SEC(name) __attribute__((section(name), used))

enum { ARRAY = 2, XDP_PASS = 2 };

struct {
	int (*type)[ARRAY];
	int (*max_entries)[1];
	unsigned int *key;
	unsigned long long *value;
} packets SEC(".maps");

static void *(*const map_lookup_elem)(void *map, const void *key) = (void *)1;

SEC("xdp")
int count(void *context)
{
	unsigned int key = 0;
	unsigned long long *value = map_lookup_elem(&packets, &key);

	if (value)
		__sync_fetch_and_add(value, 1);
	return XDP_PASS;
}
