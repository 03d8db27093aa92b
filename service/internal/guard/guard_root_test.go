// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"encoding/json"
	"errors"
	"os"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// Values of the enums of include/uapi/linux/bpf.h.
const (
	mapArray   = 2
	mapRingbuf = 27
	mapOps     = 26

	typeSocketFilter = 1
	typeSchedCLS     = 3
	typeXDP          = 6
	typeCgroupSKB    = 8
	typeRawTP        = 17
	typeTracing      = 26
	typeSKLookup     = 36 - 6

	attachEgress     = 1
	attachSKLookup   = 36
	attachXDP        = 37
	attachNetfilter  = 45
	attachTCXIngress = 46
)

// Instructions.
const (
	zero = 0xb7 // r0 = 0
	one  = 1<<32 | 0xb7
	exit = 0x95
)

func helper(id uint64) uint64 { return id<<32 | 0x85 }

// simple are programs that do nothing.
var simple = map[uint32]program{
	typeSocketFilter: {Type: typeSocketFilter, Instructions: []uint64{zero, exit}},
	typeSchedCLS:     {Type: typeSchedCLS, Attach: attachTCXIngress, Instructions: []uint64{zero, exit}},
	typeXDP:          {Type: typeXDP, Attach: attachXDP, Instructions: []uint64{zero, exit}},
	typeCgroupSKB:    {Type: typeCgroupSKB, Attach: attachEgress, Instructions: []uint64{one, exit}},
	typeRawTP:        {Type: typeRawTP, Instructions: []uint64{zero, exit}},
	typeSKLookup:     {Type: typeSKLookup, Attach: attachSKLookup, Instructions: []uint64{one, exit}},
}

// everything is a profile that limits nothing.
func everything() *profile.Profile {
	all := ^profile.Mask(0)
	return &profile.Profile{
		Name: "everything", Commands: all, Maps: all, Programs: all, Attachments: all,
		Attach: profile.Attach{Interfaces: profile.ReachAny, Cgroups: profile.ReachAny, Processes: profile.ReachAny},
	}
}

func confinedTo(r profile.Reach) *profile.Profile {
	p := everything()
	p.Attach = profile.Attach{Interfaces: r, Cgroups: r, Processes: r}
	return p
}

func open(t testing.TB) *Guard {
	t.Helper()
	g, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return g
}

var lastID uint64

// grant binds a grant to a process, which takes its token.
func grant(t testing.TB, g *Guard, p *testtarget.Process, profile *profile.Profile) uint64 {
	t.Helper()
	lastID++
	id := lastID
	mount := filesystem(t, p)
	if err := g.Bind(id, mount, Limits{Profile: profile, Owner: testtarget.Alice}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { release(t, g, id) })
	if _, _, err := p.Do("token", nil, mount); err != nil {
		t.Fatalf("cannot create a token: %v", err)
	}
	return id
}

// release waits until a grant is gone.
func release(t testing.TB, g *Guard, id uint64) {
	t.Helper()
	testtarget.Eventually(t, "the grant is released", func() bool {
		left, err := g.Release(id)
		if err != nil {
			t.Error(err)
		}
		return len(left) == 0
	})
}

func filesystem(t testing.TB, p *testtarget.Process) *os.File {
	t.Helper()
	pidfd := p.Dup()
	process, err := kernel.NewProcess(pidfd)
	if err != nil {
		t.Fatal(err)
	}
	defer process.Close()
	n, err := process.Namespaces()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	all := ^uint64(0)
	f, err := kernel.Delegate(n, kernel.Delegation{Commands: all, Maps: all, Programs: all, Attachments: all}, testtarget.Alice)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mount, err := f.Take()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mount.Close() })
	return mount
}

// expect tells a process to do something, and says how it should end.
func expect(t testing.TB, p *testtarget.Process, want syscall.Errno, op string, args []string, files ...*os.File) {
	t.Helper()
	_, results, err := p.Do(op, args, files...)
	for _, f := range results {
		_ = f.Close()
	}
	var errno syscall.Errno
	if err != nil && !errors.As(err, &errno) {
		t.Errorf("%s %q: %v", op, args, err)
	}
	if errno != want {
		t.Errorf("%s %q: got %v, want %v", op, args, errno, want)
	}
}

func loading(p program) []string {
	data, err := json.Marshal(p)
	if err != nil {
		panic(err)
	}
	return []string{string(data)}
}

func TestOpen(t *testing.T) {
	testtarget.NoLeaks(t)
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, everything())
	expect(t, target, 0, "map", []string{strconv.Itoa(mapArray), "1"})
	for _, p := range simple {
		expect(t, target, 0, "load", loading(p))
	}
	usage, err := g.Usage(id)
	if err != nil || usage.Programs != len(simple) || usage.Maps != 1 || usage.MapBytes != 8 {
		t.Errorf("got %+v, %v", usage, err)
	}
	if err := g.Revoke(id); err != nil {
		t.Fatal(err)
	}
	expect(t, target, unix.EPERM, "map", []string{strconv.Itoa(mapArray), "1"})
	expect(t, target, unix.EPERM, "load", loading(simple[typeSocketFilter]))
	expect(t, target, 0, "dropall", nil)
}
