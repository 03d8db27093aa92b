// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/bpf"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// Values of the enums of include/uapi/linux/bpf.h.
const (
	mapHash    = 1
	mapArray   = 2
	mapRingbuf = 27

	typeSocketFilter = 1
	typeSchedCLS     = 3
	typeTracepoint   = 5
	typeXDP          = 6
	typePerfEvent    = 7
	typeCgroupSKB    = 8
	typeRawTP        = 17
	typeSKLookup     = 30

	attachEgress     = 1
	attachSKLookup   = 36
	attachXDP        = 37
	attachPerfEvent  = 41
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

// current is the guard that was opened last, for all tests and their ends.
var current *Guard

func open(t testing.TB) *Guard {
	t.Helper()
	g, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if current != nil {
		current.Close()
	}
	current = g
	return g
}

var lastID uint64

// grant binds a grant to a process, which takes its token.
func grant(t testing.TB, g *Guard, p *testtarget.Process, profile *profile.Profile) uint64 {
	t.Helper()
	lastID++
	id := lastID
	mount := filesystem(t, p, testtarget.Alice)
	if err := g.Bind(id, mount, Limits{Profile: profile, Owner: testtarget.Alice}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _, _ = p.Do("dropall", nil) // where a test hasn't got to its end
		release(t, id)
	})
	if _, _, err := p.Do("token", nil, mount); err != nil {
		t.Fatalf("cannot create a token: %v", err)
	}
	return id
}

// release waits until a grant is gone.
func release(t testing.TB, id uint64) {
	t.Helper()
	testtarget.Eventually(t, "the grant is released", func() bool {
		left, err := current.Release(id)
		if err != nil {
			t.Fatal(err)
		}
		return len(left) == 0
	})
}

func filesystem(t testing.TB, p *testtarget.Process, owner uint32) *os.File {
	t.Helper()
	all := ^uint64(0)
	return filesystemWith(t, p, owner, kernel.Delegation{Commands: all, Maps: all, Programs: all, Attachments: all})
}

func filesystemWith(t testing.TB, p *testtarget.Process, owner uint32, d kernel.Delegation) *os.File {
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
	f, err := kernel.Delegate(n, d, owner)
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
		t.Errorf("%s %q: got %v, want %v", op, args, err, want)
	}
}

func loading(p program) []string {
	data, err := json.Marshal(p)
	if err != nil {
		panic(err)
	}
	return []string{string(data)}
}

// hash is what a hash map of so many entries counts.
func hash(entries uint64) uint64 { return entries * (8 + 8 + 64) }

func mapping(kind, entries int) []string { return []string{strconv.Itoa(kind), strconv.Itoa(entries)} }

func TestLoadAndRevoke(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, everything())
	expect(t, target, 0, "map", mapping(mapArray, 1))
	for _, p := range simple {
		expect(t, target, 0, "load", loading(p))
	}
	usage, err := g.Usage(id)
	if want := (Usage{Programs: len(simple), Maps: 1, Tokens: 1, MapBytes: 8}); err != nil || usage != want {
		t.Errorf("got %+v, %v", usage, err)
	}
	if usage, err := g.UserUsage(testtarget.Alice); err != nil || usage.Programs != len(simple) {
		t.Errorf("got %+v, %v of the user", usage, err)
	}
	expect(t, target, 0, "load", loading(simple[typeRawTP]))
	if err := g.Revoke(id); err != nil {
		t.Fatal(err)
	}
	expect(t, target, unix.EPERM, "map", mapping(mapArray, 1))
	expect(t, target, unix.EPERM, "load", loading(simple[typeSocketFilter]))
	expect(t, target, unix.EPERM, "raw", []string{"sys_enter"})
	if left, err := g.Release(id); err != nil || !slices.Equal(left, []uint64{id}) {
		t.Errorf("got %v, %v: nothing may be released that exists", left, err)
	}
	if err := g.Renew(id, Limits{Profile: everything(), Owner: testtarget.Alice}); !errors.Is(err, ErrUnknown) {
		t.Errorf("renewing a revoked grant: got %v", err)
	}
	// Programs keep their token.
	expect(t, target, 0, "dropall", nil)
}

func TestLease(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, everything())
	limits := Limits{Profile: everything(), Owner: testtarget.Alice, Deadline: kernel.Now() + kernel.BootTime(time.Second)}
	if err := g.Renew(id, limits); err != nil {
		t.Fatal(err)
	}
	expect(t, target, 0, "load", loading(simple[typeRawTP]))
	time.Sleep(1100 * time.Millisecond)
	expect(t, target, unix.EPERM, "load", loading(simple[typeRawTP]))
	expect(t, target, unix.EPERM, "raw", []string{"sys_enter"})
	limits.Deadline = 0
	if err := g.Renew(id, limits); err != nil {
		t.Fatal(err)
	}
	expect(t, target, 0, "raw", []string{"sys_enter"})
	expect(t, target, 0, "dropall", nil)
}

func TestCalls(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	jiffies := program{Type: typeSocketFilter, Instructions: []uint64{helper(118), zero, exit}}
	time := program{Type: typeSocketFilter, Instructions: []uint64{helper(5), zero, exit}}
	late := program{Type: typeSocketFilter}
	for range 5000 {
		late.Instructions = append(late.Instructions, zero)
	}
	late.Instructions = append(late.Instructions, helper(5), zero, exit)
	lock := program{Type: typeSchedCLS, Instructions: []uint64{kfunc(t, "bpf_rcu_read_lock"), kfunc(t, "bpf_rcu_read_unlock"), zero, exit}}
	for name, test := range map[string]struct {
		change                    func(*profile.Profile)
		jiffies, time, late, lock syscall.Errno
	}{
		"no limits": {func(*profile.Profile) {}, 0, 0, 0, 0},
		"helper denied": {func(p *profile.Profile) { p.Helpers = profile.Names{Deny: true, List: []string{"ktime_get_ns"}} },
			0, unix.EPERM, unix.EPERM, 0},
		"helper allowed": {func(p *profile.Profile) { p.Helpers.List = []string{"ktime_get_ns"} }, unix.EPERM, 0, 0, 0},
		"last helpers":   {func(p *profile.Profile) { p.Helpers.List = []string{"cgrp_storage_delete"} }, unix.EPERM, unix.EPERM, unix.EPERM, 0},
		"kfunc denied": {func(p *profile.Profile) {
			p.Kfuncs = profile.Names{Deny: true, List: []string{"nosuch", "bpf_rcu_read_unlock"}}
		}, 0, 0, 0, unix.EPERM},
		"another kfunc denied": {func(p *profile.Profile) { p.Kfuncs = profile.Names{Deny: true, List: []string{"bpf_sock_destroy"}} }, 0, 0, 0, 0},
		"one kfunc allowed":    {func(p *profile.Profile) { p.Kfuncs.List = []string{"bpf_rcu_read_lock"} }, 0, 0, 0, unix.EPERM},
		"kfuncs allowed":       {func(p *profile.Profile) { p.Kfuncs.List = []string{"bpf_rcu_read_unlock", "bpf_rcu_read_lock"} }, 0, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p := everything()
			test.change(p)
			grant(t, g, target, p)
			expect(t, target, test.jiffies, "load", loading(jiffies))
			expect(t, target, test.time, "load", loading(time))
			expect(t, target, test.late, "load", loading(late))
			expect(t, target, test.lock, "load", loading(lock))
			expect(t, target, 0, "dropall", nil)
		})
	}
}

// kfunc is the instruction that calls one.
func kfunc(t *testing.T, name string) uint64 {
	t.Helper()
	types, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	var f *btf.Func
	if err := types.TypeByName(name, &f); err != nil {
		t.Fatal(err)
	}
	id, err := types.TypeID(f)
	if err != nil {
		t.Fatal(err)
	}
	return uint64(id)<<32 | 2<<12 | 0x85
}

func TestCapabilities(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	// r1 = r10 - 8; r2 = 8; r3 = 0; probe_read_kernel
	read := program{Type: typeSocketFilter, Instructions: []uint64{0xa1bf, 0xfffffff800000107, 8<<32 | 0x2b7, 0x3b7, helper(113), zero, exit}}
	p := everything()
	grant(t, g, target, p)
	expect(t, target, 0, "load", loading(read))
	expect(t, target, 0, "dropall", nil)
	p.Capabilities = []string{"CAP_BPF", "CAP_NET_ADMIN"}
	grant(t, g, target, p)
	expect(t, target, unix.EINVAL, "load", loading(read)) // the verifier knows no such helper
	expect(t, target, unix.EPERM, "load", loading(simple[typeRawTP]))
	expect(t, target, 0, "load", loading(simple[typeXDP]))
	expect(t, target, 0, "dropall", nil)
	p.Capabilities = []string{"CAP_BPF"}
	grant(t, g, target, p)
	expect(t, target, unix.EPERM, "load", loading(simple[typeXDP]))
	expect(t, target, 0, "load", loading(simple[typeSocketFilter]))
	expect(t, target, 0, "dropall", nil)
}

func TestQuotas(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	p := everything()
	p.MaxPrograms, p.MaxMaps, p.MaxMapBytes = 2, 3, hash(100)
	id := grant(t, g, target, p)
	for range 3 {
		for range 2 {
			expect(t, target, 0, "load", loading(simple[typeSocketFilter]))
		}
		expect(t, target, unix.EPERM, "load", loading(simple[typeSocketFilter]))
		expect(t, target, 0, "map", mapping(mapHash, 60))
		expect(t, target, unix.EPERM, "map", mapping(mapHash, 41))
		expect(t, target, unix.EPERM, "map", mapping(mapHash, 100_000))
		expect(t, target, 0, "map", mapping(mapHash, 40))
		expect(t, target, unix.EPERM, "map", mapping(mapArray, 1))
		usage, err := g.Usage(id)
		if want := (Usage{Programs: 2, Maps: 2, Tokens: 1, MapBytes: hash(100)}); err != nil || usage != want {
			t.Errorf("got %+v, %v", usage, err)
		}
		expect(t, target, 0, "drop", nil)
		testtarget.Eventually(t, "all is given back", func() bool {
			usage, err := g.Usage(id)
			return err == nil && usage == Usage{Tokens: 1}
		})
	}
	for range 3 {
		expect(t, target, 0, "map", mapping(mapArray, 1))
	}
	expect(t, target, unix.EPERM, "map", mapping(mapArray, 1))
	expect(t, target, 0, "dropall", nil)
}

// cgroup makes one that belongs to a user, with one below that is root's.
func cgroup(t *testing.T, name string, owner int) (own, below *os.File) {
	t.Helper()
	path := filepath.Join("/sys/fs/cgroup", name)
	var dirs [2]*os.File
	for i, dir := range []string{path, filepath.Join(path, "below")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(dir) })
		if i == 0 {
			if err := os.Chown(dir, owner, owner); err != nil {
				t.Fatal(err)
			}
		}
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		dirs[i] = f
	}
	return dirs[0], dirs[1]
}

func openFile(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestAttach(t *testing.T) {
	g := open(t)
	const both = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
	own, below := cgroup(t, "alice", testtarget.Alice)
	root := openFile(t, "/sys/fs/cgroup")
	hostNet := openFile(t, "/proc/self/ns/net")
	const no = unix.EPERM
	for name, test := range map[string]struct {
		reach              profile.Reach
		namespaces         uintptr
		device, deviceProg syscall.Errno
		ownNet, hostNet    syscall.Errno
		own, root          syscall.Errno
		cgroupProg         syscall.Errno
		raw, run, update   syscall.Errno
	}{
		"none, own network":    {profile.ReachNone, both | unix.CLONE_NEWNET, no, 0, no, no, no, no, no, no, 0, no},
		"own, own network":     {profile.ReachOwn, both | unix.CLONE_NEWNET, 0, 0, 0, no, 0, no, no, no, 0, no},
		"any, own network":     {profile.ReachAny, both | unix.CLONE_NEWNET, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"none, host's network": {profile.ReachNone, both, no, no, no, no, no, no, no, no, no, no},
		"own, host's network":  {profile.ReachOwn, both, no, no, no, no, 0, no, no, no, no, no},
		"any, host's network":  {profile.ReachAny, both, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			target := testtarget.NewWith(t, testtarget.Alice, test.namespaces, testtarget.Root)
			grant(t, g, target, confinedTo(test.reach))
			net := openFile(t, fmt.Sprintf("/proc/%d/ns/net", target.PID))

			expect(t, target, 0, "load", loading(simple[typeXDP]))
			expect(t, target, test.device, "link", []string{"1", strconv.Itoa(attachXDP)})
			expect(t, target, test.run, "run", nil)
			expect(t, target, 0, "drop", nil)
			expect(t, target, 0, "load", loading(simple[typeSchedCLS]))
			expect(t, target, test.device, "link", []string{"1", strconv.Itoa(attachTCXIngress)})
			expect(t, target, 0, "drop", nil)
			if test.reach != profile.ReachNone { // where it is the second line's
				expect(t, target, 0, "load", loading(simple[typeSchedCLS]))
				expect(t, target, test.deviceProg, "attach", []string{"1", strconv.Itoa(attachTCXIngress)})
				if test.deviceProg == 0 {
					expect(t, target, 0, "detach", []string{"1", strconv.Itoa(attachTCXIngress)})
				}
				expect(t, target, 0, "drop", nil)
			}

			expect(t, target, 0, "load", loading(simple[typeSKLookup]))
			expect(t, target, test.ownNet, "link", []string{"", strconv.Itoa(attachSKLookup)}, net)
			expect(t, target, test.hostNet, "link", []string{"", strconv.Itoa(attachSKLookup)}, hostNet)
			expect(t, target, 0, "drop", nil)

			expect(t, target, 0, "load", loading(simple[typeCgroupSKB]))
			expect(t, target, test.own, "link", []string{"", strconv.Itoa(attachEgress)}, own)
			if test.own == 0 {
				expect(t, target, test.update, "update", nil)
				expect(t, target, 0, "updatealone", nil)
			}
			expect(t, target, test.own, "link", []string{"", strconv.Itoa(attachEgress)}, below)
			expect(t, target, test.root, "link", []string{"", strconv.Itoa(attachEgress)}, root)
			expect(t, target, 0, "drop", nil)
			expect(t, target, 0, "load", loading(simple[typeCgroupSKB]))
			expect(t, target, test.cgroupProg, "attach", []string{"", strconv.Itoa(attachEgress)}, root)
			if test.cgroupProg == 0 {
				expect(t, target, 0, "detach", []string{"", strconv.Itoa(attachEgress)}, root)
			}
			expect(t, target, 0, "drop", nil)

			expect(t, target, 0, "load", loading(simple[typeRawTP]))
			expect(t, target, test.raw, "raw", []string{"sys_enter"})
			expect(t, target, 0, "dropall", nil)
		})
	}
}

// TestPerfEvent has targets use events that root has opened for them: of
// themselves, and of a tracepoint that everybody passes.
func TestPerfEvent(t *testing.T) {
	g := open(t)
	tracepoint := tracepointID(t, "sched/sched_switch")
	const no = unix.EPERM
	for name, test := range map[string]struct {
		reach                     profile.Reach
		own, tracepoint, setEvent syscall.Errno
	}{
		"none": {profile.ReachNone, no, no, no},
		"own":  {profile.ReachOwn, 0, no, no},
		"any":  {profile.ReachAny, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			target := testtarget.New(t, testtarget.Alice)
			grant(t, g, target, confinedTo(test.reach))
			event := func(kind uint32, config uint64) *os.File { return perfEvent(t, target, kind, config) }
			clock := func() *os.File { return event(unix.PERF_TYPE_SOFTWARE, unix.PERF_COUNT_SW_CPU_CLOCK) }
			expect(t, target, 0, "load", loading(program{Type: typePerfEvent, Instructions: []uint64{zero, exit}}))
			expect(t, target, test.own, "link", []string{"", strconv.Itoa(attachPerfEvent)}, clock())
			expect(t, target, test.setEvent, "ioctl", nil, clock())
			expect(t, target, 0, "load", loading(program{Type: typeTracepoint, Instructions: []uint64{zero, exit}}))
			expect(t, target, test.tracepoint, "link", []string{"", strconv.Itoa(attachPerfEvent)}, event(unix.PERF_TYPE_TRACEPOINT, uint64(tracepoint)))
			expect(t, target, 0, "drop", nil)
			expect(t, target, 0, "load", loading(program{Type: typeTracepoint, Instructions: []uint64{zero, exit}}))
			expect(t, target, test.setEvent, "ioctl", nil, event(unix.PERF_TYPE_TRACEPOINT, uint64(tracepoint)))
			expect(t, target, 0, "dropall", nil)
		})
	}
}

// outsider is a process of the user's on the host that has got hold of the
// last program of the target.
func outsider(t *testing.T, target *testtarget.Process, user int) *testtarget.Process {
	t.Helper()
	_, files, err := target.Do("give", nil)
	if err != nil || len(files) != 1 {
		t.Fatalf("got %d files, %v", len(files), err)
	}
	defer files[0].Close()
	p := testtarget.Start(t, testtarget.Attr{})
	expect(t, p, 0, "hold", nil, files[0])
	if got := p.Must("programs"); got != "1" {
		t.Fatalf("root has got %s programs", got)
	}
	p.Must("become", strconv.Itoa(user))
	return p
}

func TestOutside(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	grant(t, g, target, confinedTo(profile.ReachOwn))
	root := openFile(t, "/sys/fs/cgroup")

	expect(t, target, 0, "load", loading(simple[typeCgroupSKB]))
	_, files, err := target.Do("give", nil)
	if err != nil || len(files) != 1 {
		t.Fatalf("got %d files, %v", len(files), err)
	}
	for _, user := range []int{testtarget.Alice, testtarget.Bob} {
		p := testtarget.Start(t, testtarget.Attr{UID: user})
		expect(t, p, 0, "hold", nil, files[0])
		if got := p.Must("programs"); got != "0" {
			t.Errorf("%d has received %s programs", user, got)
		}
		p = testtarget.New(t, user)
		expect(t, p, 0, "hold", nil, files[0])
		if got := p.Must("programs"); got != "0" {
			t.Errorf("%d has received %s programs in another namespace", user, got)
		}
		p = outsider(t, target, user)
		expect(t, p, unix.EPERM, "link", []string{"", strconv.Itoa(attachEgress)}, root)
	}
	_ = files[0].Close()
	expect(t, outsider(t, target, testtarget.Alice), unix.EPERM, "attach", []string{"", strconv.Itoa(attachEgress)}, root)
	// Nothing shows beforehand that the program is a grant's.
	stranger := outsider(t, target, testtarget.Bob)
	if _, _, err := stranger.Do("attach", []string{"", strconv.Itoa(attachEgress)}, root); err == nil {
		t.Error("a stranger has attached a grant's program and lives")
	}
	if _, err := rootAttached(root, attachEgress); err != nil {
		t.Fatal(err)
	}

	expect(t, target, 0, "load", loading(simple[typeXDP]))
	for _, user := range []int{testtarget.Alice, testtarget.Bob} {
		p := outsider(t, target, user)
		expect(t, p, unix.EPERM, "link", []string{"1", strconv.Itoa(attachXDP)})
	}
	expect(t, outsider(t, target, testtarget.Alice), unix.EPERM, "run", nil)
	expect(t, target, 0, "load", loading(simple[typeRawTP]))
	for _, user := range []int{testtarget.Alice, testtarget.Bob} {
		expect(t, outsider(t, target, user), unix.EPERM, "raw", []string{"sys_enter"})
	}

	// By a pin.
	if err := os.Mkdir("/tmp/pins", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", "/tmp/pins", "bpf", 0, "mode=0777"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount("/tmp/pins", 0); _ = os.Remove("/tmp/pins") })
	pinner := outsider(t, target, testtarget.Alice)
	expect(t, pinner, 0, "pin", []string{"/tmp/pins/program"})
	expect(t, pinner, unix.EPERM, "get", []string{"/tmp/pins/program"})
	expect(t, testtarget.Start(t, testtarget.Attr{UID: testtarget.Bob}), unix.EACCES, "get", []string{"/tmp/pins/program"})
	_ = os.Remove("/tmp/pins/program")

	// The root of the host may do as it likes.
	_, files, err = target.Do("give", nil)
	if err != nil || len(files) != 1 {
		t.Fatalf("got %d files, %v", len(files), err)
	}
	admin := testtarget.Start(t, testtarget.Attr{})
	expect(t, admin, 0, "hold", nil, files[0])
	_ = files[0].Close()
	expect(t, admin, 0, "raw", []string{"sys_enter"})
	admin.Kill()
	expect(t, target, 0, "dropall", nil)
}

// rootAttached detaches what is attached to a cgroup.
func rootAttached(cgroup *os.File, attachType uint32) (int, error) {
	r, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: ebpf.AttachType(attachType)})
	if err != nil {
		return 0, err
	}
	for _, attached := range r.Programs {
		p, err := ebpf.NewProgramFromID(attached.ID)
		if err != nil {
			return 0, err
		}
		err = link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(cgroup.Fd()), Program: p, Attach: ebpf.AttachType(attachType)})
		_ = p.Close()
		if err != nil {
			return 0, err
		}
	}
	return len(r.Programs), nil
}

func TestTokenElsewhere(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	grant(t, g, target, everything())
	for name, p := range map[string]*testtarget.Process{
		"the owner on the host": testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice}),
		"the owner elsewhere":   testtarget.New(t, testtarget.Alice),
		"a nested namespace":    target.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER | unix.CLONE_NEWNS}),
	} {
		_, files, err := target.Do("givetoken", nil)
		if err != nil || len(files) != 1 {
			t.Fatalf("got %d files, %v", len(files), err)
		}
		t.Log(name)
		expect(t, p, 0, "taketoken", nil, files...)
		_ = files[0].Close()
		expect(t, p, unix.EPERM, "map", mapping(mapHash, 1))
		expect(t, p, unix.EPERM, "load", loading(simple[typeSocketFilter]))
		p.Kill()
	}
	expect(t, target, 0, "dropall", nil)
}

// TestStrangers has others use tokens that aren't the broker's.
func TestStrangers(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	grant(t, g, target, confinedTo(profile.ReachNone))
	bob := testtarget.New(t, testtarget.Bob)
	if _, _, err := bob.Do("token", nil, filesystem(t, bob, testtarget.Bob)); err != nil {
		t.Fatal(err)
	}
	root := openFile(t, "/sys/fs/cgroup")
	for _, p := range simple {
		expect(t, bob, 0, "load", loading(p))
	}
	expect(t, bob, 0, "load", loading(simple[typeCgroupSKB]))
	expect(t, bob, 0, "link", []string{"", strconv.Itoa(attachEgress)}, root)
	expect(t, bob, 0, "update", nil)
	expect(t, bob, 0, "load", loading(simple[typeRawTP]))
	expect(t, bob, 0, "raw", []string{"sys_enter"})
	expect(t, bob, 0, "load", loading(simple[typeXDP]))
	expect(t, bob, 0, "link", []string{"1", strconv.Itoa(attachXDP)})
	expect(t, bob, 0, "run", nil)
	expect(t, bob, 0, "dropall", nil)
	expect(t, target, 0, "dropall", nil)
}

func TestProtect(t *testing.T) {
	g := open(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := pin(m.FD(), unix.AT_FDCWD, "/sys/fs/bpf/map"); err != nil {
		t.Fatal(err)
	}
	fd, err := get(unix.AT_FDCWD, "/sys/fs/bpf/map", 8)
	if err != nil {
		t.Fatal(err)
	}
	readOnly := os.NewFile(uintptr(fd), "map")
	defer readOnly.Close()
	if err := os.Remove("/sys/fs/bpf/map"); err != nil {
		t.Fatal(err)
	}
	info, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	target := testtarget.New(t, testtarget.Alice)
	bpffs := filesystem(t, target, testtarget.Alice)
	expect(t, target, 0, "reopen", []string{"0"}, readOnly, bpffs) // which is why
	if err := g.Protect(id); err != nil {
		t.Fatal(err)
	}
	for _, flags := range []string{"0", "16"} {
		expect(t, target, unix.EPERM, "reopen", []string{flags}, readOnly, bpffs)
	}
	expect(t, target, 0, "reopen", []string{"8"}, readOnly, bpffs)
	again, err := ebpf.NewMapFromID(id)
	if err != nil {
		t.Fatalf("root can't open it: %v", err)
	}
	_ = again.Close()
	// Others come and go, and one daemon after another.
	const other = 1 << 31
	for _, change := range []func(ebpf.MapID) error{g.Protect, g.Protect, g.Unprotect, g.Unprotect} {
		if err := change(other); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, target, unix.EPERM, "reopen", []string{"0"}, readOnly, bpffs)
	if err := g.maps.Counts.Put(countProtected, uint32(0)); err != nil { // an older one doesn't count
		t.Fatal(err)
	}
	g = open(t)
	expect(t, target, unix.EPERM, "reopen", []string{"0"}, readOnly, bpffs)
	if err := g.Unprotect(id); err != nil {
		t.Fatal(err)
	}
	expect(t, target, 0, "reopen", []string{"0"}, readOnly, bpffs)
}

// forbidden is a program that calls what the profile of denying forbids.
var forbidden = program{Type: typeSocketFilter, Instructions: []uint64{helper(5), zero, exit}}

func denying() *profile.Profile {
	p := everything()
	p.Helpers = profile.Names{Deny: true, List: []string{"ktime_get_ns"}}
	return p
}

// While nobody reads them, events fill their buffer. From then on they are counted,
// also those of who causes few.
func TestEventsUnread(t *testing.T) {
	g := open(t)
	const first, crowd, quiet = 3000, 20, 4000 // uids
	confined := func(uid int) *testtarget.Process {
		target := testtarget.NewWith(t, uid, unix.CLONE_NEWUSER|unix.CLONE_NEWNS, testtarget.Root)
		lastID++
		id := lastID
		mount := filesystem(t, target, uint32(uid))
		if err := g.Bind(id, mount, Limits{Profile: confinedTo(profile.ReachNone), Owner: uint32(uid)}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_, _, _ = target.Do("dropall", nil)
			release(t, id)
		})
		if _, _, err := target.Do("token", nil, mount); err != nil {
			t.Fatal(err)
		}
		return target
	}
	attempt := func(p *testtarget.Process, times string) {
		t.Helper()
		if refused := p.Must("attempts", times); refused != times {
			t.Fatalf("of %s attempts %s are refused", times, refused)
		}
	}
	var loud []*testtarget.Process
	for i := range crowd {
		loud = append(loud, confined(first+i))
	}
	target := confined(quiet)
	denials, lost := 0, 0
	for end := time.Now().Add(2 * time.Minute); lost == 0; {
		if time.Now().After(end) {
			t.Fatal("the buffer isn't full")
		}
		for _, p := range loud {
			attempt(p, "100") // which is what he may cause in a second
		}
		attempt(target, "1")
		denials++
		usage, err := g.UserUsage(quiet)
		if err != nil {
			t.Fatal(err)
		}
		lost = usage.Lost
	}
	ctx, cancel := context.WithCancel(t.Context())
	var told atomic.Int32
	ended := make(chan error)
	go func() {
		ended <- g.Events(ctx, func(e Event) {
			if command, kind := e.CommandKind(); e.Owner == quiet && e.Reason == Command && command == 8 && kind == Cgroups {
				told.Add(1)
			}
		})
	}()
	testtarget.Eventually(t, "those that there was room for are told", func() bool { return int(told.Load())+lost == denials })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if all, err := g.Lost(); err != nil || all[quiet] != lost {
		t.Errorf("got %v, %v, want %d of the quiet one", all, err, lost)
	}
}

func TestEvents(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, denying())
	ctx, cancel := context.WithCancel(t.Context())
	events, ended := make(chan Event, 10_000), make(chan error)
	go func() { ended <- g.Events(ctx, func(e Event) { events <- e }) }()
	next := func(want Event) {
		t.Helper()
		for {
			select {
			case e := <-events:
				if e.Grant != id {
					continue // of an earlier test
				}
				if want.Reason == Loaded && (e.Tag == [8]byte{} || e.Program == 0) {
					t.Errorf("got %+v", e)
				}
				if e.Time == 0 || e.PID != target.PID || e.Comm == "" {
					t.Errorf("got %+v", e)
				}
				e.Time, e.PID, e.Comm, e.Tag, e.Program = 0, 0, "", [8]byte{}, 0
				if e != want {
					t.Errorf("got %+v, want %+v", e, want)
				}
			case <-time.After(5 * time.Second):
				t.Errorf("no event %+v", want)
			}
			return
		}
	}
	about := Event{Grant: id, Owner: testtarget.Alice, UID: testtarget.Alice, ProgramType: typeSocketFilter, Instructions: 3, Name: "hostile"}
	expect(t, target, unix.EPERM, "load", loading(forbidden))
	about.Reason, about.Detail = Helper, 5
	next(about)
	expect(t, target, 0, "load", loading(simple[typeSocketFilter]))
	about.Reason, about.Detail, about.Instructions = Loaded, 0, 2
	next(about)

	// Who makes too many loses his own.
	target.Must("hammer", loading(forbidden)...)
	testtarget.Eventually(t, "events are lost", func() bool {
		usage, err := g.UserUsage(testtarget.Alice)
		return err == nil && usage.Lost > 0
	})
	if got := target.Must("cease"); got != "0" {
		t.Errorf("%s programs were loaded", got)
	}
	usage, err := g.UserUsage(testtarget.Alice)
	if err != nil || usage.Lost == 0 {
		t.Errorf("got %+v, %v", usage, err)
	}
	for i, want := range []int{usage.Lost, 0, 0} {
		if i == 2 {
			g = open(t) // as the next daemon does, who tells nothing twice
		}
		if lost, err := g.Lost(); err != nil || lost[testtarget.Alice] != want {
			t.Errorf("got %v, %v, want %d", lost, err, want)
		}
	}
	if n := len(events); n > 500 {
		t.Errorf("got %d events", n)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	expect(t, target, 0, "dropall", nil)
}

func TestStays(t *testing.T) {
	g := open(t)
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, denying())
	hammered := testtarget.New(t, testtarget.Alice)
	grant(t, g, hammered, denying())
	hammered.Must("hammer", loading(forbidden)...)
	version := filepath.Join(dir, linksPrefix+bpf.Version())
	older := filepath.Join(dir, linksPrefix+"0000000000000000")

	// A daemon is killed.
	daemon := testtarget.Start(t, testtarget.Attr{})
	daemon.Must("guard")
	daemon.Kill()
	g.Close()
	expect(t, target, unix.EPERM, "load", loading(forbidden))
	expect(t, target, 0, "load", loading(simple[typeSocketFilter]))

	// An upgrade, after another that didn't get to its end.
	if err := os.Rename(version, older); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, unfinished), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(older, "token_cmd"), filepath.Join(dir, unfinished, "token_cmd")); err != nil {
		t.Fatal(err)
	}
	g = open(t)
	for _, gone := range []string{older, filepath.Join(dir, unfinished)} {
		if _, err := os.Stat(gone); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", gone, err)
		}
	}
	expect(t, target, unix.EPERM, "load", loading(forbidden))
	grants, err := g.Grants()
	if err != nil || len(grants) != 2 {
		t.Errorf("got %+v, %v", grants, err)
	}
	if usage, err := g.Usage(id); err != nil || usage.Programs != 1 || usage.Tokens != 1 {
		t.Errorf("got %+v, %v", usage, err)
	}

	if got := hammered.Must("cease"); got != "0" {
		t.Errorf("%s programs were loaded meanwhile", got)
	}
	expect(t, target, 0, "dropall", nil)
	expect(t, hammered, 0, "dropall", nil)

	// The next start finds that one is missing.
	if err := os.Remove(filepath.Join(version, "prog_load")); err != nil {
		t.Fatal(err)
	}
	for _, grant := range grants {
		release(t, grant.ID)
	}
}

// TestNothingLeft comes last: it looks at what all of them have left.
func TestNothingLeft(t *testing.T) {
	g := open(t)
	if _, err := os.Stat(filepath.Join(dir, linksPrefix+bpf.Version(), "prog_load")); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() {
		g.Close()
		if err := Unload(dir); err != nil {
			t.Error(err)
		}
	})
	target := testtarget.New(t, testtarget.Alice)
	for range 50 {
		id := grant(t, g, target, confinedTo(profile.ReachOwn))
		expect(t, target, 0, "map", mapping(mapHash, 1))
		expect(t, target, 0, "load", loading(simple[typeSocketFilter]))
		expect(t, target, 0, "dropall", nil)
		release(t, id)
	}
	checkEmpty(t, g)
}

// checkEmpty fails the test if the guard's maps have anything.
func checkEmpty(t *testing.T, g *Guard) {
	t.Helper()
	for name, m := range map[string]*ebpf.Map{
		"grants": g.maps.Grants, "usages": g.maps.Usages, "users": g.maps.Users, "lessons": g.maps.Lessons, "told": g.maps.Told,
		"tokens": g.maps.Tokens, "objects": g.maps.Objects, "protected": g.maps.Protected,
	} {
		key, err := m.NextKeyBytes(nil)
		if err != nil || key != nil {
			t.Errorf("%s has %x, %v", name, key, err)
		}
	}
	slots, counts := make([]uint32, g.maps.Confinements.MaxEntries()), make([]uint32, g.maps.Confinements.MaxEntries())
	var cursor ebpf.MapBatchCursor
	n, err := g.maps.Confinements.BatchLookup(&cursor, slots, counts, nil)
	if n != len(slots) || err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("got %d slots, %v", n, err)
	}
	for i, count := range counts {
		if count != 0 {
			t.Errorf("slot %d counts %d", slots[i], count)
		}
	}
}
