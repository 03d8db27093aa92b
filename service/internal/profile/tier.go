// SPDX-License-Identifier: Apache-2.0

package profile

import "slices"

// Tier is what a profile is worth to an attacker; a higher one is worth more.
type Tier int

const (
	// Basic is maps, and programs that reach only the user's own sockets.
	Basic Tier = iota
	// Network reaches network namespaces and cgroups of the user's own.
	Network
	// Tracing reads other processes and the kernel.
	Tracing
	// Unlimited changes what others do, or reaches beyond the user's own.
	Unlimited
)

// String gives "basic", "network", "tracing" or "unlimited".
func (t Tier) String() string {
	return [...]string{"basic", "network", "tracing", "unlimited"}[t]
}

// MarshalText gives the same word as String.
func (t Tier) MarshalText() ([]byte, error) {
	return []byte(t.String()), nil
}

// target is the kind of thing that programs of a type are attached to.
type target int

const (
	ownSockets target = iota
	interfaces
	cgroups
	processes
)

// programType is a row of the table of program types.
type programType struct {
	name string
	// caps are needed in the token's user namespace beside CAP_BPF.
	caps []string
	// target picks the key of [Attach] that confines the type.
	target target
	// free is the tier when the holder attaches wherever the kernel lets him,
	// held the tier when the guard confines him to [Attach].
	free, held Tier
	// sendsZero: loaders send expected_attach_type 0 for it, always or when a
	// probe of theirs fails, so it needs bit 0 of the attach types to load.
	sendsZero bool
}

var (
	net     = []string{capNetAdmin}
	perf    = []string{capPerfmon}
	netPerf = []string{capNetAdmin, capPerfmon}
)

// programTypes is indexed by value. The capabilities were tried on 6.18, the
// reach as the comments say; LINK_CREATE, PROG_ATTACH, RAW_TRACEPOINT_OPEN and
// PROG_TEST_RUN look neither at a token nor at capabilities.
var programTypes = [...]programType{
	0: {},
	// A filter runs on a socket of one's own.
	1: {"socket_filter", nil, ownSockets, Basic, Basic, true},
	// Attached through perf_event_open only, for which the kernel asks
	// CAP_PERFMON on the host: the holder can't. See also attachTiers.
	2: {"kprobe", perf, processes, Tracing, Tracing, true},
	// tcx takes any device of the current network namespace, be it the host's;
	// and PROG_TEST_RUN with clone_redirect sends packets out of it (tried).
	3: {"sched_cls", net, interfaces, Unlimited, Network, true},
	// Attached by netlink, in an owned namespace only, but PROG_TEST_RUN sends
	// packets out of the current one, as with sched_cls (tried).
	4: {"sched_act", net, interfaces, Unlimited, Network, true},
	// With perf_event_paranoid below 3 anybody may open a tracepoint for
	// himself, and its program then sees every process (tried).
	5: {"tracepoint", perf, processes, Unlimited, Tracing, true},
	// A link takes any device of the current network namespace.
	6: {"xdp", net, interfaces, Unlimited, Network, true},
	// An event of one's own runs it in one's own process, but it reads the kernel.
	7: {"perf_event", perf, processes, Tracing, Tracing, true},
	// Any cgroup whose directory can be opened, the root too. The same for all
	// cgroup types below.
	8: {"cgroup_skb", nil, cgroups, Unlimited, Network, false},
	9: {"cgroup_sock", net, cgroups, Unlimited, Network, false},
	// Routes are set by netlink, in an owned namespace only.
	10: {"lwt_in", net, interfaces, Network, Network, true},
	11: {"lwt_out", net, interfaces, Network, Network, true},
	// As lwt_in, but PROG_TEST_RUN sends packets out of the current network
	// namespace, as with sched_cls (tried).
	12: {"lwt_xmit", net, interfaces, Unlimited, Network, true},
	13: {"sock_ops", net, cgroups, Unlimited, Network, true},
	// Attached to a sockmap of one's own, with one's own sockets.
	14: {"sk_skb", net, ownSockets, Basic, Basic, true},
	15: {"cgroup_device", net, cgroups, Unlimited, Network, true},
	// As sk_skb.
	16: {"sk_msg", net, ownSockets, Basic, Basic, true},
	// RAW_TRACEPOINT_OPEN takes any of the whole kernel.
	17: {"raw_tracepoint", perf, processes, Unlimited, Tracing, true},
	18: {"cgroup_sock_addr", net, cgroups, Unlimited, Network, false},
	// As lwt_in.
	19: {"lwt_seg6local", net, interfaces, Network, Network, true},
	// Any infrared receiver whose device can be opened.
	20: {"lirc_mode2", nil, interfaces, Unlimited, Network, true},
	// Selects among sockets of one's own.
	21: {"sk_reuseport", nil, ownSockets, Basic, Basic, false},
	// Any network namespace whose descriptor is held.
	22: {"flow_dissector", net, interfaces, Unlimited, Network, true},
	23: {"cgroup_sysctl", net, cgroups, Unlimited, Network, false},
	// Writes into the arguments of whoever passes the tracepoint.
	24: {"raw_tracepoint_writable", perf, processes, Unlimited, Unlimited, true},
	25: {"cgroup_sockopt", net, cgroups, Unlimited, Network, false},
	// Any kernel function, tracepoint or iterator.
	26: {"tracing", perf, processes, Unlimited, Tracing, false},
	// Replaces functions of the kernel itself, such as congestion control.
	27: {"struct_ops", perf, processes, Unlimited, Unlimited, true},
	// Replaces functions of any program whose descriptor is held.
	28: {"ext", netPerf, processes, Unlimited, Tracing, true},
	// Can deny anything to anybody.
	29: {"lsm", perf, processes, Unlimited, Unlimited, false},
	// Any network namespace whose descriptor is held.
	30: {"sk_lookup", nil, interfaces, Unlimited, Network, false},
	// PROG_TEST_RUN runs it, and its kfuncs (hid_bpf_hw_request,
	// hid_bpf_input_report) reach every keyboard of the host.
	31: {"syscall", nil, processes, Unlimited, Unlimited, true},
	// Hooks of the current network namespace.
	32: {"netfilter", net, interfaces, Unlimited, Network, false},
}

func programNames() []string {
	var names []string
	for _, t := range programTypes {
		names = append(names, t.name)
	}
	return names
}

// zeroSenders are the program types that need bit 0 of the attach types.
var zeroSenders = func() (m Mask) {
	for bit, t := range programTypes {
		if t.sendsZero {
			m |= 1 << bit
		}
	}
	return m
}()

// attachTiers are the attach types that give a program type more than its row.
var attachTiers = []struct {
	program, attach Mask
	free, held      Tier
}{
	// A link takes any kernel function, or any file that processes map.
	{
		programs.mask("kprobe"),
		attachments.mask("trace_kprobe_multi trace_kprobe_session trace_uprobe_multi trace_uprobe_session"),
		Unlimited, Tracing,
	},
	// Changes what kernel functions answer.
	{programs.mask("tracing"), attachments.mask("modify_return"), Unlimited, Unlimited},
}

// actingHelpers and actingKfuncs let a tracing program change what the process
// that it runs in does.
var (
	actingHelpers = []string{"probe_write_user", "override_return", "send_signal", "send_signal_thread"}
	actingKfuncs  = []string{"bpf_send_signal_task", "bpf_sock_destroy"}
)

// mayAct says whether the guard leaves any of those to a program.
func (p *Profile) mayAct() bool {
	for _, h := range actingHelpers {
		// The kernel asks CAP_SYS_ADMIN for this one.
		if h == "probe_write_user" && p.guardRefuses(capSysAdmin) {
			continue
		}
		if p.Helpers.Allows(h) {
			return true
		}
	}
	return slices.ContainsFunc(actingKfuncs, p.Kfuncs.Allows)
}

// guardRefuses says whether the guard, where it is, refuses a capability.
func (p *Profile) guardRefuses(capability string) bool {
	return p.Capabilities != nil && !slices.Contains(p.Capabilities, capability)
}

// Tier computes what the profile is worth from the rights as they would be
// enforced. With guarded, the limits of [Guard] and [Attach] hold: no
// attachment beyond [Attach], which includes PROG_TEST_RUN in a network
// namespace that isn't the grant's own. Without, only the masks do. The guard
// never makes it higher.
func (p *Profile) Tier(guarded bool) Tier {
	tier := Basic
	for bit := range 64 {
		if p.Programs.Has(bit) {
			tier = max(tier, p.programTier(bit, guarded))
		}
	}
	// Whoever owns a user namespace has CAP_PERFMON in it, and a token then
	// gives programs of every type probe_read_kernel and pointers (tried: a
	// socket_filter with PROG_TEST_RUN). Only the guard can refuse it.
	if p.Programs != 0 && !(guarded && p.guardRefuses(capPerfmon)) {
		tier = max(tier, Tracing)
	}
	return tier
}

// programTier is the part of one program type in the tier.
func (p *Profile) programTier(bit int, guarded bool) Tier {
	// No reader of files makes a type that isn't in the table.
	if bit >= len(programTypes) {
		return Unlimited
	}
	t := programTypes[bit]
	free, held := t.free, t.held
	for _, a := range attachTiers {
		if a.program.Has(bit) && a.attach&p.Attachments != 0 {
			free, held = max(free, a.free), max(held, a.held)
		}
	}
	if !guarded || p.reach(t.target) == ReachAny {
		return free
	}
	// A program's descriptor can leave the namespace that the guard confines,
	// which then only sees the attachment: such a program mustn't act.
	if free == Unlimited && held == Tracing && p.mayAct() {
		return Unlimited
	}
	return held
}

// Targets says for which kinds of targets, of those that [Attach] names, the
// profile delegates programs.
func (p *Profile) Targets() (hasInterfaces, hasCgroups, hasProcesses bool) {
	var has [processes + 1]bool
	for bit, t := range programTypes {
		if p.Programs.Has(bit) {
			has[t.target] = true
		}
	}
	return has[interfaces], has[cgroups], has[processes]
}

func (p *Profile) reach(t target) Reach {
	switch t {
	case interfaces:
		return p.Attach.Interfaces
	case cgroups:
		return p.Attach.Cgroups
	case processes:
		return p.Attach.Processes
	default:
		return ReachOwn
	}
}
