// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/bpf"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func init() {
	// crowd THREADS SECONDS OWN OTHER: threads that are run only when nothing else
	// is make links to a cgroup, and are preempted wherever they are then; another
	// makes links to the other cgroup. Answers how often, with which successes.
	ops["crowd"] = func(args []string, files []*os.File) (string, []*os.File, error) {
		end := time.Now().Add(time.Duration(number(args[1])) * time.Second)
		own, other := uint32(files[0].Fd()), uint32(files[1].Fd())
		var done atomic.Bool
		var crowd sync.WaitGroup
		defer crowd.Wait()
		defer done.Store(true)
		for range number(args[0]) {
			crowd.Go(func() {
				runtime.LockOSThread() // which ends with it
				if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0); err != nil {
					return
				}
				for !done.Load() {
					if fd, err := createLink(uint32(last()), own, attachEgress); err == nil {
						_ = unix.Close(fd)
					}
				}
			})
		}
		var r crowdResult
		for ; time.Now().Before(end); r.Tries++ {
			time.Sleep(time.Millisecond)
			for range 3 {
				if _, err := createLink(uint32(last()), other, attachEgress); err == nil {
					r.Slips++
				}
			}
		}
		data, err := json.Marshal(r)
		return string(data), nil, err
	}
}

type crowdResult struct{ Tries, Slips int }

const (
	typeCgroupSock   = 9
	attachSockCreate = 2
)

// without opens the guard, and takes programs away from it until the test's end.
// It has the events then.
func without(t *testing.T) (g *Guard, events chan Event, take func(names ...string)) {
	t.Helper()
	open(t)
	g = open(t) // which has no descriptors of links: the pins have them
	events = make(chan Event, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- g.Events(ctx, func(e Event) { events <- e }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		open(t)
	})
	return g, events, func(names ...string) {
		t.Helper()
		for _, name := range names {
			path := filepath.Join(dir, linksPrefix+bpf.Version(), name)
			l, err := link.LoadPinnedLink(path, nil)
			if err != nil {
				t.Fatal(err)
			}
			info, err := l.Info()
			if err := errors.Join(err, l.Close(), os.Remove(path)); err != nil {
				t.Fatal(err)
			}
			testtarget.Eventually(t, "it is detached", func() bool {
				// The link loses its id before it is detached, the program later.
				p, err := ebpf.NewProgramFromID(info.Program)
				if err == nil {
					_ = p.Close()
				}
				return errors.Is(err, fs.ErrNotExist)
			})
		}
	}
}

// expectEvent waits for an event with a reason.
func expectEvent(t *testing.T, events chan Event, reason Reason) Event {
	t.Helper()
	for {
		select {
		case e := <-events:
			if e.Reason == reason {
				return e
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no event %s", reason)
		}
	}
}

func undo(t *testing.T, e Event) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := e.Undo(ctx); err != nil {
		t.Error(err)
	}
}

// attachedTo returns what is attached to a cgroup.
func attachedTo(t *testing.T, cgroup *os.File, attachType uint32) int {
	t.Helper()
	r, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: ebpf.AttachType(attachType)})
	if err != nil {
		t.Fatal(err)
	}
	return len(r.Programs)
}

// TestSlips takes away what a hostile process could keep from being run, one
// after the other, and sees what the next line makes of the link.
func TestSlips(t *testing.T) {
	g, events, take := without(t)
	own, _ := cgroup(t, "slips", testtarget.Alice)
	root := openFile(t, "/sys/fs/cgroup")
	slip := func(p *testtarget.Process) error {
		_, _, err := p.Do("link", []string{"", strconv.Itoa(attachEgress)}, root)
		return err
	}
	target := testtarget.New(t, testtarget.Alice)
	id := grant(t, g, target, confinedTo(profile.ReachOwn))
	expect(t, target, 0, "load", loading(simple[typeCgroupSKB]))
	expect(t, target, 0, "link", []string{"", strconv.Itoa(attachEgress)}, own)
	// Root of the host attaches as it likes.
	admin := testtarget.Start(t, testtarget.Attr{})
	_, files, err := target.Do("give", nil)
	if err != nil || len(files) != 1 {
		t.Fatalf("got %d files, %v", len(files), err)
	}
	expect(t, admin, 0, "hold", nil, files[0])
	_ = files[0].Close()
	expect(t, admin, 0, "link", []string{"", strconv.Itoa(attachEgress)}, root)
	expect(t, target, 0, "load", loading(simple[typeCgroupSKB])) // another, which it hasn't attached
	child := func() *testtarget.Process {
		t.Helper()
		child := target.Start(testtarget.Attr{})
		_, files, err := target.Do("give", nil)
		if err != nil || len(files) != 1 {
			t.Fatalf("got %d files, %v", len(files), err)
		}
		expect(t, child, 0, "hold", nil, files[0])
		_ = files[0].Close()
		return child
	}
	expectKilled := func(p *testtarget.Process) {
		t.Helper()
		if err := slip(p); err == nil {
			t.Error("it has attached a program beyond its reach and lives")
		}
		e := expectEvent(t, events, SlippedLink)
		if e.Grant != id || e.Owner != testtarget.Alice || e.PID != p.PID || e.ProgramType != typeCgroupSKB {
			t.Errorf("got %+v", e)
		}
		undo(t, e)
		if l, err := link.NewFromID(link.ID(e.Detail)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("link %d: %v, %v", e.Detail, l, err)
		}
		if n := attachedTo(t, root, attachEgress); n != 1 {
			t.Errorf("%d programs are attached", n)
		}
	}

	// The link's file is allocated whatever link_prime has said.
	take("file_alloc")
	expectKilled(child())
	// Nobody has looked at the link at all.
	take("link_prime")
	expectKilled(child())
	// Nor does anybody when it is attached. It isn't the killing that detaches it.
	take("link_settle")
	if slips, err := g.Slips(); err != nil || len(slips) != 0 {
		t.Errorf("got %+v, %v", slips, err)
	}
	p := child()
	if err := slip(p); err != nil {
		t.Fatalf("nothing refuses it any more: %v", err)
	}
	slips, err := g.Slips()
	if err != nil || len(slips) != 1 || slips[0].Reason != SlippedLink || slips[0].Grant != id || slips[0].Owner != testtarget.Alice ||
		slips[0].ProgramType != typeCgroupSKB || slips[0].AttachType != attachEgress || attachedTo(t, root, attachEgress) != 2 {
		t.Fatalf("got %+v, %v", slips, err)
	}
	undo(t, slips[0])
	if n := attachedTo(t, root, attachEgress); n != 1 {
		t.Errorf("%d programs are attached", n)
	}
	if n := attachedTo(t, own, attachEgress); n != 1 {
		t.Errorf("%d programs are attached to its own", n)
	}
	// The link is there, and does nothing.
	if slips, err := g.Slips(); err != nil || len(slips) != 0 {
		t.Errorf("got %+v, %v", slips, err)
	}
	expect(t, p, 0, "drop", nil)

	// What has no link. A stranger isn't confined. (The kernel has him attach no
	// cgroup_skb program, for which it asks for CAP_NET_ADMIN in the token's namespace.)
	expect(t, target, 0, "load", loading(program{Type: typeCgroupSock, Attach: attachSockCreate, Instructions: []uint64{one, exit}}))
	stranger := outsider(t, target, testtarget.Bob)
	if _, _, err := stranger.Do("attach", []string{"", strconv.Itoa(attachSockCreate)}, root); err == nil {
		t.Error("a stranger has attached a grant's program and lives")
	}
	e := expectEvent(t, events, Slip)
	if e.Grant != id || e.Detail != attachSockCreate || e.Program == 0 || e.Network != 0 || e.PID != stranger.PID {
		t.Errorf("got %+v", e)
	}
	if err := awaitEnd(t.Context(), e.PID); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{1, 0} {
		if n := attachedTo(t, root, attachSockCreate); n != want {
			t.Errorf("%d programs are attached", n)
		}
		undo(t, e)
	}
	admin.Kill()
	target.Kill()
}

// TestSlipInNetwork has a process whose grant may attach to its own interfaces
// use the program of another, that may attach to none. Others go on in the network
// namespace.
func TestSlipInNetwork(t *testing.T) {
	g, events, _ := without(t)
	target := testtarget.NewWith(t, testtarget.Alice, unix.CLONE_NEWUSER|unix.CLONE_NEWNS|unix.CLONE_NEWNET, testtarget.Root)
	grant(t, g, target, confinedTo(profile.ReachOwn))
	child := target.Start(testtarget.Attr{})
	id := grant(t, g, child, confinedTo(profile.ReachNone))
	expect(t, child, 0, "load", loading(simple[typeSchedCLS]))
	if _, _, err := child.Do("attach", []string{"1", strconv.Itoa(attachTCXIngress)}); err == nil {
		t.Error("it has attached a program beyond its reach and lives")
	}
	e := expectEvent(t, events, Slip)
	var stat unix.Stat_t
	if err := unix.Stat("/proc/"+strconv.Itoa(target.PID)+"/ns/net", &stat); err != nil {
		t.Fatal(err)
	}
	if e.Grant != id || e.Detail != attachTCXIngress || e.Network != uint32(stat.Ino) || e.Interface != 1 {
		t.Errorf("got %+v in network namespace %d", e, stat.Ino)
	}
	if err := awaitEnd(t.Context(), e.PID); err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{1, 0, 0} {
		err := kernel.InNetwork(e.Network, func() error {
			r, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
			if err == nil && len(r.Programs) != want {
				t.Errorf("%d: %d programs are attached", i, len(r.Programs))
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		undo(t, e) // which may be done twice
	}
	target.Kill()
	undo(t, e) // there is nothing left of it
}

// TestPreempted keeps tasks in the guard's tracing programs, which aren't run for
// others on the processor then.
func TestPreempted(t *testing.T) {
	preempt(t)
	g, events, _ := without(t)
	own, _ := cgroup(t, "crowd", testtarget.Alice)
	root := openFile(t, "/sys/fs/cgroup")
	misses := func() (all uint64, each []string) {
		for _, name := range []string{"link_prime", "file_alloc", "link_settle"} {
			n := recursionMisses(t, name)
			all += n
			each = append(each, name+" "+strconv.FormatUint(n, 10))
		}
		return all, each
	}
	start, _ := misses()
	var sum crowdResult
	var killed, found int
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		target := testtarget.New(t, testtarget.Alice)
		grant(t, g, target, confinedTo(profile.ReachOwn))
		expect(t, target, 0, "load", loading(simple[typeCgroupSKB]))
		out, _, err := target.Do("crowd", []string{"40", "2"}, own, root)
		var r crowdResult
		if err != nil {
			killed++
		} else if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatal(err)
		}
		sum.Tries += r.Tries
		sum.Slips += r.Slips
		slips, err := g.Slips()
		if err != nil {
			t.Fatal(err)
		}
		found += len(slips)
		for _, e := range slips {
			undo(t, e)
		}
		target.Kill()
	}
	end, each := misses()
	t.Logf("%d tries, %d attached, of which %d were found; %d processes were killed; not run: %s", sum.Tries, sum.Slips, found, killed, strings.Join(each, ", "))
	if end == start {
		t.Error("every program was always run")
	}
	if found != sum.Slips {
		t.Errorf("%d links slipped through, %d were found", sum.Slips, found)
	}
	for len(events) > 0 {
		if e := <-events; e.Reason == SlippedLink {
			undo(t, e)
		}
	}
	testtarget.Eventually(t, "nothing is attached", func() bool { return attachedTo(t, root, attachEgress) == 0 })
}

// recursionMisses is how often a program of the guard's wasn't run.
func recursionMisses(t *testing.T, name string) uint64 {
	t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(dir, linksPrefix+bpf.Version(), name), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		t.Fatal(err)
	}
	p, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	stats, err := p.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return stats.RecursionMisses
}
