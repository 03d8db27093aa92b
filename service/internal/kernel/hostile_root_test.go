// SPDX-License-Identifier: Apache-2.0

//go:build root

package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// within fails the test if something takes longer, and then has rescue end it.
func within(t *testing.T, limit time.Duration, rescue, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
	case <-time.After(limit):
		t.Errorf("it takes longer than %v", limit)
		rescue()
		<-done
	}
}

// fuseTarget makes a target with FUSE at /mnt/fuse, and another process in it,
// because a server that waits for itself can't be ended. The server goes
// before everything else that the test has made by then.
func fuseTarget(t *testing.T) (p, server *testtarget.Process) {
	t.Helper()
	// FUSE asks nothing for ids that aren't mapped, and the helper's gid isn't
	// usually.
	p = testtarget.NewWith(t, testtarget.Alice, unix.CLONE_NEWUSER|unix.CLONE_NEWNS, testtarget.None)
	p.Map("0 1000 1", fmt.Sprintf("0 1000 1\n%d %d 1", nobody, nobody))
	p = p.Start(testtarget.Attr{})
	p.Must("tmpfs", "/mnt")
	server = p.Start(testtarget.Attr{})
	p.Must("mkdir", "/mnt/fuse")
	server.Fuse("/mnt/fuse")
	t.Cleanup(server.Kill)
	return p, server
}

// openFuse has a process open a file of the file system.
func openFuse(t *testing.T, p *testtarget.Process, name string) *os.File {
	t.Helper()
	_, files, err := p.Do("open", []string{"/mnt/fuse/" + name})
	if err != nil {
		t.Fatal(err)
	}
	return files[0]
}

func TestNewProcessOfFuse(t *testing.T) {
	testtarget.NoLeaks(t)
	p, server := fuseTarget(t)
	file := openFuse(t, p, testtarget.FuseFile)
	within(t, 5*time.Second, server.Kill, func() {
		if _, err := NewProcess(file); !errors.Is(err, ErrNotPidFD) {
			t.Errorf("got %v", err)
		}
		if !closed(file) {
			t.Error("it is still open")
		}
	})
}

// A file that a stranger has handed in asks its server when it is closed, and
// another user's helper must not be held up by that.
func TestStubbornFileElsewhere(t *testing.T) {
	testtarget.NoLeaks(t)
	n := namespacesOf(t, testtarget.New(t, testtarget.Bob))
	p, server := fuseTarget(t)
	file := openFuse(t, p, testtarget.FuseStubborn)
	t.Cleanup(func() {
		server.Kill()
		file.Close()
	})
	within(t, 4*time.Second, server.Kill, func() {
		f, err := Delegate(n, someRights, testtarget.Bob)
		if err != nil {
			t.Error(err)
			return
		}
		f.Close()
	})
}

// What hangs, hangs at the same time here, to be quick.
func TestHangs(t *testing.T) {
	testtarget.NoLeaks(t)
	fuse, server := fuseTarget(t)
	n := namespacesOf(t, fuse)
	f, err := Delegate(n, someRights, testtarget.Alice)
	if err != nil {
		t.Fatal(err)
	}
	stopped := namespacesOf(t, testtarget.New(t, testtarget.Bob))
	s, err := Delegate(stopped, someRights, testtarget.Bob)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(s.c.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}

	var wg sync.WaitGroup
	hangs := func(what string, do func() error) {
		wg.Go(func() {
			start := time.Now()
			err := do()
			if took := time.Since(start); !errors.Is(err, ErrTargetHangs) || took > 2*childTimeout {
				t.Errorf("%s: got %v after %v", what, err, took)
			}
		})
	}
	hangs("a path that isn't answered for", func() error { return f.Attach("/mnt/fuse/" + testtarget.FuseHang) })
	hangs("attaching with a stopped helper", func() error { return s.Attach("/mnt") })
	wg.Wait()
	s.Close()

	// The helper waits for the server, and nothing else does.
	closed := make(chan struct{})
	go func() {
		f.Close()
		close(closed)
	}()
	if err := attachOnce(stopped, testtarget.Bob, "/mnt"); err != nil {
		t.Errorf("another's meanwhile: %v", err)
	}
	select {
	case <-closed:
		t.Error("the helper didn't wait for the server, so this tests nothing")
	case <-time.After(100 * time.Millisecond):
	}
	server.Kill()
	<-closed
}

// attachOnce makes a file system, mounts and unmounts it.
func attachOnce(n *Namespaces, owner uint32, path string) error {
	f, err := Delegate(n, someRights, owner)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Attach(path); err != nil {
		return err
	}
	return Detach(n, owner, f.ID, path)
}

// A FUSE of a user namespace is not even asked if that doesn't map the helper.
func TestFuseDenied(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.New(t, testtarget.Alice)
	server := p.Start(testtarget.Attr{})
	p.Must("mkdir", "/mnt/fuse")
	server.Fuse("/mnt/fuse")
	t.Cleanup(server.Kill)
	n := namespacesOf(t, p)
	for _, name := range []string{"missing", testtarget.FuseFile, testtarget.FuseHang} {
		within(t, 4*time.Second, server.Kill, func() {
			if err := attachOnce(n, testtarget.Alice, "/mnt/fuse/"+name); !errors.Is(err, ErrPathDenied) {
				t.Errorf("%s: got %v", name, err)
			}
		})
	}
}

// The target's root has the helper's own uid, and kills it whenever it can.
func TestKilledHelper(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.New(t, testtarget.Alice)
	n := namespacesOf(t, p)
	killer := p.Start(testtarget.Attr{})
	before := p.Mounts()
	killer.Must("shoot", strconv.Itoa(int(unix.SIGKILL)))
	results := map[string]int{}
	deadline := time.Now().Add(4 * time.Second)
	for tries := 0; tries < 300 || (results["killed"] == 0 || results["done"] == 0) && time.Now().Before(deadline); tries++ {
		switch err := attachOnce(n, testtarget.Alice, "/mnt"); {
		case err == nil:
			results["done"]++
		case errors.Is(err, ErrHelperKilled):
			results["killed"]++
		default:
			t.Fatalf("got %v", err)
		}
	}
	t.Logf("%v, %s hits", results, killer.Must("cease"))
	if results["killed"] == 0 {
		t.Error("never killed")
	}
	// What was mounted by helpers that were killed before they could unmount.
	for range p.Mounted("bpf") {
		p.Must("umount", "/mnt")
	}
	if diff := cmp.Diff(before, p.Mounts()); diff != "" {
		t.Errorf("mounts (-before +after):\n%s", diff)
	}
	if err := attachOnce(n, testtarget.Alice, "/mnt"); err != nil {
		t.Errorf("when it's over: %v", err)
	}
}

// Nothing of the helper, which came from the broker, is the target's to see.
func TestHelperIsClosed(t *testing.T) {
	testtarget.NoLeaks(t)
	for name, user := range map[string]int{"alice": testtarget.Alice, "root": 0} {
		t.Run(name, func(t *testing.T) {
			p := testtarget.New(t, user)
			f := delegated(t, namespacesOf(t, p), uint32(user))
			take(t, f)
			sibling := p.Start(testtarget.Attr{})
			if got := p.Must("trace", strconv.Itoa(sibling.PID)); !strings.Contains(got, `"ptrace"`) || !strings.Contains(got, `"pidfd_getfd 3"`) {
				t.Errorf("the target can't even get at its own: %s", got)
			}
			if got := p.Must("trace", strconv.Itoa(f.c.pid)); got != "null" {
				t.Errorf("the target got at the helper's %s", got)
			}
			fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", f.c.pid))
			if err != nil {
				t.Fatal(err)
			}
			// 0 to 2, two namespaces, context, mount and a copy, root directory, token.
			if len(fds) > 10 {
				t.Errorf("the helper has descriptors of its parent's: %v", fds)
			}
		})
	}
}

// The helpers of a broker that is killed at any instant end by themselves.
func TestKilledBroker(t *testing.T) {
	testtarget.NoLeaks(t)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
	p := testtarget.New(t, testtarget.Alice)
	before := p.Mounts()
	for i := range 25 {
		broker := testtarget.Start(t, testtarget.Attr{})
		pidfd := p.Dup()
		if _, _, err := broker.Do("broker", nil, pidfd); err != nil {
			t.Fatal(err)
		}
		pidfd.Close()
		time.Sleep(5*time.Millisecond + time.Duration(i)*137*time.Microsecond)
		broker.Kill()
	}
	// Their helpers are this process's children now; those that it has made
	// itself are alive or are waited for elsewhere.
	testtarget.Eventually(t, "the helpers end", func() bool { return testtarget.ReapOrphans(t) == 0 })
	if diff := cmp.Diff(before, p.Mounts()); diff != "" {
		t.Errorf("mounts (-before +after):\n%s", diff)
	}
}

// Many at once while the collector runs and moves stacks about.
func TestDelegateUnderPressure(t *testing.T) {
	testtarget.NoLeaks(t)
	n := namespacesOf(t, testtarget.New(t, testtarget.Alice))
	stop := make(chan struct{})
	var wg, pressure sync.WaitGroup
	pressure.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	})
	for range 4 {
		pressure.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					deep(200)
					sink.Store(new([64 << 10]byte))
				}
			}
		})
	}
	rounds := 63
	if testing.Short() {
		rounds = 8
	}
	for range 8 {
		wg.Go(func() {
			for range rounds {
				f, err := Delegate(n, someRights, testtarget.Alice)
				if err != nil {
					t.Error(err)
					return
				}
				mount, err := f.Take()
				if err != nil {
					t.Error(err)
				} else {
					mount.Close()
				}
				f.Close()
			}
		})
	}
	wg.Wait()
	close(stop)
	pressure.Wait()
}

var sink atomic.Pointer[[64 << 10]byte]

// deep makes a goroutine's stack grow.
func deep(n int) int {
	var frame [128]int
	if n == 0 {
		return 0
	}
	frame[n%len(frame)] = n
	return deep(n-1) + frame[n%len(frame)]
}

func BenchmarkDelegate(b *testing.B) {
	n := namespacesOf(b, testtarget.New(b, testtarget.Alice))
	for b.Loop() {
		f, err := Delegate(n, someRights, testtarget.Alice)
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}
