// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// The kinds of programs that need kprobes and trampolines. It needs no headers.

#define SEC(name) __attribute__((section(name), used))

enum { HASH = 1 };

typedef unsigned int u32;
typedef unsigned long long u64;

struct {
	int (*type)[HASH];
	int (*max_entries)[64];
	u32 *key;
	u64 *value;
} hits SEC(".maps");

static void *(*const map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;

static inline __attribute__((always_inline)) void hit(u32 kind)
{
	u64 *count = map_lookup_elem(&hits, &kind), one = 1;

	if (count)
		__sync_fetch_and_add(count, 1);
	else
		map_update_elem(&hits, &kind, &one, 0);
}

SEC("kprobe/do_nanosleep") int on_kprobe(void *context) { hit(1); return 0; }
SEC("kretprobe/do_nanosleep") int on_kretprobe(void *context) { hit(2); return 0; }
SEC("kprobe.multi/do_nanosleep") int on_multi(void *context) { hit(3); return 0; }
SEC("fentry/do_nanosleep") int on_fentry(void *context) { hit(4); return 0; }
SEC("fexit/do_nanosleep") int on_fexit(void *context) { hit(5); return 0; }
SEC("tp_btf/sys_enter") int on_btf(void *context) { hit(6); return 0; }
SEC("iter/task") int on_iter(void *context) { return 0; }

char _license[] SEC("license") = "GPL";
