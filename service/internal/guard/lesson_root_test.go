// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"errors"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// What is learnt is what was done: neither less, nor what others do or what was
// refused.
func TestLesson(t *testing.T) {
	g := open(t)
	const both = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
	root := openFile(t, "/sys/fs/cgroup")
	own, _ := cgroup(t, "learnt", testtarget.Alice)
	for name, test := range map[string]struct {
		namespaces uintptr
		do         func(*testtarget.Process)
		want       profile.Lesson
	}{
		"nothing": {both, func(*testtarget.Process) {}, profile.Lesson{}},
		"maps": {both, func(p *testtarget.Process) {
			expect(t, p, 0, "map", mapping(mapHash, 10))
			expect(t, p, 0, "map", mapping(mapArray, 1))
			expect(t, p, 0, "dropall", nil)
		}, profile.Lesson{Commands: 1 << 0, Maps: 1<<mapHash | 1<<mapArray, MaxMaps: 2, MaxMapBytes: hash(10) + 8}},
		"helpers": {both, func(p *testtarget.Process) {
			expect(t, p, 0, "load", loading(program{Type: typeSocketFilter, Instructions: []uint64{helper(5), zero, exit}}))
			expect(t, p, 0, "load", loading(program{Type: typeSocketFilter, Instructions: []uint64{helper(7), zero, exit}}))
			expect(t, p, 0, "dropall", nil)
		}, profile.Lesson{Commands: 1 << 5, Programs: 1 << typeSocketFilter, Attachments: 1, Helpers: []string{"ktime_get_ns", "get_prandom_u32"}, MaxPrograms: 2}},
		"a long program": {both, func(p *testtarget.Process) {
			expect(t, p, 0, "load", loading(program{Type: typeSocketFilter, Instructions: []uint64{helper(5), zero, zero, zero, zero, zero, zero, zero, exit}}))
			expect(t, p, 0, "load", loading(program{Type: typeSocketFilter, Instructions: []uint64{helper(7), zero, exit}}))
			expect(t, p, 0, "load", loading(simple[typeXDP]))
			expect(t, p, 0, "dropall", nil)
		}, profile.Lesson{
			Commands: 1 << 5, Programs: 1<<typeSocketFilter | 1<<typeXDP, Attachments: 1 | 1<<attachXDP, Helpers: []string{"ktime_get_ns", "get_prandom_u32"}, MaxPrograms: 3,
			Short: profile.Short{Programs: 1 << typeXDP, Attachments: 1 << attachXDP, Helpers: []string{"get_prandom_u32"}},
		}},
		"its own interfaces": {both | unix.CLONE_NEWNET, func(p *testtarget.Process) {
			expect(t, p, 0, "load", loading(simple[typeXDP]))
			expect(t, p, 0, "link", []string{"1", strconv.Itoa(attachXDP)})
			expect(t, p, 0, "run", nil)
			expect(t, p, 0, "dropall", nil)
		}, profile.Lesson{Commands: 1 << 5, Programs: 1 << typeXDP, Attachments: 1 << attachXDP, MaxPrograms: 1, Attach: profile.Attach{Interfaces: profile.ReachOwn}}},
		"a run in the host's network": {both, func(p *testtarget.Process) {
			expect(t, p, 0, "load", loading(simple[typeXDP]))
			expect(t, p, 0, "run", nil)
			expect(t, p, 0, "dropall", nil)
		}, profile.Lesson{Commands: 1 << 5, Programs: 1 << typeXDP, Attachments: 1 << attachXDP, MaxPrograms: 1, Attach: profile.Attach{Interfaces: profile.ReachAny}}},
		"its own cgroup": {both, func(p *testtarget.Process) {
			expect(t, p, 0, "load", loading(simple[typeCgroupSKB]))
			expect(t, p, 0, "link", []string{"", strconv.Itoa(attachEgress)}, own)
			expect(t, p, 0, "dropall", nil)
		}, profile.Lesson{Commands: 1 << 5, Programs: 1 << typeCgroupSKB, Attachments: 1 << attachEgress, MaxPrograms: 1, Attach: profile.Attach{Cgroups: profile.ReachOwn}}},
		"the root cgroup and an update": {both, func(p *testtarget.Process) {
			expect(t, p, 0, "load", loading(simple[typeCgroupSKB]))
			expect(t, p, 0, "link", []string{"", strconv.Itoa(attachEgress)}, root)
			expect(t, p, 0, "update", nil)
			expect(t, p, 0, "dropall", nil)
		}, profile.Lesson{Commands: 1 << 5, Programs: 1 << typeCgroupSKB, Attachments: 1 << attachEgress, MaxPrograms: 1, Attach: profile.Attach{Cgroups: profile.ReachAny}}},
		"a raw tracepoint": {both, func(p *testtarget.Process) {
			expect(t, p, 0, "load", loading(simple[typeRawTP]))
			expect(t, p, 0, "raw", []string{"sys_enter"})
			expect(t, p, 0, "dropall", nil)
		}, profile.Lesson{Commands: 1 << 5, Programs: 1 << typeRawTP, Attachments: 1, MaxPrograms: 1, Attach: profile.Attach{Processes: profile.ReachAny}}},
	} {
		t.Run(name, func(t *testing.T) {
			target := testtarget.NewWith(t, testtarget.Alice, test.namespaces, testtarget.Root)
			id := grant(t, g, target, everything())
			other := testtarget.New(t, testtarget.Alice)
			grant(t, g, other, everything())
			if err := g.Learn(id); err != nil {
				t.Fatal(err)
			}
			if err := g.Learn(id); !errors.Is(err, ErrLearning) {
				t.Errorf("twice: %v", err)
			}
			expect(t, other, 0, "load", loading(simple[typeSKLookup]))
			expect(t, other, 0, "dropall", nil)
			test.do(target)
			got, err := g.Learnt(id)
			if err != nil {
				t.Fatal(err)
			}
			if name != "a long program" { // all are short
				test.want.Short = profile.Short{Programs: test.want.Programs, Attachments: test.want.Attachments, Helpers: test.want.Helpers}
			}
			if diff := cmp.Diff(&test.want, got); diff != "" {
				t.Error(diff)
			}
			if _, err := g.Learnt(id); !errors.Is(err, ErrUnknown) {
				t.Errorf("again: %v", err)
			}
		})
	}
}

// A thousand programs, many at once, lose nothing; and who dies while he learns
// leaves nothing.
func TestLessonOfMany(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, everything())
	if err := g.Learn(id); err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		expect(t, target, 0, "load", loading(program{Type: typeSocketFilter, Instructions: []uint64{helper([]uint64{5, 7, 8}[i%3]), zero, exit}}))
	}
	got, err := g.Learnt(id)
	if err != nil || got.MaxPrograms != 1000 || !cmp.Equal(got.Helpers, []string{"ktime_get_ns", "get_prandom_u32", "get_smp_processor_id"}) {
		t.Errorf("got %+v, %v", got, err)
	}
	expect(t, target, 0, "dropall", nil)
	if err := g.Learn(id); err != nil {
		t.Fatal(err)
	}
	g = open(t)
	if _, err := g.Learnt(id); !errors.Is(err, ErrUnknown) {
		t.Errorf("a new daemon has got %v", err)
	}
}
