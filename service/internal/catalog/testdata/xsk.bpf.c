// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// Redirects packets to the socket of their queue, if there is one.

#define SEC(name) __attribute__((section(name), used))

enum { XSKMAP = 17, XDP_PASS = 2 };

struct context {
	unsigned int data, data_end, data_meta, ingress_ifindex, rx_queue_index;
};

struct {
	int (*type)[XSKMAP];
	int (*max_entries)[4];
	unsigned int *key;
	unsigned int *value;
} sockets SEC(".maps");

static long (*const redirect_map)(void *map, unsigned long long key, unsigned long long flags) = (void *)51;

SEC("xdp") int on_packet(struct context *context)
{
	return redirect_map(&sockets, context->rx_queue_index, XDP_PASS);
}

char _license[] SEC("license") = "GPL";
