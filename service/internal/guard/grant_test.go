// SPDX-License-Identifier: Apache-2.0

package guard

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/bpf"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

func TestLimits(t *testing.T) {
	t.Parallel()
	all := bpf.GuardGrant{State: stateLive, Capabilities: ^uint64(0)}
	for name, test := range map[string]struct {
		limits Limits
		want   func(*bpf.GuardGrant)
	}{
		"none": {Limits{Profile: &profile.Profile{}}, func(*bpf.GuardGrant) {}},
		"numbers": {
			Limits{Profile: &profile.Profile{MaxPrograms: 1, MaxMaps: 2, MaxMapBytes: 3}, Deadline: 4, Owner: 5},
			func(g *bpf.GuardGrant) { g.MaxPrograms, g.MaxMaps, g.MaxMapBytes, g.Deadline, g.Owner = 1, 2, 3, 4, 5 },
		},
		"capabilities": {
			Limits{Profile: &profile.Profile{Capabilities: []string{"CAP_BPF", "CAP_NET_ADMIN"}}},
			func(g *bpf.GuardGrant) { g.Capabilities = 1<<39 | 1<<12 },
		},
		"no capability": {
			Limits{Profile: &profile.Profile{Capabilities: []string{}}},
			func(g *bpf.GuardGrant) { g.Capabilities = 0 },
		},
		"helpers": {
			Limits{Profile: &profile.Profile{Helpers: profile.Names{List: []string{"map_lookup_elem", "probe_read_kernel", "cgrp_storage_delete"}}}},
			func(g *bpf.GuardGrant) {
				g.CheckHelpers, g.Helpers = 1, [4]uint64{1 << 1, 1 << (113 - 64), 0, 1 << (211 - 192)}
			},
		},
		"helpers denied": {
			Limits{Profile: &profile.Profile{Helpers: profile.Names{Deny: true, List: []string{"map_lookup_elem"}}}},
			func(g *bpf.GuardGrant) {
				g.CheckHelpers, g.Helpers = 1, [4]uint64{^uint64(3), ^uint64(0), ^uint64(0), 1<<(212-192) - 1}
			},
		},
		"targets": {
			Limits{Profile: &profile.Profile{
				Programs: 1<<1 | 1<<8 | 1<<17,
				Attach:   profile.Attach{Interfaces: profile.ReachAny, Cgroups: profile.ReachOwn},
			}},
			func(g *bpf.GuardGrant) { g.Kinds, g.Reach = 1<<1|1<<2, [3]uint8{2, 1, 0} },
		},
	} {
		want := all
		test.want(&want)
		got, err := new(Guard).limits(test.limits)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}
