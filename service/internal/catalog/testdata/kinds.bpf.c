// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// One program of each kind that can be attached on every kernel, and a map of
// each kind of access. It needs no headers.

#define SEC(name) __attribute__((section(name), used))

enum { HASH = 1, ARRAY = 2, RINGBUF = 27 };

typedef unsigned int u32;
typedef unsigned long long u64;

struct event {
	u32 kind;
	char label[12];
};

enum kind { RAW = 1, TRACEPOINT, UPROBE, XDP, TCX, CGROUP, SAMPLE, ITER };

struct {
	int (*type)[HASH];
	int (*max_entries)[64];
	enum kind *key;
	u64 *value;
} hits SEC(".maps");

struct {
	int (*type)[RINGBUF];
	int (*max_entries)[4096];
	struct event *value;
} events SEC(".maps");

const volatile u32 step = 1;
const volatile char label[12] = "kinds";
const volatile _Bool quiet = 0;
const volatile enum kind only = 0;
u64 total;

static void *(*const map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*const ringbuf_output)(void *ring, void *data, u64 size, u64 flags) = (void *)130;

static inline __attribute__((always_inline)) void hit(u32 kind)
{
	u64 *count, one = step;
	struct event e = { .kind = kind };

	if (quiet || (only && only != kind))
		return;
	__sync_fetch_and_add(&total, 1);
	count = map_lookup_elem(&hits, &kind);
	if (count)
		__sync_fetch_and_add(count, step);
	else
		map_update_elem(&hits, &kind, &one, 0);
#pragma unroll
	for (int i = 0; i < 12; i++)
		e.label[i] = label[i];
	ringbuf_output(&events, &e, sizeof(e), 0);
}

SEC("raw_tp/sys_enter") int on_raw(void *context) { hit(RAW); return 0; }
SEC("tp/raw_syscalls/sys_enter") int on_tracepoint(void *context) { hit(TRACEPOINT); return 0; }
SEC("uprobe") int on_uprobe(void *context) { hit(UPROBE); return 0; }
SEC("xdp") int on_xdp(void *context) { hit(XDP); return 2; }
SEC("tcx/ingress") int on_tcx(void *context) { hit(TCX); return -1; }
SEC("cgroup_skb/egress") int on_cgroup(void *context) { hit(CGROUP); return 1; }
SEC("perf_event") int on_sample(void *context) { hit(SAMPLE); return 0; }
SEC("syscall") int on_run(void *context) { hit(ITER); return 7; }

char _license[] SEC("license") = "GPL";
