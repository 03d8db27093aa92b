/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

/*
 * What the shipped objects need of the kernel, of libbpf's conventions for
 * maps, and of the names by which people are shown figures. Only those members
 * are declared that are read: CO-RE finds them wherever they are.
 */

#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef long long __s64;
/* Shown in the host's order. */
typedef __u16 __be16;

/* A figure that only grows: a counter of OpenMetrics. */
typedef __u64 counter;

/*
 * How often a figure was between 2^i and 2^(i+1)-1, in slots[i]; what is less
 * than 1 is in the first, and what is too large in the last.
 */
#define SLOTS 36
struct log2_histogram {
	counter slots[SLOTS];
	counter sum;
};

#define SEC(name) __attribute__((section(name), used))
#define CORE __attribute__((preserve_access_index))
#define INLINE static inline __attribute__((always_inline))

/*
 * For a function that takes a ring buffer's record. The map's own definition
 * can't name the type, since the kernel wants none; that of a function that is
 * called keeps it in the BTF.
 */
#define RECORD static __attribute__((noinline))

#define MAP(kind, entries, key_type, value_type)                              \
	struct {                                                              \
		int (*type)[kind];                                            \
		int (*max_entries)[entries];                                  \
		key_type *key;                                                \
		value_type *value;                                            \
	}

#define RING(bytes)                                                           \
	struct {                                                              \
		int (*type)[RINGBUF];                                         \
		int (*max_entries)[bytes];                                    \
	}

/* enum bpf_map_type */
#define HASH 1
#define PERCPU_HASH 5
#define LRU_HASH 9
#define LRU_PERCPU_HASH 10
#define RINGBUF 27

#define ANY 0	      /* BPF_ANY */
#define NOEXIST 1     /* BPF_NOEXIST */

/* enum bpf_func_id */
static void *(*const map_lookup)(void *map, const void *key) = (void *)1;
static long (*const map_update)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static long (*const map_delete)(void *map, const void *key) = (void *)3;
static __u64 (*const get_pid_tgid)(void) = (void *)14;
static __u64 (*const get_uid_gid)(void) = (void *)15;
static long (*const get_comm)(void *to, __u32 size) = (void *)16;
static long (*const read_user)(void *to, __u32 size, const void *from) = (void *)112;
static long (*const read_kernel)(void *to, __u32 size, const void *from) = (void *)113;
static long (*const read_kernel_str)(void *to, __u32 size, const void *from) = (void *)115;
static __u64 (*const ktime)(void) = (void *)5;
static void *(*const ringbuf_reserve)(void *map, __u64 size, __u64 flags) = (void *)131;
static void (*const ringbuf_submit)(void *record, __u64 flags) = (void *)132;
static void *(*const current_task)(void) = (void *)35;

/* Reads from->field of a kernel structure, 0 if it can't be read. */
#define READ(from, field)                                                     \
	({                                                                    \
		__typeof__((from)->field) value_;                             \
		__builtin_memset(&value_, 0, sizeof(value_));                 \
		read_kernel(&value_, sizeof(value_), &(from)->field);         \
		value_;                                                       \
	})

/* BPF has no instruction for it before version 4, which old kernels lack. */
INLINE __u32 log2(__u64 v)
{
	__u32 r = 0;

	if (v >> 32) { v >>= 32; r += 32; }
	if (v >> 16) { v >>= 16; r += 16; }
	if (v >> 8) { v >>= 8; r += 8; }
	if (v >> 4) { v >>= 4; r += 4; }
	if (v >> 2) { v >>= 2; r += 2; }
	return r + (v >> 1);
}

/* Counts a figure, in a histogram that no other processor writes. */
INLINE void observe(struct log2_histogram *histogram, __u64 figure)
{
	__u32 slot = log2(figure);

	if (slot >= SLOTS)
		slot = SLOTS - 1;
	histogram->slots[slot]++;
	histogram->sum += figure;
}

char dual_license[] SEC("license") = "Dual BSD/GPL";
