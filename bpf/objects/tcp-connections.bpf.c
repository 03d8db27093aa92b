// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// TCP connections: who with whom, how many bytes, for how long. Addresses of
// IPv4 are written as those of IPv6 that stand for them.

#include "common.h"

struct in6_addr {
	__u8 bytes[16];
};

enum tcp_state {
	TCP_ESTABLISHED = 1,
	TCP_SYN_SENT,
	TCP_SYN_RECV,
	TCP_FIN_WAIT1,
	TCP_FIN_WAIT2,
	TCP_TIME_WAIT,
	TCP_CLOSE,
	TCP_CLOSE_WAIT,
	TCP_LAST_ACK,
	TCP_LISTEN,
	TCP_CLOSING,
	TCP_NEW_SYN_RECV,
};

enum tcp_role { TCP_CLIENT, TCP_SERVER };

struct connection {
	struct in6_addr local;
	struct in6_addr remote;
	__u16 local_port;
	__be16 remote_port;
	__u32 network; // the inode of the network namespace
};

struct connection_state {
	enum tcp_state state; // the bytes are those at its beginning
	enum tcp_role role;
	__u32 process; // of a client, the one that connected; else 0
	char command[16];
	__u64 lifetime_ns; // 0 while it lives
	__u64 sent_bytes;
	__u64 received_bytes;
};

// The open connections, and those that were closed of late.
MAP(LRU_HASH, 16384, struct connection, struct connection_state) connections SEC(".maps");

struct closed_connection {
	struct connection connection;
	struct connection_state state;
};

// Of struct closed_connection.
RING(256 * 1024) closed SEC(".maps");

struct service {
	enum tcp_role role;
	__u32 port; // the server's
};

struct service_total {
	counter closed; // connections
	counter lost;	// those that found no room in the ring buffer
	counter sent_bytes;
	counter received_bytes;
	struct log2_histogram lifetime_ns;
};

// Closed connections by the service that they were for.
MAP(LRU_PERCPU_HASH, 1024, struct service, struct service_total) services SEC(".maps");

// What is known of a socket before it has both ports.
struct opening {
	__u64 since; // 0: not yet established
	__u32 process;
	enum tcp_role role;
	char command[16];
};

MAP(LRU_HASH, 16384, void *, struct opening) openings SEC(".maps");

static const struct service_total nothing;

struct ns_common {
	__u32 inum;
} CORE;

struct net {
	struct ns_common ns;
} CORE;

typedef struct {
	struct net *net;
} CORE possible_net_t;

struct sock_common {
	unsigned short skc_family;
	__be16 skc_dport;
	__u32 skc_daddr;
	__u32 skc_rcv_saddr;
	possible_net_t skc_net;
	unsigned long skc_flags;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
} CORE;

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
} CORE;

struct inet_sock {
	__be16 inet_sport;
} CORE;

struct tcp_sock {
	__u64 bytes_received;
	__u64 bytes_sent;
	__u64 bytes_retrans;
} CORE;

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define SOCK_DONE 1 // of enum sock_flags: a FIN came

INLINE __u16 swap(__u16 v)
{
	return v << 8 | v >> 8;
}

INLINE void map_v4(struct in6_addr *to, __u32 address)
{
	to->bytes[10] = to->bytes[11] = 0xff;
	__builtin_memcpy(to->bytes + 12, &address, 4);
}

INLINE int describe(struct connection *c, struct sock *sk)
{
	struct net *net = READ(sk, __sk_common.skc_net.net);

	switch (READ(sk, __sk_common.skc_family)) {
	case AF_INET:
		map_v4(&c->local, READ(sk, __sk_common.skc_rcv_saddr));
		map_v4(&c->remote, READ(sk, __sk_common.skc_daddr));
		break;
	case AF_INET6:
		c->local = READ(sk, __sk_common.skc_v6_rcv_saddr);
		c->remote = READ(sk, __sk_common.skc_v6_daddr);
		break;
	default:
		return -1;
	}
	c->local_port = swap(READ((struct inet_sock *)sk, inet_sport));
	c->remote_port = READ(sk, __sk_common.skc_dport);
	c->network = READ(net, ns.inum);
	return 0;
}

INLINE void open(struct sock *sk, enum tcp_role role)
{
	struct opening o = {.role = role};

	// A server's end is made when a packet comes, in whatever process that
	// interrupts.
	if (role == TCP_CLIENT) {
		o.process = get_pid_tgid() >> 32;
		get_comm(o.command, sizeof(o.command));
	}
	map_update(&openings, &sk, &o, ANY);
}

RECORD void fill(struct closed_connection *record, struct connection *c, struct connection_state *s)
{
	record->connection = *c;
	record->state = *s;
}

INLINE void finish(struct connection *c, struct connection_state *s)
{
	struct service key = {.role = s->role, .port = s->role == TCP_CLIENT ? swap(c->remote_port) : c->local_port};
	struct service_total *total = map_lookup(&services, &key);
	struct closed_connection *record;

	record = ringbuf_reserve(&closed, sizeof(*record), 0);
	if (record) {
		fill(record, c, s);
		ringbuf_submit(record, 0);
	}
	if (!total) {
		map_update(&services, &key, &nothing, NOEXIST);
		total = map_lookup(&services, &key);
	}
	if (!total)
		return;
	total->closed++;
	total->lost += !record;
	total->sent_bytes += s->sent_bytes;
	total->received_bytes += s->received_bytes;
	observe(&total->lifetime_ns, s->lifetime_ns);
}

SEC("raw_tp/inet_sock_set_state")
int set_state(__u64 *arguments) // struct sock *, int old, int new
{
	struct sock *sk = (void *)arguments[0];
	struct tcp_sock *tcp = (void *)sk;
	int state = arguments[2];
	struct connection_state s = {};
	struct connection c = {};
	struct opening *o;

	if (READ(sk, sk_protocol) != IPPROTO_TCP)
		return 0;
	if (state == TCP_SYN_SENT) {
		open(sk, TCP_CLIENT);
		return 0;
	}
	if (state == TCP_ESTABLISHED && (int)arguments[1] == TCP_SYN_RECV)
		open(sk, TCP_SERVER);
	o = map_lookup(&openings, &sk);
	if (!o)
		return 0;
	if (state == TCP_ESTABLISHED)
		o->since = ktime();
	if (o->since && !describe(&c, sk)) {
		s.state = state;
		s.role = o->role;
		s.process = o->process;
		__builtin_memcpy(s.command, o->command, sizeof(s.command));
		s.sent_bytes = READ(tcp, bytes_sent) - READ(tcp, bytes_retrans);
		// The kernel counts the FIN as a byte.
		s.received_bytes = READ(tcp, bytes_received) - (READ(sk, __sk_common.skc_flags) >> SOCK_DONE & 1);
		if (state == TCP_CLOSE) {
			s.lifetime_ns = ktime() - o->since;
			finish(&c, &s);
		}
		map_update(&connections, &c, &s, ANY);
	}
	if (state == TCP_CLOSE)
		map_delete(&openings, &sk);
	return 0;
}
