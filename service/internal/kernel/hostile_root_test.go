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

// attachOnce makes a file system, mounts and unmounts it.
func attachOnce(n *Namespaces, owner uint32, path string) error {
	f, err := Delegate(n, someRights, owner)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Attach("/", path); err != nil {
		return err
	}
	return Detach(n, owner, f.ID, path)
}

// The target's root has the helper's own uid, and kills it whenever it can.
func TestKilledHelper(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.New(t, testtarget.Alice)
	n := namespacesOf(t, p)
	killer := p.Start(testtarget.Attr{})
	before := p.Mounts()
	killer.Must("shoot", strconv.Itoa(os.Getpid()), strconv.Itoa(int(unix.SIGKILL)))
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

// Nor does it get anywhere by stopping it.
func TestStoppedHelper(t *testing.T) {
	testtarget.NoLeaks(t)
	n := namespacesOf(t, testtarget.New(t, testtarget.Alice))
	f := delegated(t, n, testtarget.Alice)
	if err := unix.Kill(f.c.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := f.Attach("/", "/mnt"); !errors.Is(err, ErrTargetHangs) || time.Since(start) > 2*childTimeout {
		t.Errorf("got %v after %v", err, time.Since(start))
	}
	if err := attachOnce(n, testtarget.Alice, "/mnt"); err != nil {
		t.Errorf("another: %v", err)
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
			// 0 to 2, socket, two namespaces, context, mount and a copy, root directory, token.
			if len(fds) > 11 {
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
	// Their helpers, and what those are copies of, are this process's children now.
	// Its own such process is alive, and its own helpers are waited for elsewhere.
	// Twice, because one that was seen alive may have borne another meanwhile.
	for range 2 {
		testtarget.Eventually(t, "the helpers end", func() bool { return testtarget.ReapOrphans(t) == 1 })
	}
	if diff := cmp.Diff(before, p.Mounts()); diff != "" {
		t.Errorf("mounts (-before +after):\n%s", diff)
	}
}

func TestKilledMother(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.New(t, testtarget.Alice)
	broker := testtarget.Start(t, testtarget.Attr{})
	pidfd := p.Dup()
	defer pidfd.Close()
	if got, _, err := broker.Do("orphan", nil, pidfd); err != nil || got != "" {
		t.Errorf("got %s, %v", got, err)
	}
}

// There is an end to the number of helpers, and their pages are used again.
func TestTooManyHelpers(t *testing.T) {
	testtarget.NoLeaks(t)
	n := namespacesOf(t, testtarget.New(t, testtarget.Alice))
	for range 2 {
		var helpers []*child
		for range maxHelpers {
			c, err := newHelper(n, testtarget.Alice)
			if err != nil {
				t.Fatal(err)
			}
			helpers = append(helpers, c)
		}
		if _, err := newHelper(n, testtarget.Alice); !errors.Is(err, ErrTooManyHelpers) {
			t.Errorf("got %v", err)
		}
		for _, c := range helpers {
			c.kill()
		}
		testtarget.Eventually(t, "the pages are free", func() bool {
			mother.mu.Lock()
			defer mother.mu.Unlock()
			return len(mother.free) == maxHelpers
		})
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
