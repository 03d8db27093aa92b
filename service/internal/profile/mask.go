// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// Mask is a set of values of one of the kernel's enums, bit N for value N, as
// the delegate_* mount options of bpffs take it as a number (from 6.9 on).
type Mask uint64

// Has says whether the value bit is in the mask.
func (m Mask) Has(bit int) bool { return m&(1<<bit) != 0 }

// CommandNames gives the kernel's names of bpf commands, in the enum's order.
func CommandNames(m Mask) []string { return commands.list(m) }

// MapNames gives the kernel's names of map types, in the enum's order.
func MapNames(m Mask) []string { return mapTypes.list(m) }

// ProgramNames gives the kernel's names of program types, in the enum's order.
func ProgramNames(m Mask) []string { return programs.list(m) }

// AttachmentNames gives the kernel's names of attach types, in the enum's
// order. cgroup_inet_ingress also stands for "no attach type".
func AttachmentNames(m Mask) []string { return attachments.list(m) }

// CommandName gives the kernel's name of one bpf command, or its number if it has none that is known.
func CommandName(value uint64) string { return commands.name(value) }

// MapName is for map types what CommandName is for commands.
func MapName(value uint64) string { return mapTypes.name(value) }

// ProgramName is for program types what CommandName is for commands.
func ProgramName(value uint64) string { return programs.name(value) }

// anyWord is the kernel's word, and systemd's, for a whole enum.
const anyWord = "any"

// enum is one of the four kernel enums that can be delegated.
type enum struct {
	// prefix stands before the names of the enumerators in uapi/linux/bpf.h.
	prefix string
	// names are as the kernel shows them in the mount's options, indexed by
	// value; what is empty can't be written.
	names []string
	// aliases are enumerators with the value of an older one.
	aliases map[string]string
	// never are refused, with the reason.
	never map[string]string
	// group picks this enum's names out of a group.
	group func(group) string
}

func (e *enum) name(value uint64) string {
	if value < uint64(len(e.names)) && e.names[value] != "" {
		return e.names[value]
	}
	return strconv.FormatUint(value, 10)
}

// index gives the value of a kernel name.
func (e *enum) index(name string) (int, bool) {
	if real, ok := e.aliases[name]; ok {
		name = real
	}
	i := slices.Index(e.names, name)
	return i, i >= 0 && name != ""
}

// all has every value that may be delegated.
func (e *enum) all() Mask {
	var m Mask
	for i, name := range e.names {
		if name != "" && e.never[name] == "" {
			m |= 1 << i
		}
	}
	return m
}

func (e *enum) list(m Mask) []string {
	var s []string
	for i, name := range e.names {
		if m.Has(i) {
			s = append(s, name)
		}
	}
	return s
}

// mask is for names that are known to be there.
func (e *enum) mask(names string) Mask {
	var m Mask
	for name := range strings.FieldsSeq(names) {
		i, ok := e.index(name)
		if !ok {
			panic("profile: no such name: " + name)
		}
		m |= 1 << i
	}
	return m
}

// parse reads one word of a list.
func (e *enum) parse(word string) (Mask, error) {
	if word == anyWord {
		return e.all(), nil
	}
	if g, ok := strings.CutPrefix(word, "@"); ok {
		names := e.group(groups[g])
		if names == "" {
			return 0, fmt.Errorf("unknown group %.64q", word)
		}
		return e.mask(names), nil
	}
	// In a mount option a number would silently replace what stands before it.
	if strings.Trim(word[:1], "0123456789") == "" {
		return 0, fmt.Errorf("%.64q is a number, names are needed", word)
	}
	name := e.kernelName(word)
	i, ok := e.index(name)
	if !ok {
		return 0, fmt.Errorf("unknown value %.64q", word)
	}
	if why := e.never[name]; why != "" {
		return 0, errors.New(why)
	}
	return 1 << i, nil
}

// kernelName turns the spellings of uapi/linux/bpf.h (BPF_MAP_TYPE_LRU_HASH)
// and of systemd's BPFDelegate…= settings (BPFMapTypeLruHash: the enumerator's
// words, each capitalized) into the kernel's own in mount options (lru_hash).
// It gives "" for what is a mixture.
func (e *enum) kernelName(word string) string {
	if !strings.HasPrefix(word, "BPF") {
		return word
	}
	if !strings.Contains(word, "_") {
		var b strings.Builder
		b.WriteString("BPF")
		for _, r := range word[len("BPF"):] {
			if unicode.IsUpper(r) {
				b.WriteByte('_')
			}
			b.WriteRune(unicode.ToUpper(r))
		}
		word = b.String()
	}
	name, ok := strings.CutPrefix(word, e.prefix)
	if !ok || name != strings.ToUpper(name) {
		return ""
	}
	return strings.ToLower(name)
}

// The enums, complete to kernel 7.2. That a running kernel has nothing which
// isn't here is tested against its BTF.
var (
	commands = enum{
		prefix: "BPF_",
		names: []string{
			"map_create", "map_lookup_elem", "map_update_elem", "map_delete_elem", "map_get_next_key",
			"prog_load", "obj_pin", "obj_get", "prog_attach", "prog_detach", "prog_test_run",
			"prog_get_next_id", "map_get_next_id", "prog_get_fd_by_id", "map_get_fd_by_id",
			"obj_get_info_by_fd", "prog_query", "raw_tracepoint_open", "btf_load", "btf_get_fd_by_id",
			"task_fd_query", "map_lookup_and_delete_elem", "map_freeze", "btf_get_next_id",
			"map_lookup_batch", "map_lookup_and_delete_batch", "map_update_batch", "map_delete_batch",
			"link_create", "link_update", "link_get_fd_by_id", "link_get_next_id", "enable_stats",
			"iter_create", "link_detach", "prog_bind_map", "token_create", "prog_stream_read_by_fd",
			"prog_assoc_struct_ops",
		},
		aliases: map[string]string{"prog_run": "prog_test_run"},
		group:   func(group) string { return "" },
	}
	mapTypes = enum{
		prefix: "BPF_MAP_TYPE_",
		names: []string{
			"", "hash", "array", "prog_array", "perf_event_array", "percpu_hash", "percpu_array",
			"stack_trace", "cgroup_array", "lru_hash", "lru_percpu_hash", "lpm_trie", "array_of_maps",
			"hash_of_maps", "devmap", "sockmap", "cpumap", "xskmap", "sockhash",
			"cgroup_storage_deprecated", "reuseport_sockarray", "percpu_cgroup_storage_deprecated",
			"queue", "stack", "sk_storage", "devmap_hash", "struct_ops", "ringbuf", "inode_storage",
			"task_storage", "bloom_filter", "user_ringbuf", "cgrp_storage", "arena", "insn_array", "rhash",
		},
		aliases: map[string]string{
			"cgroup_storage":        "cgroup_storage_deprecated",
			"percpu_cgroup_storage": "percpu_cgroup_storage_deprecated",
		},
		group: func(g group) string { return g.maps },
	}
	programs = enum{
		prefix: "BPF_PROG_TYPE_",
		names:  programNames(),
		group:  func(g group) string { return g.programs },
	}
	attachments = enum{
		prefix: "BPF_",
		names: []string{
			"cgroup_inet_ingress", "cgroup_inet_egress", "cgroup_inet_sock_create", "cgroup_sock_ops",
			"sk_skb_stream_parser", "sk_skb_stream_verdict", "cgroup_device", "sk_msg_verdict",
			"cgroup_inet4_bind", "cgroup_inet6_bind", "cgroup_inet4_connect", "cgroup_inet6_connect",
			"cgroup_inet4_post_bind", "cgroup_inet6_post_bind", "cgroup_udp4_sendmsg",
			"cgroup_udp6_sendmsg", "lirc_mode2", "flow_dissector", "cgroup_sysctl", "cgroup_udp4_recvmsg",
			"cgroup_udp6_recvmsg", "cgroup_getsockopt", "cgroup_setsockopt", "trace_raw_tp",
			"trace_fentry", "trace_fexit", "modify_return", "lsm_mac", "trace_iter",
			"cgroup_inet4_getpeername", "cgroup_inet6_getpeername", "cgroup_inet4_getsockname",
			"cgroup_inet6_getsockname", "xdp_devmap", "cgroup_inet_sock_release", "xdp_cpumap",
			"sk_lookup", "xdp", "sk_skb_verdict", "sk_reuseport_select", "sk_reuseport_select_or_migrate",
			"perf_event", "trace_kprobe_multi", "lsm_cgroup", "struct_ops", "netfilter", "tcx_ingress",
			"tcx_egress", "trace_uprobe_multi", "cgroup_unix_connect", "cgroup_unix_sendmsg",
			"cgroup_unix_recvmsg", "cgroup_unix_getpeername", "cgroup_unix_getsockname", "netkit_primary",
			"netkit_peer", "trace_kprobe_session", "trace_uprobe_session", "trace_fsession",
			"trace_fentry_multi", "trace_fexit_multi", "trace_fsession_multi",
		},
		never: map[string]string{
			"lsm_cgroup": "lsm_cgroup is never delegated: attaching such a program makes kernels crash (BUG on 6.16.12 and 6.18.15)",
		},
		group: func(g group) string { return g.attachments },
	}
)

// group is what one "@name" stands for in Maps=, Programs= and Attachments=.
type group struct{ maps, programs, attachments string }

// groups are disjoint, but for what two fields of use share.
var groups = map[string]group{
	// Maps of any use, and programs for one's own sockets.
	"basic": {
		maps: `hash array percpu_hash percpu_array lru_hash lru_percpu_hash lpm_trie rhash array_of_maps hash_of_maps
			prog_array insn_array queue stack bloom_filter ringbuf user_ringbuf perf_event_array arena
			sk_storage sockmap sockhash reuseport_sockarray`,
		programs: `socket_filter sk_reuseport sk_skb sk_msg`,
		attachments: `sk_skb_stream_parser sk_skb_stream_verdict sk_skb_verdict sk_msg_verdict
			sk_reuseport_select sk_reuseport_select_or_migrate`,
	},
	// Packets of devices, and sockets of network namespaces and cgroups.
	"network": {
		maps: `devmap devmap_hash cpumap xskmap cgroup_array cgrp_storage
			cgroup_storage_deprecated percpu_cgroup_storage_deprecated`,
		programs: `xdp sched_cls sched_act netfilter flow_dissector sk_lookup lwt_in lwt_out lwt_xmit lwt_seg6local
			cgroup_skb cgroup_sock cgroup_sock_addr cgroup_sockopt sock_ops`,
		attachments: `xdp xdp_devmap xdp_cpumap tcx_ingress tcx_egress netkit_primary netkit_peer
			netfilter flow_dissector sk_lookup cgroup_inet_ingress cgroup_inet_egress
			cgroup_inet_sock_create cgroup_inet_sock_release cgroup_sock_ops
			cgroup_inet4_bind cgroup_inet6_bind cgroup_inet4_post_bind cgroup_inet6_post_bind
			cgroup_inet4_connect cgroup_inet6_connect cgroup_unix_connect
			cgroup_udp4_sendmsg cgroup_udp6_sendmsg cgroup_unix_sendmsg
			cgroup_udp4_recvmsg cgroup_udp6_recvmsg cgroup_unix_recvmsg
			cgroup_inet4_getpeername cgroup_inet6_getpeername cgroup_unix_getpeername
			cgroup_inet4_getsockname cgroup_inet6_getsockname cgroup_unix_getsockname
			cgroup_getsockopt cgroup_setsockopt`,
	},
	// Watching processes and the kernel, without changing what they do.
	"tracing": {
		maps:     `stack_trace task_storage inode_storage cgroup_array cgrp_storage`,
		programs: `kprobe tracepoint perf_event raw_tracepoint tracing`,
		attachments: `perf_event trace_kprobe_multi trace_kprobe_session trace_uprobe_multi trace_uprobe_session
			trace_raw_tp trace_iter trace_fentry trace_fexit trace_fsession
			trace_fentry_multi trace_fexit_multi trace_fsession_multi`,
	},
}

// netAdminMaps are the map types for which the kernel asks CAP_NET_ADMIN.
var netAdminMaps = mapTypes.mask("devmap devmap_hash sockmap sockhash xskmap")
