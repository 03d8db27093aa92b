// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
)

const shipped = "../../../packaging/profiles"

func shippedFiles(t testing.TB) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	paths, err := filepath.Glob(filepath.Join(shipped, "*.profile"))
	if err != nil || len(paths) != 4 {
		t.Fatal(paths, err)
	}
	for _, path := range paths {
		if files[filepath.Base(path)], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// shippedDirs has copies: a checkout may be anybody's.
func shippedDirs(t testing.TB) config.Dirs {
	t.Helper()
	files := map[string]string{}
	for name, data := range shippedFiles(t) {
		files["usr/"+name] = string(data)
	}
	return tree(t, files)
}

func TestShipped(t *testing.T) {
	t.Parallel()
	s := Load(shippedDirs(t))
	if errs := s.Errors(); errs != nil {
		t.Fatal(errs)
	}
	type tiers struct{ Guarded, Free Tier }
	got := map[string]tiers{}
	for _, p := range s.All() {
		got[p.Name] = tiers{p.Tier(true), p.Tier(false)}
		if !p.NeedsGuard() || p.NotEnforced() == nil || p.Description == "" {
			t.Errorf("%s: %+v", p.Name, p)
		}
	}
	want := map[string]tiers{
		// Without the guard its programs read the kernel, see Tier.
		"basic":     {Basic, Tracing},
		"network":   {Network, Unlimited},
		"tracing":   {Tracing, Unlimited},
		"unlimited": {Unlimited, Unlimited},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// What the shipped profiles expand to. UPDATE_GOLDEN=1 renews the files.
func TestShippedGolden(t *testing.T) {
	t.Parallel()
	for _, p := range Load(shippedDirs(t)).All() {
		got, err := json.MarshalIndent(map[string]any{
			"commands":     CommandNames(p.Commands),
			"maps":         MapNames(p.Maps),
			"programs":     ProgramNames(p.Programs),
			"attachments":  AttachmentNames(p.Attachments),
			"capabilities": p.AmbientCapabilities(),
			"lease":        p.Lease.String(),
			"guard":        p.Guard.String(),
			"notEnforced":  p.NotEnforced(),
		}, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join("testdata", p.Name+".golden")
		if os.Getenv("UPDATE_GOLDEN") != "" {
			if err := os.WriteFile(path, append(got, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(strings.TrimSpace(string(want)), string(got)); diff != "" {
			t.Errorf("%s: %s", p.Name, diff)
		}
	}
}

// What libbpf and cilium/ebpf load to try out a kernel, before what they are
// asked to load. A probe that is refused makes them do without the feature.
func TestShippedServeProbes(t *testing.T) {
	t.Parallel()
	s := Load(shippedDirs(t))
	for _, test := range []struct {
		profile, program, attach, why string
	}{
		{"basic", "socket_filter", "cgroup_inet_ingress", "libbpf: names, global data; cilium: bpf2bpf calls, ext_infos"},
		{"network", "socket_filter", "cgroup_inet_ingress", "the same"},
		{"tracing", "socket_filter", "cgroup_inet_ingress", "the same"},
		{"network", "cgroup_sock", "cgroup_inet_sock_create", "libbpf: expected_attach_type"},
		{"network", "cgroup_skb", "cgroup_inet_ingress", "cilium: PROG_ATTACH"},
		{"network", "sched_cls", "cgroup_inet_ingress", "cilium: tcx, netkit"},
		{"network", "xdp", "cgroup_inet_ingress", "libbpf without expected_attach_type"},
		{"tracing", "tracepoint", "cgroup_inet_ingress", "libbpf: probe_read_kernel, perf links, cookies"},
		{"tracing", "kprobe", "cgroup_inet_ingress", "libbpf: context arguments; cilium: probe_read_kernel, perf links"},
		{"tracing", "kprobe", "trace_uprobe_multi", "libbpf: uprobe.multi"},
	} {
		p, err := s.Get(test.profile)
		if err != nil {
			t.Fatal(err)
		}
		program, attach := programs.mask(test.program), attachments.mask(test.attach)
		if p.Programs&program == 0 || p.Attachments&attach == 0 {
			t.Errorf("%s: %s with %s is refused (%s)", test.profile, test.program, test.attach, test.why)
		}
	}
	for _, p := range s.All() {
		if p.Maps&mapTypes.mask("array") == 0 || p.Commands&commands.mask("map_create prog_load btf_load") == 0 {
			t.Errorf("%s: global data is refused", p.Name)
		}
	}
}
