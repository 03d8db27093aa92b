// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"encoding/json"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A token's capabilities, as the kernel asks them on 6.18, and the tiers of
// each program type: without the guard, with a guard that holds the shipped
// kind of limits, and with one that does that but for [Attach] = any.
func TestTierOfProgramTypes(t *testing.T) {
	t.Parallel()
	const (
		b, n, tr, u = Basic, Network, Tracing, Unlimited
		N, P        = capNetAdmin, capPerfmon
	)
	tests := []struct {
		program, attach string
		caps            []string
		free, held, any Tier
	}{
		{"socket_filter", "", nil, tr, b, b},
		{"sk_reuseport", "", nil, tr, b, b},
		{"sk_skb", "", []string{N}, tr, b, b},
		{"sk_msg", "", []string{N}, tr, b, b},

		{"sched_cls", "", []string{N}, u, n, u},
		{"sched_cls", "tcx_ingress", []string{N}, u, n, u},
		{"sched_act", "", []string{N}, u, n, u},
		{"xdp", "", []string{N}, u, n, u},
		{"lwt_in", "", []string{N}, tr, n, n},
		{"lwt_out", "", []string{N}, tr, n, n},
		{"lwt_xmit", "", []string{N}, u, n, u},
		{"lwt_seg6local", "", []string{N}, tr, n, n},
		{"netfilter", "", []string{N}, u, n, u},
		{"flow_dissector", "", []string{N}, u, n, u},
		{"sk_lookup", "", nil, u, n, u},
		{"lirc_mode2", "", nil, u, n, u},

		{"cgroup_skb", "", nil, u, n, u},
		{"cgroup_skb", "cgroup_inet_egress", nil, u, n, u},
		{"cgroup_sock", "", []string{N}, u, n, u},
		{"cgroup_sock_addr", "", []string{N}, u, n, u},
		{"cgroup_sockopt", "", []string{N}, u, n, u},
		{"cgroup_sysctl", "", []string{N}, u, n, u},
		{"cgroup_device", "", []string{N}, u, n, u},
		{"sock_ops", "", []string{N}, u, n, u},

		{"kprobe", "", []string{P}, tr, tr, tr},
		{"kprobe", "perf_event", []string{P}, tr, tr, tr},
		{"kprobe", "trace_kprobe_multi", []string{P}, u, tr, u},
		{"kprobe", "trace_kprobe_session", []string{P}, u, tr, u},
		{"kprobe", "trace_uprobe_multi", []string{P}, u, tr, u},
		{"kprobe", "trace_uprobe_session", []string{P}, u, tr, u},
		{"tracepoint", "", []string{P}, u, tr, u},
		{"perf_event", "", []string{P}, tr, tr, tr},
		{"raw_tracepoint", "", []string{P}, u, tr, u},
		{"tracing", "trace_fentry", []string{P}, u, tr, u},
		{"tracing", "trace_iter", []string{P}, u, tr, u},
		{"ext", "", []string{N, P}, u, tr, u},

		{"tracing", "modify_return", []string{P}, u, u, u},
		{"raw_tracepoint_writable", "", []string{P}, u, u, u},
		{"struct_ops", "", []string{P}, u, u, u},
		{"lsm", "", []string{P}, u, u, u},
		{"syscall", "", nil, u, u, u},
	}
	const (
		base  = "[Guard]\nHelpers=~probe_write_user ~override_return ~send_signal ~send_signal_thread\nKfuncs=~bpf_send_signal_task ~bpf_sock_destroy\n"
		own   = "[Attach]\nInterfaces=own\nCgroups=own\nProcesses=own\n"
		wide  = "[Attach]\nInterfaces=any\nCgroups=any\nProcesses=any\n"
		noNet = "[Guard]\nCapabilities=CAP_BPF CAP_NET_ADMIN\n"
	)
	seen := Mask(0)
	for _, test := range tests {
		t.Run(test.program+" "+test.attach, func(t *testing.T) {
			t.Parallel()
			text := "[Delegate]\nPrograms=" + test.program + "\nAttachments=" + test.attach + "\n"
			bare := parsed(t, text)
			if got := bare.Tier(false); got != test.free {
				t.Errorf("free: %v, want %v", got, test.free)
			}
			caps := append([]string{capBPF}, test.caps...)
			if diff := cmp.Diff(caps, bare.AmbientCapabilities()); diff != "" {
				t.Error(diff)
			}
			// Without a word about capabilities, nothing keeps CAP_PERFMON out.
			if got := bare.Tier(true); got < Tracing {
				t.Errorf("guarded without Capabilities=: %v", got)
			}
			for attach, want := range map[string]Tier{"": test.held, own: test.held, wide: test.any} {
				limited := parsed(t, text+base+attach+noNet)
				if got := limited.Tier(true); got != want {
					t.Errorf("guarded with %q: %v, want %v", attach, got, want)
				}
				// The limits count for nothing where nobody holds them.
				if got := limited.Tier(false); got != test.free {
					t.Errorf("free, with limits: %v, want %v", got, test.free)
				}
			}
		})
		bit, _ := programs.index(test.program)
		seen |= 1 << bit
	}
	if missing := ProgramNames(programs.all() &^ seen); missing != nil {
		t.Errorf("no row for %v", missing)
	}
}

func TestTierCombinations(t *testing.T) {
	t.Parallel()
	const traced = "[Delegate]\nPrograms=raw_tracepoint\n[Guard]\nCapabilities=CAP_BPF CAP_PERFMON\n"
	for _, test := range []struct {
		name, text    string
		free, guarded Tier
	}{
		{"nothing", "", Basic, Basic},
		{"maps alone", "[Delegate]\nCommands=any\nMaps=any\nAttachments=any\n", Basic, Basic},
		// Bit 0 comes by itself, and isn't the right to attach to cgroups.
		{"bit 0", "[Delegate]\nPrograms=socket_filter\n[Guard]\nCapabilities=CAP_BPF\n", Tracing, Basic},
		{"perfmon is allowed", "[Delegate]\nPrograms=socket_filter\n[Guard]\nCapabilities=CAP_BPF CAP_PERFMON\n", Tracing, Tracing},
		{"the highest counts", "[Delegate]\nPrograms=socket_filter xdp\n[Guard]\nCapabilities=CAP_BPF CAP_NET_ADMIN\n", Unlimited, Network},
		{"network and tracing", traced + "Helpers=loop\nKfuncs=a\n[Delegate]\nPrograms=xdp\n", Unlimited, Tracing},
		{"everything", "[Delegate]\nPrograms=any\nAttachments=any\n", Unlimited, Unlimited},

		// The guard has to take away what acts; an allow list does it too.
		{"acting", traced, Unlimited, Unlimited},
		{"acting by kfunc", traced + "Helpers=loop\n", Unlimited, Unlimited},
		{"acting by helper", traced + "Helpers=loop send_signal\nKfuncs=a\n", Unlimited, Unlimited},
		{"not acting", traced + "Helpers=loop\nKfuncs=a\n", Unlimited, Tracing},
		{"probe_write_user without its capability", traced + "Helpers=loop probe_write_user\nKfuncs=a\n", Unlimited, Tracing},
		{"probe_write_user with it", traced + "Capabilities=CAP_SYS_ADMIN\nHelpers=loop probe_write_user\nKfuncs=a\n", Unlimited, Unlimited},
		{"the other kind of target", traced + "Helpers=loop\nKfuncs=a\n[Attach]\nInterfaces=any\nCgroups=any\n", Unlimited, Tracing},
		// What gives a program type more is the type's own attach type.
		{"foreign attach type", "[Delegate]\nPrograms=kprobe\nAttachments=modify_return\n", Tracing, Tracing},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := parsed(t, test.text)
			if free, guarded := p.Tier(false), p.Tier(true); free != test.free || guarded != test.guarded {
				t.Errorf("%v and %v, want %v and %v", free, guarded, test.free, test.guarded)
			}
		})
	}
	if got := (&Profile{Programs: 1 << 63}).Tier(true); got != Unlimited {
		t.Errorf("a type that nobody knows: %v", got)
	}
}

// More rights never make a tier lower, and the guard never makes it higher.
func TestTierIsMonotonic(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		p := Profile{
			Programs:    Mask(r.Uint64()&r.Uint64()) & programs.all(),
			Attachments: Mask(r.Uint64()&r.Uint64()) & attachments.all(),
			Attach:      Attach{Reach(r.IntN(3)), Reach(r.IntN(3)), Reach(r.IntN(3))},
		}
		if r.IntN(2) == 0 {
			p.Capabilities = []string{capBPF}
			p.Helpers = Names{List: []string{"loop"}}
			p.Kfuncs = Names{List: []string{"a"}}
		}
		more := p
		more.Programs |= 1 << (1 + r.IntN(len(programTypes)-1))
		more.Attachments |= 1 << r.IntN(len(attachments.names))
		more.Attach.Processes = ReachAny
		for _, guarded := range []bool{false, true} {
			if more.Tier(guarded) < p.Tier(guarded) {
				t.Fatalf("%+v is %v, but %+v is %v", p, p.Tier(guarded), more, more.Tier(guarded))
			}
		}
		if p.Tier(true) > p.Tier(false) {
			t.Fatalf("%+v: the guard makes it %v instead of %v", p, p.Tier(true), p.Tier(false))
		}
	}
}

func TestAmbientCapabilities(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]string{
		"":                                        {capBPF},
		"[Delegate]\nMaps=hash\n":                 {capBPF},
		"[Delegate]\nMaps=xskmap\n":               {capBPF, capNetAdmin},
		"[Delegate]\nPrograms=kprobe xdp\n":       {capBPF, capNetAdmin, capPerfmon},
		"[Delegate]\nPrograms=any\nMaps=any\n":    {capBPF, capNetAdmin, capPerfmon},
		good + "[Guard]\nCapabilities=CAP_BPF\n":  {capBPF},
		"[Guard]\nCapabilities=CAP_SYS_ADMIN\n":   {capSysAdmin},
		good + "[Guard]\nCapabilities=\nHelpers=": {capBPF},
	} {
		if diff := cmp.Diff(want, parsed(t, text).AmbientCapabilities()); diff != "" {
			t.Errorf("%q: %s", text, diff)
		}
	}
}

func TestTierText(t *testing.T) {
	t.Parallel()
	got, err := json.Marshal([]Tier{Basic, Network, Tracing, Unlimited})
	if want := `["basic","network","tracing","unlimited"]`; err != nil || string(got) != want {
		t.Errorf("%s, %v", got, err)
	}
}
