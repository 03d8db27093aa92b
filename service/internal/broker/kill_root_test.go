// SPDX-License-Identifier: Apache-2.0

//go:build root

package broker

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// inUserNamespace returns the processes in a namespace that live: zombies, too,
// are in one.
func inUserNamespace(link string) (pids []string) {
	namespaces, _ := filepath.Glob("/proc/[0-9]*/ns/user")
	for _, path := range namespaces {
		if is, err := os.Readlink(path); err != nil || is != link {
			continue
		}
		dir := filepath.Dir(filepath.Dir(path))
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		threads, _ := os.ReadDir(filepath.Join(dir, "task"))
		if err != nil || strings.HasPrefix(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " Z") && len(threads) < 2 {
			continue
		}
		pids = append(pids, filepath.Base(dir))
	}
	return pids
}

func userNamespaceOf(t *testing.T, p *testtarget.Process) string {
	t.Helper()
	link, err := os.Readlink("/proc/" + strconv.Itoa(p.PID) + "/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	return link
}

// mountedFor makes a grant for a process that has a /mnt.
func (f *fake) mountedFor(c Caller, p *testtarget.Process, profileName string) grant.Grant {
	f.t.Helper()
	p.Must("tmpfs", "/mnt")
	g, err := f.MountToken(f.t.Context(), c, profileName, processOf(f.t, p), "/", "/mnt")
	if err != nil {
		f.t.Fatal(err)
	}
	return g
}

// kill revokes a grant with its holders, and wants all of them to be reached.
func (f *fake) kill(c Caller, g grant.Grant) {
	f.t.Helper()
	notReached, err := f.RevokeGrant(f.t.Context(), c, g.ID.String(), true)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, what := range notReached {
		if strings.Contains(what, "process") && !strings.Contains(what, "until the last process") {
			f.t.Errorf("not reached: %q", what)
		}
	}
}

func TestKill(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	for name, hide := range map[string]func(*testing.T, *testtarget.Process){
		"alone": func(*testing.T, *testtarget.Process) {},
		"stopped": func(t *testing.T, p *testtarget.Process) {
			p.Must("stop", p.Must("shell", "exec sleep 1000"))
		},
		"traced": func(t *testing.T, p *testtarget.Process) {
			p.Must("trace")
		},
		"without a main thread": func(t *testing.T, p *testtarget.Process) {
			child := p.Start(testtarget.Attr{})
			go func() { _, _, _ = child.Do("headless", nil) }()
			testtarget.Eventually(t, "its main thread exits", func() bool {
				stat, err := os.ReadFile("/proc/" + strconv.Itoa(child.PID) + "/stat")
				return err == nil && strings.Contains(string(stat), ") Z ")
			})
		},
		"another user in a nested namespace": func(t *testing.T, p *testtarget.Process) {
			other := p.Start(testtarget.Attr{UID: 1})
			nested := other.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER, Mapping: testtarget.Same})
			t.Cleanup(func() {
				if alive(other) || alive(nested) {
					t.Error("the other user's live")
				}
			})
		},
		// Each lives for as long as it takes to fork the next.
		"relay": func(t *testing.T, p *testtarget.Process) {
			for range 4 {
				p.Must("shell", "next() { next & }; next")
			}
		},
		// All ids that there may be, all of them forking.
		"bomb": func(t *testing.T, p *testtarget.Process) {
			p.Must("shell", "ulimit -u 100; while :; do while :; do sleep 0; done & done")
			p.Must("shell", "ulimit -u 100; while :; do (sleep 0.1; while :; do sleep 0; done) & sleep 0; done")
		},
	} {
		t.Run(name, func(t *testing.T) {
			f.t = t
			p := testtarget.NewContainer(t, alice)
			c := caller(t, alice, testtarget.Start(t, testtarget.Attr{UID: alice}))
			g := f.mountedFor(c, p, "plain")
			namespace := userNamespaceOf(t, p)
			hide(t, p)
			time.Sleep(50 * time.Millisecond)
			f.kill(c, g)
			for range 5 {
				if left := inUserNamespace(namespace); len(left) != 0 {
					t.Fatalf("processes %v are left", left)
				}
				time.Sleep(20 * time.Millisecond)
			}
			if !c.Process.Alive() {
				t.Error("whoever asked is dead, too")
			}
		})
	}
}

// Nobody dies who isn't in the namespace, whatever alice has done to be taken for
// the same.
func TestKillNobodyElse(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	outside := testtarget.Start(t, testtarget.Attr{UID: alice})
	p := outside.Start(testtarget.Attr{Namespaces: both})
	c := caller(t, alice, outside)
	g := f.mountedFor(c, p, "plain")
	// It has moved down since then; what is above is its namespace still.
	below := p.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER})
	sibling := outside.Start(testtarget.Attr{Namespaces: both})
	strangers := map[string]*testtarget.Process{
		"who started it":                     outside,
		"alice's other namespace":            sibling,
		"bob's namespace":                    testtarget.New(t, bob),
		"root's in the mount namespace":      inMountsOf(t, p),
		"root's in the namespace of another": testtarget.Start(t, testtarget.Attr{Namespaces: both}),
	}
	f.kill(c, g)
	for name, stranger := range strangers {
		if !alive(stranger) {
			t.Errorf("%s is dead", name)
		}
	}
	if alive(p) || alive(below) {
		t.Error("the holders live")
	}
}

// Who got a right in another user's namespace, or nothing at all, kills nobody.
func TestKillNeedsRight(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p := testtarget.New(t, alice)
	own := caller(t, alice, p)
	stranger := caller(t, bob, testtarget.Start(t, testtarget.Attr{UID: bob}))
	g, err := f.MountToken(t.Context(), stranger, "plain", own.Process, "/", "/mnt")
	if err != nil {
		t.Fatal(err)
	}
	f.answers(func(context.Context) error { return authority.ErrDenied })
	_, err = f.RevokeGrant(t.Context(), stranger, g.ID.String(), true)
	named(t, err, "NotAuthorized")
	_, err = f.RevokeGrant(t.Context(), own, g.ID.String(), true)
	named(t, err, "NoSuchGrant")
	if !alive(p) || f.Grants() != 1 {
		t.Errorf("alive: %v, %d grants", alive(p), f.Grants())
	}
	if _, err := f.revoke(stranger, g.ID.String()); err != nil {
		t.Error(err)
	}
	if !alive(p) {
		t.Error("it is dead")
	}
	f.answers(nil)
	g, err = f.MountToken(t.Context(), stranger, "plain", own.Process, "/", "/mnt")
	if err != nil {
		t.Fatal(err)
	}
	f.kill(stranger, g)
	if alive(p) {
		t.Error("it lives")
	}
}
