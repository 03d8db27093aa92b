// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// The verifier refuses it: it reads through a number.

#define SEC(name) __attribute__((section(name), used))

SEC("raw_tp/sys_enter") int on_bad(unsigned long long *context) { return *(volatile int *)context[1]; }

char _license[] SEC("license") = "GPL";
