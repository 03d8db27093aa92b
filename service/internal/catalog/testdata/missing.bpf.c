// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// It reads a field of a type that no kernel has.

#define SEC(name) __attribute__((section(name), used))

struct no_such_type {
	int field;
} __attribute__((preserve_access_index));

static long (*const probe_read_kernel)(void *to, unsigned int size, const void *from) = (void *)113;

SEC("raw_tp/sys_enter") int on_missing(unsigned long long *context)
{
	struct no_such_type *t = (void *)context[0];
	int value = 0;

	probe_read_kernel(&value, sizeof(value), &t->field);
	return value;
}

char _license[] SEC("license") = "GPL";
