// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

// What the guard reads of the kernel: names and types are the kernel's, where
// the fields lie is found out when the guard is loaded (CO-RE).

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;
typedef long long s64;
typedef _Bool bool;
#define true 1
#define false 0
typedef u32 __u32;
typedef u64 __u64;

#define SEC(name) __attribute__((section(name), used))
#define always_inline inline __attribute__((always_inline))
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name
#define CORE __attribute__((preserve_access_index))

// READ reads a field at an address that the verifier knows nothing of.
#define READ(pointer, field)                                                      \
	({                                                                        \
		typeof((pointer)->field) _value = 0;                              \
		bpf_probe_read_kernel(&_value, sizeof(_value), &(pointer)->field); \
		_value;                                                           \
	})

// CONTAINER is the struct that the member at pointer belongs to.
#define CONTAINER(pointer, type, member) \
	((type *)((void *)(pointer) - __builtin_preserve_field_info(((type *)0)->member, 0)))

struct seq_file;

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static u64 (*bpf_get_current_pid_tgid)(void) = (void *)14;
static long (*bpf_get_current_comm)(void *buffer, u32 size) = (void *)16;
static long (*bpf_send_signal)(u32 signal) = (void *)109;
static long (*bpf_seq_write)(struct seq_file *seq, const void *data, u32 size) = (void *)127;
static long (*bpf_probe_read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static u64 (*bpf_ktime_get_boot_ns)(void) = (void *)125;
static void *(*bpf_ringbuf_reserve)(void *ringbuf, u64 size, u64 flags) = (void *)131;
static void (*bpf_ringbuf_submit)(void *data, u64 flags) = (void *)132;
static void *(*bpf_inode_storage_get)(void *map, void *inode, void *value, u64 flags) = (void *)145;
static struct task_struct *(*bpf_get_current_task_btf)(void) = (void *)158;
static void *(*bpf_task_storage_get)(void *map, struct task_struct *task, void *value, u64 flags) = (void *)156;
static long (*bpf_task_pt_regs)(struct task_struct *task) = (void *)175;
static long (*bpf_loop)(u32 times, void *callback, void *context, u64 flags) = (void *)181;

// As the kernel's own: it finds locks in maps by the name of their type.
struct bpf_spin_lock {
	u32 val;
};

enum {
	EPERM = 1,
	ENOMEM = 12,
	EEXIST = 17,
	SIGKILL = 9,
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_F_NO_PREALLOC = 1,
	BPF_LOCAL_STORAGE_GET_F_CREATE = 1,
};

// Map types, of the guard's own maps.
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_RINGBUF = 27,
	BPF_MAP_TYPE_INODE_STORAGE = 28,
	BPF_MAP_TYPE_TASK_STORAGE = 29,
};

struct user_namespace {
	struct user_namespace *parent;
	int level;
	struct {
		u32 val;
	} owner;
} CORE;

struct cred {
	struct {
		u32 val;
	} uid, euid;
	struct {
		u64 val;
	} cap_effective;
	struct user_namespace *user_ns;
} CORE;

struct ns_common {
	u32 inum;
} CORE;

struct net {
	struct user_namespace *user_ns;
	struct ns_common ns;
} CORE;

struct nsproxy {
	struct net *net_ns;
} CORE;

struct fdtable {
	u32 max_fds;
	struct file **fd;
} CORE;

typedef struct CORE {
	int counter;
} atomic_t;

struct files_struct {
	atomic_t count;
	struct fdtable *fdt;
} CORE;

struct task_struct {
	struct cred *cred;
	struct nsproxy *nsproxy;
	struct files_struct *files;
	struct bpf_local_storage *bpf_storage;
} CORE;

// The registers of the system call that a task makes, on x86-64.
struct pt_regs {
	u64 bx, di, orig_ax;
} CORE;

struct super_block;

struct inode {
	struct super_block *i_sb;
} CORE;

struct dentry {
	struct inode *d_inode;
	struct super_block *d_sb;
} CORE;

struct super_block {
	struct dentry *s_root;
} CORE;

struct path {
	struct dentry *dentry;
} CORE;

struct file {
	void *private_data;
} CORE;

struct bpf_token {
	struct user_namespace *userns;
} CORE;

struct bpf_prog_aux {
	u32 id;
	struct bpf_token *token;
	char name[16];
} CORE;

struct bpf_insn {
	u8 code;
	u8 registers;
	u16 off;
	u32 imm;
};

// The kernel's enums, of which only the names count.
enum bpf_prog_type { BPF_PROG_TYPE_UNSPEC };
enum bpf_attach_type { BPF_CGROUP_INET_INGRESS };
enum bpf_map_type { BPF_MAP_TYPE_UNSPEC };
enum bpf_link_type { BPF_LINK_TYPE_UNSPEC };

struct bpf_prog {
	enum bpf_prog_type type;
	enum bpf_attach_type expected_attach_type;
	u32 len;
	u8 tag[8];
	struct bpf_prog_aux *aux;
	struct bpf_insn insnsi[];
} CORE;

struct bpf_map {
	enum bpf_map_type map_type;
	u32 key_size;
	u32 value_size;
	u32 max_entries;
	u32 id;
} CORE;

struct bpf_link {
	u32 id;
	enum bpf_link_type type;
	struct bpf_prog *prog;
} CORE;

struct bpf_iter_meta {
	struct seq_file *seq;
} CORE;

// The kernel's own copy of what PROG_ATTACH reads.
union bpf_attr {
	struct CORE {
		u32 target_ifindex;
		u32 attach_bpf_fd;
		u32 attach_type;
	};
} CORE;

struct bpf_link_primer {
	struct bpf_link *link;
	u32 id;
} CORE;

typedef struct CORE {
	struct net *net;
} possible_net_t;

struct net_device {
	possible_net_t nd_net;
} CORE;

struct bpf_xdp_link {
	struct bpf_link link;
	struct net_device *dev;
} CORE;

struct tcx_link {
	struct bpf_link link;
	struct net_device *dev;
} CORE;

struct netkit_link {
	struct bpf_link link;
	struct net_device *dev;
} CORE;

struct bpf_netns_link {
	struct bpf_link link;
	struct net *net;
} CORE;

struct bpf_nf_link {
	struct bpf_link link;
	struct net *net;
	bool dead;
} CORE;

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
} CORE;

struct kernfs_iattrs {
	struct {
		u32 val;
	} ia_uid;
} CORE;

struct kernfs_node {
	struct kernfs_iattrs *iattr;
} CORE;

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
} CORE;

struct bpf_cgroup_link {
	struct bpf_link link;
	struct cgroup *cgroup;
} CORE;

struct bpf_uprobe_multi_link {
	struct bpf_link link;
	struct task_struct *task;
} CORE;
