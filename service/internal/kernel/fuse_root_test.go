// SPDX-License-Identifier: Apache-2.0

//go:build root && !kernels

package kernel

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// rounds is how much eight goroutines do under pressure.
const rounds = 63

// What follows needs FUSE, a module that the small machines don't have.

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
	p = testtarget.New(t, testtarget.Alice)
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

// A path can lead into a file system that doesn't answer.
func TestHangingPath(t *testing.T) {
	testtarget.NoLeaks(t)
	other := namespacesOf(t, testtarget.New(t, testtarget.Bob))
	p, server := fuseTarget(t)
	n := namespacesOf(t, p)
	f, err := Delegate(n, someRights, testtarget.Alice)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := f.Attach("/", "/mnt/fuse/"+testtarget.FuseHang); !errors.Is(err, ErrTargetHangs) || time.Since(start) > 2*childTimeout {
		t.Errorf("got %v after %v", err, time.Since(start))
	}
	// The helper waits for the server, and nobody else does.
	within(t, time.Second, server.Kill, f.Close)
	if err := unix.Kill(f.c.pid, 0); err != nil {
		t.Errorf("the helper doesn't wait for the server, so this tests nothing: %v", err)
	}
	if err := attachOnce(other, testtarget.Bob, "/mnt"); err != nil {
		t.Errorf("another's meanwhile: %v", err)
	}
	// There are only so many of one owner's, who has no more until they end.
	hanging.add(testtarget.Alice, maxHanging-1)
	if _, err := Delegate(n, someRights, testtarget.Alice); !errors.Is(err, ErrTargetHangs) {
		t.Errorf("one too many: got %v", err)
	}
	if err := Detach(n, testtarget.Alice, 1, "/mnt"); !errors.Is(err, ErrTargetHangs) {
		t.Errorf("one too many: got %v", err)
	}
	if err := attachOnce(other, testtarget.Bob, "/mnt"); err != nil {
		t.Errorf("another's meanwhile: %v", err)
	}
	server.Kill()
	testtarget.Eventually(t, "the helper ends", func() bool { return hanging.room(testtarget.Alice) })
	if err := attachOnce(n, testtarget.Alice, "/mnt"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	hanging.add(testtarget.Alice, 1-maxHanging)
	if len(hanging.perOwner) != 0 {
		t.Errorf("still counted: %v", hanging.perOwner)
	}
}

// A container's directories can be on FUSE, which answers the helper.
func TestFuse(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.New(t, testtarget.Alice)
	server := p.Start(testtarget.Attr{})
	p.Must("mkdir", "/mnt/fuse")
	server.Fuse("/mnt/fuse")
	t.Cleanup(server.Kill)
	for path, want := range map[string]error{"/mnt/fuse": nil, "/mnt/fuse/" + testtarget.FuseFile: ErrPathNotDirectory} {
		within(t, 4*time.Second, server.Kill, func() {
			if err := attachOnce(namespacesOf(t, p), testtarget.Alice, path); !errors.Is(err, want) {
				t.Errorf("%s: got %v", path, err)
			}
		})
	}
}

// A FUSE of a user namespace is not even asked if that doesn't map the helper.
func TestFuseDenied(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.NewWith(t, testtarget.Alice, unix.CLONE_NEWUSER|unix.CLONE_NEWNS, testtarget.None)
	p.Map("0 1000 1", "1 1000 1") // no root's gid
	p = p.Start(testtarget.Attr{})
	p.Must("tmpfs", "/mnt")
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
