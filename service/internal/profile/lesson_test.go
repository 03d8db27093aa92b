// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
)

func TestLesson(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		lesson Lesson
		want   Rights
		spare  []string // what is said to be perhaps not needed
	}{
		"xdp": {
			lesson: Lesson{
				Commands: commands.mask("map_create prog_load"), Maps: mapTypes.mask("array"),
				Programs: programs.mask("xdp"), Attachments: attachments.mask("cgroup_inet_ingress xdp"),
				Helpers: []string{"map_lookup_elem"}, MaxPrograms: 3, MaxMaps: 20, MaxMapBytes: 100_000,
				Attach: Attach{Interfaces: ReachOwn},
			},
			want: Rights{
				Commands: commands.mask("map_create prog_load"), Maps: mapTypes.mask("array"),
				Programs: programs.mask("xdp"), Attachments: attachments.mask("cgroup_inet_ingress xdp"),
				Capabilities: []string{capBPF, capNetAdmin},
				Helpers:      Names{List: []string{"map_lookup_elem"}}, Kfuncs: Names{List: []string{noKfunc}},
				MaxPrograms: 32, MaxMaps: 64, MaxMapBytes: 262144,
				Attach: Attach{Interfaces: ReachOwn},
			},
		},
		"a library's tries": {
			lesson: Lesson{
				Commands: commands.mask("prog_load btf_load"), Programs: programs.mask("xdp kprobe"),
				Attachments: attachments.mask("cgroup_inet_ingress xdp cgroup_inet_sock_create"),
				Helpers:     []string{"map_lookup_elem", "get_func_ip"},
				Short: Short{
					Programs: programs.mask("kprobe"), Attachments: attachments.mask("cgroup_inet_ingress cgroup_inet_sock_create"),
					Helpers: []string{"get_func_ip"},
				},
			},
			want: Rights{
				Commands: commands.mask("prog_load btf_load"), Programs: programs.mask("xdp kprobe"),
				Attachments:  attachments.mask("cgroup_inet_ingress xdp cgroup_inet_sock_create"),
				Capabilities: []string{capBPF, capNetAdmin, capPerfmon},
				Helpers:      Names{List: []string{"map_lookup_elem", "get_func_ip"}}, Kfuncs: Names{List: []string{noKfunc}},
				MaxPrograms: 32, MaxMaps: 32, MaxMapBytes: 65536,
			},
			spare: []string{"btf_load", "kprobe", "cgroup_inet_sock_create", "CAP_PERFMON", "get_func_ip"},
		},
		"an attach type that no program says": {
			lesson: Lesson{Programs: programs.mask("cgroup_skb"), Attachments: 1, Attach: Attach{Cgroups: ReachAny}},
			want: Rights{
				Programs: programs.mask("cgroup_skb"), Attachments: 1, Capabilities: []string{capBPF},
				Helpers: Names{List: []string{noHelper}}, Kfuncs: Names{List: []string{noKfunc}},
				MaxPrograms: 32, MaxMaps: 32, MaxMapBytes: 65536, Attach: Attach{Cgroups: ReachAny},
			},
		},
		"a helper that needs a capability": {
			lesson: Lesson{Programs: programs.mask("socket_filter"), Attachments: 1, Helpers: []string{"trace_printk", "probe_write_user"}, Kfuncs: []string{"bpf_x"}},
			want: Rights{
				Programs: programs.mask("socket_filter"), Attachments: 1, Capabilities: []string{capBPF, capPerfmon, capSysAdmin},
				Helpers: Names{List: []string{"trace_printk", "probe_write_user"}}, Kfuncs: Names{List: []string{"bpf_x"}},
				MaxPrograms: 32, MaxMaps: 32, MaxMapBytes: 65536,
			},
		},
		"functions of modules": {
			lesson: Lesson{Programs: programs.mask("xdp"), Attachments: attachments.mask("xdp") | 1, Helpers: helpers, ModuleKfuncs: true},
			want: Rights{
				Programs: programs.mask("xdp"), Attachments: attachments.mask("xdp") | 1, Capabilities: []string{capBPF, capNetAdmin, capPerfmon, capSysAdmin},
				Helpers: Names{List: helpers}, MaxPrograms: 32, MaxMaps: 32, MaxMapBytes: 65536,
			},
		},
		"maps alone": {
			lesson: Lesson{Commands: commands.mask("map_create"), Maps: mapTypes.mask("hash sockmap"), MaxMaps: 2, MaxMapBytes: 1 << 40},
			want: Rights{
				Commands: commands.mask("map_create"), Maps: mapTypes.mask("hash sockmap"), Capabilities: []string{capBPF, capNetAdmin},
				MaxPrograms: 32, MaxMaps: 32, MaxMapBytes: 1 << 41,
			},
		},
		"nothing": {want: Rights{Capabilities: []string{capBPF}, MaxPrograms: 32, MaxMaps: 32, MaxMapBytes: 65536}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text := test.lesson.Text(time.Hour)
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "learnt.profile"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			p, err := Load(config.Dirs{Etc: dir}).Get("learnt")
			if err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			if diff := cmp.Diff(&test.want, p.Rights()); diff != "" {
				t.Errorf("%s\n%s", diff, text)
			}
			if p.Lease != time.Hour {
				t.Errorf("the lease is %s", p.Lease)
			}
			var spare []string
			for line := range strings.Lines(text) {
				if len(line) > 200 {
					t.Errorf("a long line: %s", line)
				}
				if names, ok := strings.CutPrefix(line, "# Perhaps not needed: "); ok {
					spare = append(spare, strings.Fields(names)...)
				}
			}
			if diff := cmp.Diff(test.spare, spare); diff != "" {
				t.Errorf("not needed (-want +got):\n%s\n%s", diff, text)
			}
		})
	}
}

func TestWithheld(t *testing.T) {
	t.Parallel()
	r := &Rights{Commands: commands.mask("map_create"), Maps: mapTypes.all(), Programs: programs.all() &^ programs.mask("xdp"), Attachments: attachments.all()}
	want := []Withheld{
		{"token mask", "[Delegate] Commands=", []string{"prog_load", "btf_load"}},
		{"token mask", "[Delegate] Programs=", []string{"xdp"}},
		{"namespace capability", "[Guard] Capabilities=", []string{capNetAdmin, capPerfmon, capSysAdmin}},
	}
	if diff := cmp.Diff(want, r.Withheld([]string{capBPF})); diff != "" {
		t.Error(diff)
	}
}
