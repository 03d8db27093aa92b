// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

// The guard: LSM programs that hold a grant to its profile. One object serves
// Linux 6.12 and later.
//
// What is refused is decided from what the kernel itself holds (a token, a
// program, a link), never from a descriptor's number, which another thread can
// swap. Only LINK_UPDATE, PROG_ATTACH, PROG_DETACH and PROG_TEST_RUN give no
// such thing to a hook: these are refused by who calls.
//
// Coarser than a profile's words, therefore, for who is confined:
// - LINK_UPDATE only by a thread whose descriptors no other can swap (unshare(2),
//   CLONE_FILES), else none: a link that somebody handed out may be to anything.
// - PROG_ATTACH and PROG_DETACH not to own cgroups either. They can put a program
//   in the place of one that root has attached there, or take that away. Links
//   can't.
// - PROG_TEST_RUN, with programs for interfaces, of any type only in an own network
//   namespace: it may send packets.
// - PROG_ATTACH to interfaces of an own network namespace only for tcx and the flow
//   dissector.
// - With Interfaces=own no devmap: it takes the devices of whoever updates it.
// Nothing holds what netlink attaches in an own network namespace, also with
// Interfaces=none.

#include "kernel.h"

char guard_license[] SEC("license") = "Dual BSD/GPL";

// The kinds of targets of [Attach], and how far it lets a grant reach.
enum { INTERFACES, CGROUPS, PROCESSES, KINDS };
enum { REACH_NONE, REACH_OWN, REACH_ANY };
enum { LIVE = 1, REVOKED };
enum { KFUNCS_ANY, KFUNCS_LISTED, KFUNCS_NOT_LISTED, MAX_KFUNCS = 128 };

// Reasons of an event.
enum reason {
	LOADED = 1,	 // a program was loaded; no denial
	LEASE,		 // the grant was revoked, or its lease has ended
	NAMESPACE,	 // a token was used outside of its user namespace
	CAPABILITY,	 // detail: the capability; said once for a grant
	HELPER,		 // detail: its number
	KFUNC,		 // detail: its BTF id
	MODULE_KFUNC,	 // detail: its BTF id in a module
	QUOTA_PROGRAMS,
	QUOTA_MAPS,
	QUOTA_MAP_BYTES,
	QUOTA_TOKENS,
	MAP_TYPE,	 // detail: a map type that is an attachment
	LINK,		 // detail: the link's type
	COMMAND,	 // detail: a bpf command; from bit 32 on the kind of target, KINDS if that isn't known
	PERF_EVENT,	 // a program for a perf event
	DESCRIPTOR,	 // a program's descriptor on its way out of the namespace
	SLIP,		 // detail: the attach type; it was attached, the process is killed
	SLIPPED_LINK,	 // detail: the link's id; the same
};

// Limits of one grant, written by the daemon.
struct grant {
	u64 deadline; // boot time, ns; 0 is none
	u64 capabilities;
	u64 helpers[4];
	u64 max_map_bytes;
	u64 kinds; // bit per kind: the profile delegates programs for such targets
	u32 max_programs, max_maps;
	u32 owner; // the uid that owns the user namespace
	struct bpf_spin_lock lock;
	u8 state;
	u8 check_helpers;
	u8 check_kfuncs;
	u8 kfunc_count;
	u8 reach[KINDS];
	u8 unused;
	u32 kfuncs[MAX_KFUNCS];
};

// What a grant, or all grants of a uid together, have now.
struct usage {
	u64 map_bytes;
	u64 second; // of the events
	u32 programs, maps, tokens;
	u32 events;
	u32 lost;   // events that weren't sent
	u32 denied; // capabilities whose denial was said
};

struct token {
	u64 grant;
	u64 namespace;
	u32 owner;
	u32 confined; // bit per kind; above them those that aren't, and those that have their own
};

struct object {
	u64 grant;
	u64 bytes;     // of a map
	u64 namespace; // of a program, else 0
	u32 owner;
	u32 id;	  // of a program that has had a descriptor, and was reported, else 0
	u32 lent; // the host's administrator has attached the program
	u32 unused;
};

struct event {
	u64 time; // boot time, ns
	u64 grant; // 0: the caller's, whichever it was
	u64 detail;
	u64 interface; // of a slip: where a program was attached to
	u32 network;   // the number of its network namespace, else 0
	u32 program;   // its id
	u32 reason;
	u32 pid, uid;
	u32 owner;
	u32 program_type, attach_type, instructions;
	char comm[16];
	char name[16];
	u8 tag[8];
	u32 unused;
};

// A link that is attached beyond its grant's reach.
struct slip {
	u64 grant;
	u32 owner;
	u32 link; // its id
	u32 program_type, attach_type;
};

// What was done with a grant whose needs somebody wants to know.
struct lesson {
	u64 maps, programs, attachments; // bit per type
	u64 helpers[4];
	// Of programs that aren't so short that a library may just try the kernel out.
	u64 long_programs, long_attachments;
	u64 long_helpers[4];
	u64 map_bytes; // the most that there was
	u32 programs_at_once, maps_at_once;
	u32 commands; // bit per command that looks at a token
	u8 reach[KINDS];
	u8 module_kfuncs; // there were some
	u32 kfunc_count;  // MAX_KFUNCS if there were more
	u32 kfuncs[MAX_KFUNCS];
	u32 unused;
};

// For bpf2go.
struct lesson *unused_lesson __attribute__((unused));
struct event *unused_event __attribute__((unused));
struct slip *unused_slip __attribute__((unused));

// What all grants of a uid may have together.
const volatile u32 user_programs = 8192;
const volatile u32 user_maps = 32768;
const volatile u32 user_tokens = 16384;
const volatile u64 user_map_bytes = 4ULL << 30;
const volatile u32 grant_tokens = 4096;
const volatile u32 user_events = 100; // in a second
const volatile u32 cpus = 1;

// By the grant's number.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, u64);
	__type(value, struct grant);
} grants SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, u64);
	__type(value, struct usage);
} usages SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 10);
	__type(key, u64);
	__type(value, struct lesson);
} lessons SEC(".maps");

// By uid.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, u32);
	__type(value, struct usage);
} users SEC(".maps");

// How many of a uid's lost events the daemon has told of, which is all it is for.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, u32);
	__type(value, u32);
} told SEC(".maps");

// By the kernel's pointer: a program's is its aux, as the program itself may be
// moved while it is verified and compiled.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 20);
	__type(key, u64);
	__type(value, struct token);
} tokens SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 20);
	__type(key, u64);
	__type(value, struct object);
} objects SEC(".maps");

// The grant of a BPF file system, at its root directory. It goes with the
// inode, so no number can be taken for an older one.
struct {
	__uint(type, BPF_MAP_TYPE_INODE_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, u64);
} roots SEC(".maps");

// How many tokens confine a user namespace or a uid, by kind and hash, how many
// let them reach anything, and how many their own. There is nothing to be removed, so nothing to
// race for; two hashes that both collide confine a stranger, in what
// confined() is asked for.
#define SLOTS (1 << 16)
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 3 * KINDS * SLOTS);
	__type(key, u32);
	__type(value, u32);
} confinements SEC(".maps");

// Ids of maps that nobody but the host's administrator may write.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, u32);
	__type(value, u32);
} protected SEC(".maps");

// How much there is of what most calls have nothing to do with, so that these
// needn't look for it: lessons, and protected maps, or more.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, u32);
	__type(value, u32);
} counts SEC(".maps");
enum { LESSONS, PROTECTED };

static always_inline bool any(u32 what)
{
	u32 *count = bpf_map_lookup_elem(&counts, &what);

	return count && *count;
}

// What a task that makes a link has to do with it.
enum { UNSEEN = 1, REFUSED };
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, u32);
} linking SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

// Opening this map by its id shows whether the guard's hooks are called.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} canary SEC(".maps");

const volatile u32 canary_id;

static always_inline struct cred *credentials(void)
{
	return bpf_get_current_task_btf()->cred;
}

#define CAP_SYS_ADMIN (1ULL << 21)
#define CAP_BPF (1ULL << 39)

// privileged says whether the caller could have loaded and attached programs on
// the host without any grant.
static always_inline bool privileged(void)
{
	struct cred *cred = credentials();

	return cred->user_ns->level == 0 && cred->cap_effective.val & (CAP_SYS_ADMIN | CAP_BPF);
}

#define MAX_DEPTH 33 // of user namespaces (kernel/user_namespace.c)

// within says whether a user namespace is another one or below it.
static always_inline bool within(struct user_namespace *ns, u64 top)
{
	for (int i = 0; i < MAX_DEPTH && ns; i++) {
		if ((u64)ns == top)
			return true;
		ns = READ(ns, parent);
	}
	return false;
}

static always_inline struct event *new_event(u64 grant, u32 owner, u32 reason, u64 detail)
{
	struct usage *user = bpf_map_lookup_elem(&users, &owner);
	u64 now = bpf_ktime_get_boot_ns();
	struct event *e;

	// Nobody's events may drown another's.
	if (!user)
		return 0;
	if (user->second != now >> 30) {
		user->second = now >> 30;
		user->events = 0;
	}
	if (__sync_fetch_and_add(&user->events, 1) >= user_events ||
	    !(e = bpf_ringbuf_reserve(&events, sizeof(*e), 0))) {
		__sync_fetch_and_add(&user->lost, 1);
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->time = now;
	e->grant = grant;
	e->owner = owner;
	e->reason = reason;
	e->detail = detail;
	e->pid = bpf_get_current_pid_tgid() >> 32;
	e->uid = credentials()->uid.val;
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	return e;
}

static always_inline void describe(struct event *e, struct bpf_prog *prog)
{
	e->program_type = prog->type;
	e->attach_type = prog->expected_attach_type;
	e->instructions = prog->len;
	e->program = prog->aux->id;
	bpf_probe_read_kernel(e->tag, sizeof(e->tag), prog->tag);
	bpf_probe_read_kernel(e->name, sizeof(e->name), prog->aux->name);
}

// refuse says why something is refused, and gives the error for it.
static __attribute__((noinline)) int refuse(u64 grant, u32 owner, u32 reason, u64 detail)
{
	struct event *e = new_event(grant, owner, reason, detail);

	if (e)
		bpf_ringbuf_submit(e, 0);
	return -EPERM;
}

static always_inline int refuse_program(u64 grant, u32 owner, u32 reason, u64 detail, struct bpf_prog *prog)
{
	struct event *e = new_event(grant, owner, reason, detail);

	if (e) {
		describe(e, prog);
		bpf_ringbuf_submit(e, 0);
	}
	return -EPERM;
}

static always_inline bool live(struct grant *g)
{
	return g->state == LIVE && (!g->deadline || bpf_ktime_get_boot_ns() < g->deadline);
}

// token_of returns what is known of a token, or null if it isn't the broker's.
static always_inline struct token *token_of(struct bpf_token *token)
{
	u64 key = (u64)token;

	return token ? bpf_map_lookup_elem(&tokens, &key) : 0;
}

// Tokens, namespaces and users that are confined.

static always_inline u32 *slot(u64 key, u32 kind, u64 factor)
{
	u32 index = kind * SLOTS + (key * factor >> 48);

	return bpf_map_lookup_elem(&confinements, &index);
}

#define FIRST 0x9e3779b97f4a7c15ULL
#define SECOND 0xc2b2ae3d27d4eb4fULL

static always_inline void count_slot(u64 key, u32 kind, u64 factor, u32 change)
{
	u32 *n = slot(key, kind, factor);

	if (n)
		__sync_fetch_and_add(n, change);
}

static always_inline void count_confinement(const struct token *t, u32 change)
{
	for (u32 kind = 0; kind < 3 * KINDS; kind++) {
		if (!(t->confined & 1 << kind))
			continue;
		count_slot(t->namespace, kind, FIRST, change);
		count_slot(t->namespace, kind, SECOND, change);
		count_slot(t->owner, kind, FIRST, change);
		count_slot(t->owner, kind, SECOND, change);
	}
}

static always_inline bool has_tokens(u64 key, u32 kind)
{
	u32 *first = slot(key, kind, FIRST), *second = slot(key, kind, SECOND);

	return first && second && *first && *second;
}

static always_inline bool is_confined(u64 key, u32 kind)
{
	return has_tokens(key, kind) && !has_tokens(key, kind + KINDS);
}

// confined says whether the caller is in a granted user namespace, or is the
// user that owns one, and must not reach targets of the kind; owner is that
// user then. Root's other containers aren't its grants' business.
static __attribute__((noinline)) bool confined(u32 kind, u32 *owner)
{
	struct cred *cred = credentials();
	// The verifier lets nobody calculate with a pointer that it knows.
	struct user_namespace *ns = READ(cred, user_ns);
	u32 uid;

	if (!owner || privileged())
		return false;
	for (int i = 0; i < MAX_DEPTH && ns; i++) {
		*owner = READ(ns, owner.val);
		if (is_confined((u64)ns, kind) || (*owner && is_confined(*owner, kind)))
			return true;
		ns = READ(ns, parent);
	}
	uid = *owner = cred->uid.val;
	if (uid && is_confined(uid, kind))
		return true;
	uid = *owner = cred->euid.val;
	return uid && is_confined(uid, kind);
}

// has_own says whether a grant lets the caller's user namespace, or who owns
// that, reach its own targets of the kind.
static always_inline bool has_own(u32 kind)
{
	struct user_namespace *ns = READ(credentials(), user_ns);

	return has_tokens((u64)ns, kind + 2 * KINDS) || has_tokens(READ(ns, owner.val), kind + 2 * KINDS);
}

// in_own_network says whether the caller's network namespace belongs to its
// user namespace, which isn't the host's.
static always_inline bool in_own_network(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct user_namespace *own = task->cred->user_ns;

	return own->level && within(task->nsproxy->net_ns->user_ns, (u64)own);
}

// Quotas.

static always_inline bool take(u32 *count, u32 max)
{
	if (__sync_fetch_and_add(count, 1) < max || !max)
		return true;
	__sync_fetch_and_add(count, -1);
	return false;
}

static always_inline void give_back(u32 *count)
{
	__sync_fetch_and_add(count, -1);
}

static always_inline bool take_bytes(u64 *count, u64 bytes, u64 max)
{
	if (!max) {
		__sync_fetch_and_add(count, bytes);
		return true;
	}
	// The sum of what is asked for at once must not overflow.
	if (bytes > max)
		return false;
	if (__sync_fetch_and_add(count, bytes) + bytes <= max)
		return true;
	__sync_fetch_and_add(count, -bytes);
	return false;
}

// Learning.

#define CHUNK 32
#define SHORT 8 // instructions, of a program that a library may try the kernel out with

struct scan {
	u64 grant;
	u64 *instructions;
	u32 len;
	u32 reason;
	u32 detail;
};

static always_inline struct lesson *lesson_of(u64 grant)
{
	return any(LESSONS) ? bpf_map_lookup_elem(&lessons, &grant) : 0;
}

static always_inline void learn_reach(struct lesson *l, u32 kind, bool own)
{
	u8 reach = own ? REACH_OWN : REACH_ANY;

	if (l && kind < KINDS && l->reach[kind] < reach)
		l->reach[kind] = reach;
}

// learn_call is a global function for the same reason as check_call.
__attribute__((noinline)) int learn_call(u64 grant, u64 instruction, u32 len)
{
	struct lesson *l = lesson_of(grant);
	u32 source = instruction >> 12 & 0xf;
	u32 id = instruction >> 32;

	if (!l)
		return 0;
	if (source == 0 && id < 256) {
		l->helpers[id >> 6 & 3] |= 1ULL << (id & 63);
		if (len > SHORT)
			l->long_helpers[id >> 6 & 3] |= 1ULL << (id & 63);
	}
	if (source != 2)
		return 0;
	if (instruction >> 16 & 0xffff) {
		l->module_kfuncs = 1;
		return 0;
	}
	for (u32 i = 0; i < MAX_KFUNCS; i++) {
		if (l->kfuncs[i] == id)
			return 0;
		if (i == l->kfunc_count) {
			l->kfuncs[i] = id;
			l->kfunc_count = i + 1;
			return 0;
		}
	}
	l->module_kfuncs = 1; // too many to be told
	return 0;
}

static int learn_chunk(u32 index, struct scan *s)
{
	u64 chunk[CHUNK] = {};
	u32 start = index * CHUNK, left = s->len - start;

	if (left > CHUNK)
		left = CHUNK;
	if (bpf_probe_read_kernel(chunk, left * sizeof(u64), s->instructions + start))
		return 1;
	for (u32 i = 0; i < CHUNK; i++)
		if ((chunk[i] & 0xff) == 0x85) // a call
			learn_call(s->grant, chunk[i], s->len);
	return 0;
}

// Tokens.

SEC("lsm/bpf_token_create")
int token_create(u64 *ctx)
{
	struct bpf_token *token = (void *)ctx[0];
	struct path *path = (void *)ctx[2];
	struct inode *root = path->dentry->d_inode;
	u64 key = (u64)token, *id;
	struct usage *used, *user;
	struct token t = {};
	struct grant *g;

	id = root ? bpf_inode_storage_get(&roots, root, 0, 0) : 0;
	if (!id)
		return 0;
	t.grant = *id;
	t.namespace = (u64)READ(token, userns);
	t.owner = token->userns->owner.val;
	g = bpf_map_lookup_elem(&grants, &t.grant);
	if (!g || !live(g))
		return refuse(t.grant, t.owner, LEASE, 0);
	for (u32 kind = 0; kind < KINDS; kind++) {
		if (!(g->kinds & 1 << kind))
			continue;
		t.confined |= 1 << (g->reach[kind] == REACH_ANY ? kind + KINDS : kind);
		if (g->reach[kind] == REACH_OWN)
			t.confined |= 1 << (kind + 2 * KINDS);
	}
	used = bpf_map_lookup_elem(&usages, &t.grant);
	user = bpf_map_lookup_elem(&users, &t.owner);
	if (!used || !user)
		return -EPERM;
	// While an older guard is replaced, it counts what comes first to it.
	if (bpf_map_lookup_elem(&tokens, &key))
		return 0;
	if (!take(&used->tokens, grant_tokens))
		return refuse(t.grant, t.owner, QUOTA_TOKENS, 0);
	if (!take(&user->tokens, user_tokens)) {
		give_back(&used->tokens);
		return refuse(t.grant, t.owner, QUOTA_TOKENS, 0);
	}
	if (bpf_map_update_elem(&tokens, &key, &t, BPF_NOEXIST)) {
		give_back(&used->tokens);
		give_back(&user->tokens);
		return -ENOMEM;
	}
	count_confinement(&t, 1);
	return 0;
}

SEC("lsm/bpf_token_free")
int token_free(u64 *ctx)
{
	u64 key = ctx[0];
	struct token *found = bpf_map_lookup_elem(&tokens, &key), t;
	struct usage *used, *user;

	if (!found)
		return 0;
	t = *found;
	if (bpf_map_delete_elem(&tokens, &key))
		return 0;
	count_confinement(&t, -1);
	used = bpf_map_lookup_elem(&usages, &t.grant);
	if (used)
		give_back(&used->tokens);
	user = bpf_map_lookup_elem(&users, &t.owner);
	if (user)
		give_back(&user->tokens);
	return 0;
}

// The kernel lets whoever owns the user namespace use a token from outside,
// where programs would be attached to what isn't the namespace's.
SEC("lsm/bpf_token_cmd")
int token_cmd(u64 *ctx)
{
	struct bpf_token *token = (void *)ctx[0];
	struct token *t = token_of(token);
	struct lesson *l;
	struct grant *g;

	if (!t)
		return 0;
	if ((u64)credentials()->user_ns != t->namespace)
		return refuse(t->grant, t->owner, NAMESPACE, (u32)ctx[1]);
	g = bpf_map_lookup_elem(&grants, &t->grant);
	if (!g || !live(g))
		return refuse(t->grant, t->owner, LEASE, (u32)ctx[1]);
	l = lesson_of(t->grant);
	if (l)
		l->commands |= 1 << ((u32)ctx[1] & 31);
	return 0;
}

SEC("lsm/bpf_token_capable")
int token_capable(u64 *ctx)
{
	struct bpf_token *token = (void *)ctx[0];
	u32 capability = ctx[1];
	struct token *t = token_of(token);
	struct usage *used;
	struct grant *g;
	u32 bit;

	if (!t)
		return 0;
	g = bpf_map_lookup_elem(&grants, &t->grant);
	if (g && capability < 64 && g->capabilities & 1ULL << capability)
		return 0;
	// The verifier asks for some at each load, to know what it may allow.
	used = bpf_map_lookup_elem(&usages, &t->grant);
	bit = 1 << (capability & 31);
	if (!used || used->denied & bit)
		return -EPERM;
	used->denied |= bit;
	return refuse(t->grant, t->owner, CAPABILITY, capability);
}

// Programs.

// check_call returns the reason to refuse a call, or 0: a helper's or a kfunc's,
// by the instruction's registers and offset. It is a global function, which
// the verifier looks at once and not at each call.
__attribute__((noinline)) int check_call(u64 grant, u64 instruction)
{
	struct grant *g = bpf_map_lookup_elem(&grants, &grant);
	u32 source = instruction >> 12 & 0xf;
	u32 id = instruction >> 32;
	bool listed = false;

	if (!g)
		return LEASE;
	if (source == 0) {
		if (!g->check_helpers || (id < 256 && g->helpers[id >> 6 & 3] & 1ULL << (id & 63)))
			return 0;
		return HELPER;
	}
	if (source != 2 || g->check_kfuncs == KFUNCS_ANY)
		return 0;
	// A module's ids are known to nobody when the profile is read.
	if (instruction >> 16 & 0xffff)
		return MODULE_KFUNC;
	for (u32 i = 0; i < MAX_KFUNCS && i < g->kfunc_count; i++) {
		if (g->kfuncs[i] == id) {
			listed = true;
			break;
		}
	}
	return listed == (g->check_kfuncs == KFUNCS_LISTED) ? 0 : KFUNC;
}

static int check_chunk(u32 index, struct scan *s)
{
	u64 chunk[CHUNK] = {};
	u32 start = index * CHUNK, left = s->len - start;

	if (left > CHUNK)
		left = CHUNK;
	if (bpf_probe_read_kernel(chunk, left * sizeof(u64), s->instructions + start)) {
		s->reason = HELPER;
		return 1;
	}
	for (u32 i = 0; i < CHUNK; i++) {
		u32 reason;

		if ((chunk[i] & 0xff) != 0x85) // no call
			continue;
		reason = check_call(s->grant, chunk[i]);
		if (reason) {
			s->reason = reason;
			s->detail = chunk[i] >> 32;
			return 1;
		}
	}
	return 0;
}

SEC("lsm/bpf_prog_load")
int prog_load(u64 *ctx)
{
	struct bpf_prog *prog = (void *)ctx[0];
	struct token *t = token_of(prog->aux->token);
	struct object o = {};
	u64 key = (u64)prog->aux;
	struct usage *used, *user;
	struct lesson *l;
	struct grant *g;

	if (!t)
		return 0;
	g = bpf_map_lookup_elem(&grants, &t->grant);
	if (!g || !live(g))
		return refuse(t->grant, t->owner, LEASE, 0);
	if (g->check_helpers || g->check_kfuncs) {
		struct scan s = {.grant = t->grant, .instructions = (u64 *)prog->insnsi, .len = prog->len};

		if (bpf_loop((prog->len + CHUNK - 1) / CHUNK, check_chunk, &s, 0) < 0)
			return -EPERM;
		if (s.reason)
			return refuse_program(t->grant, t->owner, s.reason, s.detail, prog);
	}
	used = bpf_map_lookup_elem(&usages, &t->grant);
	user = bpf_map_lookup_elem(&users, &t->owner);
	if (!used || !user)
		return -EPERM;
	if (bpf_map_lookup_elem(&objects, &key))
		return 0;
	o.grant = t->grant;
	o.namespace = t->namespace;
	o.owner = t->owner;
	if (!take(&used->programs, g->max_programs))
		return refuse_program(t->grant, t->owner, QUOTA_PROGRAMS, g->max_programs, prog);
	if (!take(&user->programs, user_programs)) {
		give_back(&used->programs);
		return refuse_program(t->grant, t->owner, QUOTA_PROGRAMS, user_programs, prog);
	}
	if (bpf_map_update_elem(&objects, &key, &o, BPF_NOEXIST)) {
		give_back(&used->programs);
		give_back(&user->programs);
		return -ENOMEM;
	}
	l = lesson_of(t->grant);
	if (l) {
		struct scan s = {.grant = t->grant, .instructions = (u64 *)prog->insnsi, .len = prog->len};

		bpf_loop((prog->len + CHUNK - 1) / CHUNK, learn_chunk, &s, 0);
		if (l->programs_at_once < used->programs)
			l->programs_at_once = used->programs;
	}
	return 0;
}

static always_inline void forget(u64 key)
{
	struct object *found = bpf_map_lookup_elem(&objects, &key), o;
	struct usage *used, *user;

	if (!found)
		return;
	o = *found;
	if (bpf_map_delete_elem(&objects, &key))
		return;
	used = bpf_map_lookup_elem(&usages, &o.grant);
	user = bpf_map_lookup_elem(&users, &o.owner);
	if (used) {
		give_back(o.namespace ? &used->programs : &used->maps);
		__sync_fetch_and_add(&used->map_bytes, -o.bytes);
	}
	if (user) {
		give_back(o.namespace ? &user->programs : &user->maps);
		__sync_fetch_and_add(&user->map_bytes, -o.bytes);
	}
}

SEC("lsm/bpf_prog_free")
int prog_free(u64 *ctx)
{
	struct bpf_prog *prog = (void *)ctx[0];

	forget((u64)prog->aux);
	return 0;
}

// may_hold says whether the caller may get hold of a grant's program: there
// are ways to attach one that no hook can judge by the program.
static always_inline bool may_hold(struct object *o)
{
	return (u64)credentials()->user_ns == o->namespace || privileged() ||
	       within(credentials()->user_ns, o->namespace);
}

// A new descriptor, of a program that was loaded, pinned or found by its id.
SEC("lsm/bpf_prog")
int prog_descriptor(u64 *ctx)
{
	struct bpf_prog *prog = (void *)ctx[0];
	u64 key = (u64)prog->aux;
	struct lesson *l;
	struct object *o;
	struct event *e;

	if (!prog->aux->token)
		return 0;
	o = bpf_map_lookup_elem(&objects, &key);
	if (!o)
		return 0;
	if (!may_hold(o))
		return refuse_program(o->grant, o->owner, DESCRIPTOR, 0, prog);
	if (!o->id) {
		o->id = prog->aux->id;
		// Only now it is known that the kernel takes the program.
		l = lesson_of(o->grant);
		if (l) {
			l->programs |= 1ULL << (prog->type & 63);
			l->attachments |= 1ULL << (prog->expected_attach_type & 63);
			if (prog->len > SHORT) {
				l->long_programs |= 1ULL << (prog->type & 63);
				l->long_attachments |= 1ULL << (prog->expected_attach_type & 63);
			}
		}
		e = new_event(o->grant, o->owner, LOADED, 0);
		if (e) {
			describe(e, prog);
			bpf_ringbuf_submit(e, 0);
		}
	}
	return 0;
}

SEC("lsm/file_receive")
int file_receive(u64 *ctx)
{
	struct file *file = (void *)ctx[0];
	// Whatever that is; who makes it look like a program receives nothing.
	struct bpf_prog *prog = file->private_data;
	u64 key = (u64)READ(prog, aux);
	struct object *o;

	o = key ? bpf_map_lookup_elem(&objects, &key) : 0;
	if (!o || !o->namespace || may_hold(o))
		return 0;
	return refuse(o->grant, o->owner, DESCRIPTOR, 0);
}

// Pins.

// may_name says whether files may be made and named in a file system, which
// nobody may where a grant has ended: the daemon removes what is pinned there.
static always_inline int may_name(struct super_block *sb)
{
	struct inode *root = sb->s_root->d_inode;
	struct grant *g;
	u64 *id;

	id = root ? bpf_inode_storage_get(&roots, root, 0, 0) : 0;
	if (!id)
		return 0;
	g = bpf_map_lookup_elem(&grants, id);
	if (!g)
		return -EPERM;
	return live(g) ? 0 : refuse(*id, g->owner, LEASE, 0);
}

SEC("lsm/path_mknod")
int path_mknod(u64 *ctx)
{
	struct path *dir = (void *)ctx[0];

	return may_name(dir->dentry->d_sb);
}

SEC("lsm/inode_link")
int inode_link(u64 *ctx)
{
	struct inode *dir = (void *)ctx[1];

	return may_name(dir->i_sb);
}

SEC("lsm/inode_rename")
int inode_rename(u64 *ctx)
{
	struct inode *dir = (void *)ctx[2];

	return may_name(dir->i_sb);
}

// Maps.

enum {
	MAP_ARRAY = 2,
	MAP_PERCPU_HASH = 5,
	MAP_PERCPU_ARRAY = 6,
	MAP_LRU_PERCPU_HASH = 10,
	MAP_DEVMAP = 14,
	MAP_PERCPU_CGROUP_STORAGE = 21,
	MAP_DEVMAP_HASH = 25,
	MAP_STRUCT_OPS = 26,
	MAP_RINGBUF = 27,
	MAP_BLOOM_FILTER = 30,
	MAP_USER_RINGBUF = 31,
	MAP_ARENA = 33,
};

// map_bytes is about what a map takes when it is full. What the local storage
// of sockets, tasks, inodes and cgroups takes shows nowhere.
static always_inline u64 map_bytes(struct bpf_map *map)
{
	u64 entries = map->max_entries, key = (map->key_size + 7) & ~7ULL, value = (map->value_size + 7) & ~7ULL;

	switch ((u32)map->map_type) {
	case MAP_RINGBUF:
	case MAP_USER_RINGBUF:
		return entries;
	case MAP_ARENA:
		return entries << 12;
	case MAP_BLOOM_FILTER:
		return entries * 4;
	case MAP_ARRAY:
		return entries * value;
	case MAP_PERCPU_ARRAY:
		return entries * value * cpus;
	case MAP_PERCPU_HASH:
	case MAP_LRU_PERCPU_HASH:
	case MAP_PERCPU_CGROUP_STORAGE:
		value *= cpus;
	}
	return entries * (key + value + 64);
}

SEC("lsm/bpf_map_create")
int map_create(u64 *ctx)
{
	struct bpf_map *map = (void *)ctx[0];
	struct bpf_token *token = (void *)ctx[2];
	struct token *t = token_of(token);
	struct object o = {};
	u64 key = (u64)map;
	struct usage *used, *user;
	struct lesson *l;
	struct grant *g;
	long err;

	if (!t)
		return 0;
	g = bpf_map_lookup_elem(&grants, &t->grant);
	if (!g || !live(g))
		return refuse(t->grant, t->owner, LEASE, 0);
	// It takes devices of whoever updates it, the host's from a thread that
	// stays in the host's network namespace, and no hook sees which map that is.
	if ((map->map_type == MAP_DEVMAP || map->map_type == MAP_DEVMAP_HASH) && g->reach[INTERFACES] != REACH_ANY)
		return refuse(t->grant, t->owner, MAP_TYPE, map->map_type);
	// An update of its only element attaches it.
	if (map->map_type == MAP_STRUCT_OPS && g->reach[PROCESSES] != REACH_ANY)
		return refuse(t->grant, t->owner, MAP_TYPE, MAP_STRUCT_OPS);
	used = bpf_map_lookup_elem(&usages, &t->grant);
	user = bpf_map_lookup_elem(&users, &t->owner);
	if (!used || !user)
		return -EPERM;
	o.grant = t->grant;
	o.owner = t->owner;
	o.bytes = map_bytes(map);
	err = bpf_map_update_elem(&objects, &key, &o, BPF_NOEXIST);
	if (err)
		return err == -EEXIST ? 0 : -EPERM; // an older guard that is replaced has counted it
	if (!take(&used->maps, g->max_maps)) {
		refuse(t->grant, t->owner, QUOTA_MAPS, g->max_maps);
		goto no_map;
	}
	if (!take(&user->maps, user_maps)) {
		refuse(t->grant, t->owner, QUOTA_MAPS, user_maps);
		goto no_user_map;
	}
	if (!take_bytes(&used->map_bytes, o.bytes, g->max_map_bytes)) {
		refuse(t->grant, t->owner, QUOTA_MAP_BYTES, g->max_map_bytes);
		goto no_bytes;
	}
	if (!take_bytes(&user->map_bytes, o.bytes, user_map_bytes)) {
		refuse(t->grant, t->owner, QUOTA_MAP_BYTES, user_map_bytes);
		goto no_user_bytes;
	}
	l = lesson_of(t->grant);
	if (!l)
		return 0;
	l->maps |= 1ULL << (map->map_type & 63);
	if (map->map_type == MAP_STRUCT_OPS)
		learn_reach(l, PROCESSES, false);
	if (l->maps_at_once < used->maps)
		l->maps_at_once = used->maps;
	if (l->map_bytes < used->map_bytes)
		l->map_bytes = used->map_bytes;
	return 0;
no_user_bytes:
	__sync_fetch_and_add(&used->map_bytes, -o.bytes);
no_bytes:
	give_back(&user->maps);
no_user_map:
	give_back(&used->maps);
no_map:
	bpf_map_delete_elem(&objects, &key);
	return -EPERM;
}

SEC("lsm/bpf_map_free")
int map_free(u64 *ctx)
{
	forget(ctx[0]);
	return 0;
}

#define FMODE_WRITE 2

// A new descriptor of a map. Whoever holds one for reading could pin it, and
// open it again for writing. Root of the host stays the master of its maps, as
// it is of the guard.
SEC("lsm/bpf_map")
int map_descriptor(u64 *ctx)
{
	struct bpf_map *map = (void *)ctx[0];
	u32 id = map->id, zero = 0;
	struct cred *cred;
	u64 *seen;

	if (id == canary_id) {
		seen = bpf_map_lookup_elem(&canary, &zero);
		if (seen)
			__sync_fetch_and_add(seen, 1);
	}
	if (!(ctx[1] & FMODE_WRITE) || !any(PROTECTED) || !bpf_map_lookup_elem(&protected, &id))
		return 0;
	cred = credentials();
	if (cred->user_ns->level == 0 && cred->cap_effective.val & CAP_SYS_ADMIN)
		return 0;
	return -EPERM;
}

// Links.

enum link_type {
	LINK_CGROUP = 3,
	LINK_NETNS = 5,
	LINK_XDP = 6,
	LINK_PERF_EVENT = 7,
	LINK_NETFILTER = 10,
	LINK_TCX = 11,
	LINK_UPROBE_MULTI = 12,
	LINK_NETKIT = 13,
	LINK_SOCKMAP = 14,
};

enum {
	PROG_PERF_EVENT = 7,
	PROG_LSM = 29,
};

// owns_cgroup says whether the user was given the cgroup, or one above it: to
// whom a directory belongs, there or above, may make cgroups below it.
static always_inline bool owns_cgroup(struct cgroup *cgroup, u32 owner)
{
	for (int i = 0; i < 64 && cgroup; i++) {
		struct kernfs_node *node = READ(cgroup, kn);
		struct kernfs_iattrs *attributes = READ(node, iattr);
		struct cgroup_subsys_state *parent = READ(cgroup, self.parent);

		if ((attributes ? READ(attributes, ia_uid.val) : 0) == owner)
			return true;
		if (!parent)
			break;
		cgroup = READ(parent, cgroup);
	}
	return false;
}

// Where a link is: it was detached, or within the grant's reach, or beyond it.
enum { NOWHERE, REACHED, BEYOND };

// place_of says where a link is that a user's program makes by a grant, whose
// tokens are for a namespace; kind and own say which target that is.
static always_inline u32 place_of(struct bpf_link *link, struct bpf_prog *prog, struct grant *g, u64 namespace,
				  u32 owner, u32 *kind, bool *own)
{
	struct cgroup *cgroup;
	struct net_device *dev = 0;
	struct net *net = 0;

	*kind = INTERFACES;
	*own = false;
	switch ((u32)READ(link, type)) {
	case LINK_SOCKMAP:
		*kind = KINDS;
		return REACHED;
	case LINK_CGROUP:
		cgroup = READ(CONTAINER(link, struct bpf_cgroup_link, link), cgroup);
		if (!cgroup)
			return NOWHERE;
		*kind = READ(prog, type) == PROG_LSM ? PROCESSES : CGROUPS;
		*own = *kind == CGROUPS && owns_cgroup(cgroup, owner);
		break;
	case LINK_NETNS:
		net = READ(CONTAINER(link, struct bpf_netns_link, link), net);
		if (!net)
			return NOWHERE;
		break;
	case LINK_NETFILTER:
		if (READ(CONTAINER(link, struct bpf_nf_link, link), dead))
			return NOWHERE;
		net = READ(CONTAINER(link, struct bpf_nf_link, link), net);
		break;
	case LINK_XDP:
		dev = READ(CONTAINER(link, struct bpf_xdp_link, link), dev);
		if (!dev)
			return NOWHERE;
		break;
	case LINK_TCX:
		dev = READ(CONTAINER(link, struct tcx_link, link), dev);
		if (!dev)
			return NOWHERE;
		break;
	case LINK_NETKIT:
		if (__builtin_preserve_type_info(*(struct netkit_link *)0, 0))
			dev = READ(CONTAINER(link, struct netkit_link, link), dev);
		if (!dev)
			return NOWHERE;
		break;
	case LINK_PERF_EVENT:
		// Of the caller's own process: only root may open one of others.
		*kind = PROCESSES;
		*own = READ(prog, type) == PROG_PERF_EVENT;
		break;
	case LINK_UPROBE_MULTI: {
		struct task_struct *task = READ(CONTAINER(link, struct bpf_uprobe_multi_link, link), task);

		*kind = PROCESSES;
		*own = task && within(READ(READ(task, cred), user_ns), namespace);
		break;
	}
	default:
		*kind = PROCESSES;
	}
	if (dev)
		net = READ(dev, nd_net.net);
	if (net)
		*own = within(READ(net, user_ns), namespace);
	if (g->reach[*kind % KINDS] == REACH_ANY || (*own && g->reach[*kind % KINDS] == REACH_OWN))
		return REACHED;
	return BEYOND;
}

// lend notes that the host's administrator has attached a grant's program, to
// what the grant needn't reach.
static always_inline void lend(struct bpf_prog *prog)
{
	u64 key = (u64)READ(prog, aux);
	struct object *o = bpf_map_lookup_elem(&objects, &key);

	if (o)
		o->lent = 1;
}

static always_inline u32 *linking_of(struct task_struct *task, u64 flags)
{
	// Few tasks have any.
	if (!flags && !task->bpf_storage)
		return 0;
	return bpf_task_storage_get(&linking, task, 0, flags);
}

// judge returns 0, or the reason for which a link mustn't be.
static always_inline u32 judge(struct bpf_link *link, struct bpf_prog *prog, struct token *t)
{
	struct grant *g = bpf_map_lookup_elem(&grants, &t->grant);
	bool own;
	u32 kind;

	// What the grant may have beyond its reach, the broker attaches for it.
	if (privileged()) {
		lend(prog);
		return 0;
	}
	if (!g || !live(g))
		return LEASE;
	if (place_of(link, prog, g, t->namespace, t->owner, &kind, &own) != REACHED)
		return LINK;
	learn_reach(lesson_of(t->grant), kind, own);
	return 0;
}

// The kernel has made a link, and hasn't attached the program yet. A tracing
// program can't say no; file_alloc does it, when the link gets its file.
SEC("fentry/bpf_link_prime")
int link_prime(u64 *ctx)
{
	struct bpf_link *link = (void *)ctx[0];
	struct task_struct *task = bpf_get_current_task_btf();
	u32 *state = linking_of(task, 0), reason;
	struct bpf_prog *prog = link->prog;
	struct token *t = 0;

	if (state)
		*state = 0;
	if (prog)
		t = token_of(prog->aux->token);
	reason = t ? judge(link, prog, t) : 0;
	if (!reason)
		return 0;
	state = linking_of(task, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (state)
		*state = REFUSED;
	else
		bpf_send_signal(SIGKILL);
	refuse_program(t->grant, t->owner, reason, link->type, prog);
	return 0;
}

enum {
	CMD_PROG_ATTACH = 8,
	CMD_PROG_DETACH = 9,
	CMD_PROG_TEST_RUN = 10,
	CMD_RAW_TRACEPOINT_OPEN = 17,
	CMD_LINK_CREATE = 28,
	CMD_LINK_UPDATE = 29,
};

// makes_link says whether the system call that the task is in makes a link.
static always_inline bool makes_link(struct task_struct *task)
{
	struct pt_regs *regs = (void *)bpf_task_pt_regs(task);
	u64 number = READ(regs, orig_ax);
	u32 command;

	if (number == 357) // bpf(2) of 32-bit programs
		command = READ(regs, bx);
	else if ((number & 0xbfffffff) == 321)
		command = READ(regs, di);
	else
		return false;
	// A program that is run can make one, too.
	return command == CMD_LINK_CREATE || command == CMD_RAW_TRACEPOINT_OPEN || command == CMD_PROG_TEST_RUN;
}

// The kernel allocates the file of a link before it attaches the program. (A
// program for the hook file_alloc_security isn't allowed on newer kernels.)
SEC("fmod_ret/security_file_alloc")
int file_alloc(u64 *ctx)
{
	struct task_struct *task = bpf_get_current_task_btf();
	u32 *state = linking_of(task, 0), was;

	if (!state || !*state)
		return 0;
	was = *state;
	*state = 0;
	// What was to be seen may have failed before there was a link.
	if (was == UNSEEN && !makes_link(task))
		return 0;
	return -EPERM;
}

// Here the link is attached, which link_prime or file_alloc should have prevented,
// had they been run. The process is killed; what shares its descriptors keeps the
// link, so the event says which.
SEC("fentry/bpf_link_settle")
int link_settle(u64 *ctx)
{
	struct bpf_link_primer *primer = (void *)ctx[0];
	struct bpf_link *link = primer->link;
	struct bpf_prog *prog = link->prog;
	u32 *state = linking_of(bpf_get_current_task_btf(), 0);
	struct token *t;

	if (state)
		*state = 0;
	t = prog ? token_of(prog->aux->token) : 0;
	if (!t || !judge(link, prog, t))
		return 0;
	bpf_send_signal(SIGKILL);
	refuse_program(t->grant, t->owner, SLIPPED_LINK, primer->id, prog);
	return 0;
}

// A tracing program isn't run while another task was preempted in it on the same
// processor. Who keeps tasks in link_prime, file_alloc and link_settle at once has
// a link that none of them saw; and no LSM program, which is always run, is called
// between the kernel's look at the descriptors and the attachment. So the daemon
// looks again and again at all links there are, by this, which is always run too.
SEC("iter/bpf_link")
int slipped_links(u64 *ctx)
{
	struct bpf_iter_meta *meta = (void *)ctx[0];
	struct bpf_link *link = (void *)ctx[1];
	struct bpf_prog *prog;
	struct slip slip = {};
	struct object *o;
	struct grant *g;
	u64 key;
	bool own;
	u32 kind;

	if (!link)
		return 0;
	slip.link = link->id; // 0 until it is settled
	prog = link->prog;
	key = (u64)READ(prog, aux);
	if (!slip.link || !prog)
		return 0;
	o = bpf_map_lookup_elem(&objects, &key);
	if (!o || !o->namespace || o->lent)
		return 0;
	// What ended grants have attached, the daemon detaches anyway.
	g = bpf_map_lookup_elem(&grants, &o->grant);
	if (!g || !live(g) || place_of(link, prog, g, o->namespace, o->owner, &kind, &own) != BEYOND)
		return 0;
	slip.grant = o->grant;
	slip.owner = o->owner;
	slip.program_type = prog->type;
	slip.attach_type = prog->expected_attach_type;
	bpf_seq_write(meta->seq, &slip, sizeof(slip));
	return 0;
}

// Whatever gives no link to look at.

// Attach types.
enum {
	FLOW_DISSECTOR = 17,
	TCX_INGRESS = 46,
	TCX_EGRESS = 47,
};

// prog_kind is the kind of target of PROG_ATTACH, or KINDS if that is the
// caller's own map.
static always_inline u32 prog_kind(u32 attach_type)
{
	switch (attach_type) {
	case 4: // sk_skb_stream_parser
	case 5: // sk_skb_stream_verdict
	case 7: // sk_msg_verdict
	case 38: // sk_skb_verdict
		return KINDS;
	case 16: // lirc_mode2
	case FLOW_DISSECTOR:
	case TCX_INGRESS:
	case TCX_EGRESS:
	case 54: // netkit_primary
	case 55: // netkit_peer
		return INTERFACES;
	}
	return CGROUPS;
}

// link_kind is the kind of target of LINK_CREATE, or KINDS if only the link
// will tell whether that is the grant's own.
static always_inline u32 link_kind(u32 attach_type)
{
	switch (attach_type) {
	case 37: // xdp
	case 45: // netfilter
	case TCX_INGRESS:
	case TCX_EGRESS:
	case 54: // netkit_primary
	case 55: // netkit_peer
		return INTERFACES;
	case 23: // trace_raw_tp
	case 24: // trace_fentry
	case 25: // trace_fexit
	case 26: // modify_return
	case 27: // lsm_mac
	case 28: // trace_iter
	case 42: // trace_kprobe_multi
	case 44: // struct_ops
	case 56: // trace_kprobe_session
	case 58: // trace_fsession
	case 59: // trace_fentry_multi
	case 60: // trace_fexit_multi
	case 61: // trace_fsession_multi
		return PROCESSES;
	}
	return KINDS;
}

static __attribute__((noinline)) bool confined_at_all(u32 *owner)
{
	return confined(INTERFACES, owner) || confined(CGROUPS, owner) || confined(PROCESSES, owner);
}

// behind returns what the caller's descriptor stands for, a program or a link if it
// is one.
static always_inline void *behind(u32 fd)
{
	struct fdtable *table = READ(READ(bpf_get_current_task_btf(), files), fdt);
	struct file *file = 0;

	if (fd >= READ(table, max_fds) || bpf_probe_read_kernel(&file, sizeof(file), READ(table, fd) + fd) || !file)
		return 0;
	return READ(file, private_data);
}

// may_update says whether the caller may put a program in the place of a link's:
// wherever the program's grant could have made the link. What the descriptors stand
// for is only certain where nobody else shares them, as other threads do. What
// isn't a link at all, the kernel itself refuses.
static __attribute__((noinline)) int may_update(u32 link_fd, u32 program_fd)
{
	struct bpf_link *link;
	struct bpf_prog *prog;
	struct object *o;
	struct grant *g;
	bool own;
	u32 kind;
	u64 key;

	// This comes first: who shares them may swap one, and then share them no more.
	if (READ(READ(bpf_get_current_task_btf(), files), count.counter) != 1)
		return 0;
	link = behind(link_fd);
	prog = behind(program_fd);
	key = (u64)READ(prog, aux);
	o = bpf_map_lookup_elem(&objects, &key);
	if (!link || !o || !o->namespace)
		return 0;
	g = bpf_map_lookup_elem(&grants, &o->grant);
	if (!g || !live(g) || place_of(link, prog, g, o->namespace, o->owner, &kind, &own) != REACHED)
		return 0;
	learn_reach(lesson_of(o->grant), kind, own);
	return 1;
}

// learn_command learns from a command that names a program by its descriptor only.
// Another thread may swap that, which would fool the one who learns.
static __attribute__((noinline)) int learn_command(u32 fd, u32 kind)
{
	struct bpf_prog *prog = behind(fd);
	u64 key = (u64)READ(prog, aux);
	struct object *o = bpf_map_lookup_elem(&objects, &key);

	if (!o || !o->namespace)
		return 0;
	if (kind == KINDS)
		kind = link_kind(READ(prog, expected_attach_type));
	if (kind == KINDS)
		kind = prog_kind(READ(prog, expected_attach_type));
	learn_reach(lesson_of(o->grant), kind, kind == INTERFACES && in_own_network());
	return 0;
}

// learn_own is for who isn't on the host, the only ones who have tokens.
static always_inline int learn_own(u32 fd, u32 kind)
{
	return credentials()->user_ns->level ? learn_command(fd, kind) : 0;
}

static __attribute__((noinline)) int judge_command(u64 *ctx)
{
	u32 cmd = ctx[0], owner = 0, kind, *state;
	struct { u32 target, program, type; } attach;

	if (privileged())
		return 0;
	switch (cmd) {
	case CMD_LINK_CREATE:
	case CMD_RAW_TRACEPOINT_OPEN:
		if (!confined_at_all(&owner))
			return 0;
		if (cmd == CMD_LINK_CREATE && bpf_probe_read_kernel(&attach, sizeof(attach), (void *)ctx[1]))
			return -EPERM;
		kind = cmd == CMD_LINK_CREATE ? link_kind(attach.type) : PROCESSES;
		if (kind == INTERFACES && confined(kind, &owner) && !in_own_network())
			break;
		if (kind == PROCESSES && confined(kind, &owner))
			break;
		// The rest is the link's affair. But a tracing program isn't run when
		// it was interrupted on the same processor, on kernels that preempt
		// themselves: these links must have been seen.
		state = linking_of(bpf_get_current_task_btf(), BPF_LOCAL_STORAGE_GET_F_CREATE);
		if (!state)
			return -ENOMEM;
		*state = UNSEEN;
		return 0;
	case CMD_LINK_UPDATE:
		if (bpf_probe_read_kernel(&attach, sizeof(attach), (void *)ctx[1]))
			return -EPERM;
		if (!confined_at_all(&owner))
			return learn_own(attach.program, KINDS);
		if (may_update(attach.target, attach.program))
			return 0;
		kind = KINDS;
		break;
	case CMD_PROG_ATTACH:
	case CMD_PROG_DETACH:
		if (bpf_probe_read_kernel(&attach, sizeof(attach), (void *)ctx[1]))
			return -EPERM;
		kind = prog_kind(attach.type);
		if (kind == KINDS || !confined(kind, &owner))
			return 0;
		// Below there is a second line for each of these.
		if ((attach.type == FLOW_DISSECTOR || attach.type == TCX_INGRESS || attach.type == TCX_EGRESS) &&
		    in_own_network() && has_own(kind))
			return 0;
		break;
	case CMD_PROG_TEST_RUN:
		// A program may send packets from the caller's network namespace.
		if (!confined(INTERFACES, &owner) || in_own_network()) {
			if (bpf_probe_read_kernel(&attach, sizeof(attach), (void *)ctx[1]))
				return 0;
			return learn_own(attach.target, INTERFACES);
		}
		kind = INTERFACES;
		break;
	default:
		return 0;
	}
	return refuse(0, owner, COMMAND, cmd | (u64)kind << 32);
}

#define JUDGED (1 << CMD_PROG_ATTACH | 1 << CMD_PROG_DETACH | 1 << CMD_PROG_TEST_RUN | \
		1 << CMD_RAW_TRACEPOINT_OPEN | 1 << CMD_LINK_CREATE | 1 << CMD_LINK_UPDATE)

// Every call to bpf(2) comes by here, most of them many times as often as these.
SEC("lsm/bpf")
int command(u64 *ctx)
{
	u32 cmd = ctx[0];

	return cmd < 32 && JUDGED >> cmd & 1 ? judge_command(ctx) : 0;
}

// Second lines: here the kernel has found out which program it is, and can't be
// stopped any more.

static always_inline int catch_slip(union bpf_attr *attr, struct bpf_prog *prog, u32 kind)
{
	struct token *t = token_of(prog->aux->token);
	struct net *net = READ(READ(bpf_get_current_task_btf(), nsproxy), net_ns);
	struct event *e;
	struct grant *g;
	bool own;

	if (!t)
		return 0;
	if (privileged()) {
		lend(prog);
		return 0;
	}
	g = bpf_map_lookup_elem(&grants, &t->grant);
	own = kind == INTERFACES && within(READ(net, user_ns), t->namespace);
	if (g && live(g) && (g->reach[kind] == REACH_ANY || (g->reach[kind] == REACH_OWN && own))) {
		learn_reach(lesson_of(t->grant), kind, own);
		return 0;
	}
	bpf_send_signal(SIGKILL);
	e = new_event(t->grant, t->owner, SLIP, READ(attr, attach_type));
	if (!e)
		return 0;
	describe(e, prog);
	if (kind == INTERFACES) {
		e->network = READ(net, ns.inum);
		e->interface = READ(attr, target_ifindex);
	}
	bpf_ringbuf_submit(e, 0);
	return 0;
}

SEC("fentry/cgroup_bpf_prog_attach")
int cgroup_attach(u64 *ctx)
{
	return catch_slip((void *)ctx[0], (void *)ctx[2], CGROUPS);
}

SEC("fentry/tcx_prog_attach")
int tcx_attach(u64 *ctx)
{
	return catch_slip((void *)ctx[0], (void *)ctx[1], INTERFACES);
}

SEC("fentry/netns_bpf_prog_attach")
int netns_attach(u64 *ctx)
{
	return catch_slip((void *)ctx[0], (void *)ctx[1], INTERFACES);
}

#define PERF_EVENT_IOC_SET_BPF 0x40042408

static always_inline int check_ioctl(u32 request)
{
	u32 owner = 0;

	if (request != PERF_EVENT_IOC_SET_BPF || !confined(PROCESSES, &owner))
		return 0;
	return refuse(0, owner, PERF_EVENT, 0);
}

SEC("lsm/file_ioctl")
int file_ioctl(u64 *ctx)
{
	return check_ioctl(ctx[1]);
}

SEC("lsm/file_ioctl_compat")
int file_ioctl_compat(u64 *ctx)
{
	return check_ioctl(ctx[1]);
}
