// SPDX-License-Identifier: Apache-2.0

//go:build root

package broker

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// heard is what a watcher of the broker's heard, a line for each grant.
type heard struct{ lines chan string }

func watch(b *Broker) heard {
	h := heard{make(chan string, 1000)}
	b.Watch(Watcher{
		Made:   func(g grant.Grant) { h.lines <- "made " + g.ID.String() },
		Leased: func(g grant.Grant) { h.lines <- "leased " + g.ID.String() + " " + g.Lease().String() },
		Ended:  func(g grant.Grant, reason grant.Reason) { h.lines <- string(reason) + " " + g.ID.String() },
	})
	return h
}

// next wants exactly these to be heard, in this order.
func (h heard) next(t *testing.T, want ...string) {
	t.Helper()
	for _, want := range want {
		select {
		case got := <-h.lines:
			if got != want {
				t.Errorf("heard %q, want %q", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("nothing was heard of %q", want)
		}
	}
}

// mounted makes a grant of a profile at /mnt of a new target of alice's.
func (f *fake) mounted(profileName string) (*testtarget.Process, Caller, grant.Grant) {
	f.t.Helper()
	p := testtarget.New(f.t, alice)
	c := caller(f.t, alice, p)
	g, err := f.MountToken(f.t.Context(), c, profileName, c.Process, "/", "/mnt")
	if err != nil {
		f.t.Fatal(err)
	}
	return p, c, g
}

func TestGetListRenew(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	h := watch(f.Broker)
	_, c, g := f.mounted("leased")
	stranger := caller(t, bob, testtarget.Start(t, testtarget.Attr{UID: bob}))
	id := g.ID.String()
	for name, test := range map[string]struct {
		do func(context.Context, Caller, string) (grant.Grant, error)
	}{"get": {f.GetGrant}, "renew": {f.RenewGrant}} {
		f.answers(nil)
		before := len(f.questions())
		got, err := test.do(t.Context(), c, id)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		questions := f.questions()[before:]
		switch name {
		case "get":
			if diff := cmp.Diff(g, got); diff != "" || len(questions) != 0 {
				t.Errorf("get: asked %v (-want +got):\n%s", questions, diff)
			}
		case "renew":
			if len(questions) != 1 || questions[0].Action != authority.TokenBasic || questions[0].Details["profile"] != "leased" {
				t.Errorf("renew: asked %v", questions)
			}
			if got.Began <= g.Began || got.Deadline <= g.Deadline || got.Expires <= g.Expires || got.Created != g.Created {
				t.Errorf("renewed: %+v of %+v", got, g)
			}
			g = got
		}

		// A stranger has to be allowed to manage grants, and learns nothing else.
		f.answers(func(context.Context) error { return authority.ErrDenied })
		before = len(f.questions())
		_, err = test.do(t.Context(), stranger, id)
		named(t, err, "NoSuchGrant")
		_, err = test.do(t.Context(), stranger, "0123456789abcdef")
		named(t, err, "NoSuchGrant")
		for _, q := range f.questions()[before:] {
			if q.Action != authority.ManageGrants || q.Details != nil {
				t.Errorf("%s: asked %v", name, q)
			}
		}
		// One who may is asked for the token, too: it is still alice's namespace.
		f.answers(nil)
		before = len(f.questions())
		if got, err = test.do(t.Context(), stranger, id); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var actions []authority.Action
		for _, q := range f.questions()[before:] {
			actions = append(actions, q.Action)
		}
		want := []authority.Action{authority.ManageGrants}
		if name == "renew" {
			want = append(want, authority.TokenBasicOthers)
			g = got
		}
		if diff := cmp.Diff(want, actions); diff != "" {
			t.Errorf("%s: asked (-want +got):\n%s", name, diff)
		}
	}
	h.next(t, "made "+id, "leased "+id+" 1h0m0s", "leased "+id+" 1h0m0s")

	// A renewal that polkit refuses changes nothing.
	f.answers(func(context.Context) error { return authority.ErrDenied })
	_, err := f.RenewGrant(t.Context(), c, id)
	named(t, err, "NotAuthorized")
	// Nor does one whose grant ends meanwhile.
	if diff := cmp.Diff([]grant.Grant{g}, f.list(c)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	_, err = f.ListGrants(t.Context(), stranger, true)
	named(t, err, "NotAuthorized")
	f.answers(nil)
	if got := f.list(stranger); len(got) != 0 {
		t.Errorf("bob's own: %v", got)
	}
	all, err := f.ListGrants(t.Context(), stranger, true)
	if diff := cmp.Diff([]*grant.Grant{&g}, all); diff != "" || err != nil {
		t.Errorf("all: %v (-want +got):\n%s", err, diff)
	}
	f.answers(func(context.Context) error { _ = f.ledger.End(g.ID, grant.Revoked); return nil })
	_, err = f.RenewGrant(t.Context(), c, id)
	named(t, err, "NoSuchGrant")
	h.next(t, "revoked "+id)
	_, err = f.GetGrant(t.Context(), c, id)
	named(t, err, "NoSuchGrant")
}

// What a reload does to a grant of a profile, by what it does to the profile.
func TestNarrowing(t *testing.T) {
	testtarget.NoLeaks(t)
	const text = "[Profile]\nLease=1h\nGuard=optional\n[Delegate]\nCommands=map_create prog_load\nMaps=hash array\nPrograms=socket_filter\n[Guard]\nMaxMaps=9\n"
	for name, test := range map[string]struct {
		text string
		// want is how the grant ends, or its lease, or nothing.
		want string
		// renewal is the name of the error that it then has, if it is there.
		renewal string
	}{
		"nothing":             {text, "", ""},
		"another description": {text + "[Profile]\nDescription=new\n", "", ""},
		"more":                {text + "[Delegate]\nMaps=queue\n[Guard]\nMaxMaps=10\n[Attach]\nCgroups=any\n", "", ""},
		"a longer lease":      {text + "[Profile]\nLease=2h\n", "", ""},
		"no lease":            {text + "[Profile]\nLease=\n", "", ""},
		"a map type less":     {text + "[Delegate]\nMaps=\nMaps=hash\n", "narrowed", ""},
		"other map types":     {text + "[Delegate]\nMaps=\nMaps=hash queue stack\n", "narrowed", ""},
		"no program types":    {text + "[Delegate]\nPrograms=\n", "narrowed", ""},
		"nothing delegated":   {"[Profile]\nDescription=empty\n", "narrowed", ""},
		"fewer maps":          {text + "[Guard]\nMaxMaps=8\n", "narrowed", ""},
		"a helper denied":     {text + "[Guard]\nHelpers=~redirect\n", "narrowed", ""},
		"the guard required":  {text + "[Profile]\nGuard=required\n", "narrowed", ""},
		"masked":              {"", "narrowed", ""},
		"an error":            {text + "[Delegate]\nMapps=hash\n", "", "InvalidProfile"},
		"a shorter lease":     {text + "[Profile]\nLease=30min\n", "leased 30m0s", ""},
		"a shorter one, over": {text + "[Profile]\nLease=1s\n", "expired", ""},
	} {
		for _, restart := range []bool{false, true} {
			if restart {
				name += ", at a restart"
			}
			t.Run(name, func(t *testing.T) {
				f := newFake(t)
				f.change("it", text)
				p, c, g := f.mounted("it")
				id := g.ID.String()
				log := logged(t)
				if strings.HasPrefix(name, "a shorter one, over") {
					time.Sleep(1100 * time.Millisecond)
				}
				if restart {
					f.Close()
					if err := os.WriteFile(filepath.Join(f.profiles, "it.profile"), []byte(test.text), 0o600); err != nil {
						t.Fatal(err)
					}
					f.open()
				} else {
					h := watch(f.Broker)
					f.change("it", test.text)
					if reason, ended := map[string]string{"narrowed": "narrowed ", "expired": "leased " + id + " 1s"}[test.want]; ended && reason == "narrowed " {
						h.next(t, "narrowed "+id)
					} else if ended {
						h.next(t, reason, "expired "+id)
					} else if test.want != "" {
						h.next(t, "leased "+id+" 30m0s")
					}
				}
				if test.want == "narrowed" || test.want == "expired" {
					testtarget.Eventually(t, "it ends", func() bool { return f.Grants() == 0 })
					f.nothingIs(p)
					message := map[string]string{"narrowed": "its profile gives less now", "expired": "its lease expired"}[test.want]
					testtarget.Eventually(t, "it is in the journal", func() bool {
						return strings.Contains(log(), message) && strings.Contains(log(), "grant="+id)
					})
					return
				}
				got := f.list(c)
				if len(got) != 1 || got[0].ID != g.ID {
					t.Fatalf("there are %v", got)
				}
				if lease := got[0].Lease(); (lease != time.Hour) != (test.want != "") {
					t.Errorf("the lease is %v", lease)
				}
				if kept := strings.Contains(log(), "Grants kept"); kept != (test.renewal != "") {
					t.Errorf("logged: %s", log())
				}
				if diff := cmp.Diff([]string{"/mnt"}, p.Mounted("bpf")); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				_, err := f.RenewGrant(t.Context(), c, id)
				if test.renewal != "" {
					named(t, err, test.renewal)
				} else if err != nil {
					t.Error(err)
				}
				if _, err := f.revoke(c, id); err != nil {
					t.Error(err)
				}
				f.nothingIs(p)
			})
		}
	}
}

// A directory that can't be read is no reason to end anything.
func TestNothingReadable(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	log := logged(t)
	_, c, g := f.mounted("plain")
	if err := os.Chmod(f.profiles, 0o777); err != nil {
		t.Fatal(err)
	}
	f.SetProfiles(f.load())
	if got := f.list(c); len(got) != 1 || !strings.Contains(log(), "Grants kept") {
		t.Errorf("there are %v\n%s", got, log())
	}
	_, err := f.RenewGrant(t.Context(), c, g.ID.String())
	named(t, err, "InvalidProfile")
	if _, err := f.revoke(c, g.ID.String()); err != nil {
		t.Error(err)
	}
}

// While somebody looks for a password for a new grant or a renewal, the profile
// is narrowed: nobody gets, or keeps, what it gave before.
func TestNarrowingMeanwhile(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p, c, g := f.mounted("plain")
	narrow := func(context.Context) error {
		f.change("plain", strings.Replace(files["plain"], "lru_hash", "hash", 1))
		return nil
	}
	f.answers(narrow)
	_, err := f.RenewGrant(t.Context(), c, g.ID.String())
	named(t, err, "Busy")
	testtarget.Eventually(t, "the grant ends", func() bool { return f.Grants() == 0 })
	f.nothingIs(p)

	f.change("plain", files["plain"])
	_, err = f.MountToken(t.Context(), c, "plain", c.Process, "/", "/mnt")
	named(t, err, "Busy")
	f.nothingIs(p)

	// A renewal that begins before the ledger has heard of it.
	f.answers(nil)
	f.change("plain", files["plain"])
	p, c, g = f.mounted("plain")
	if err := os.WriteFile(filepath.Join(f.profiles, "plain.profile"), []byte(strings.Replace(files["plain"], "lru_hash", "hash", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	f.Broker.profiles.Store(f.load())
	_, err = f.RenewGrant(t.Context(), c, g.ID.String())
	if e := named(t, err, "GrantNarrowed"); e.Layer != "profile" || !strings.Contains(e.Reason, g.ID.String()) {
		t.Errorf("got %+v", e)
	}
	if _, err := f.revoke(c, g.ID.String()); err != nil {
		t.Error(err)
	}
	f.nothingIs(p)
}

// A grant that becomes live while the profiles are read is compared by whoever
// makes it.
func TestNarrowingWhileItIsMade(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p := testtarget.New(t, alice)
	c := caller(t, alice, p)
	_, err := f.grantToken(t.Context(), c, "plain", c.Process, "/mnt", func(fs *kernel.Filesystem) error {
		if err := fs.Attach("/", "/mnt"); err != nil {
			return err
		}
		f.change("plain", strings.Replace(files["plain"], "lru_hash", "hash", 1))
		return nil
	})
	named(t, err, "Busy")
	f.nothingIs(p)
}

// inMountsOf starts a process in another's mount namespace, which outlives it.
func inMountsOf(t *testing.T, p *testtarget.Process) *testtarget.Process {
	t.Helper()
	beside := testtarget.Start(t, testtarget.Attr{})
	beside.Must("unshare", strconv.Itoa(unix.CLONE_FS)) // or it couldn't
	beside.Must("setns", fmt.Sprintf("/proc/%d/ns/mnt", p.PID))
	return beside
}

// What is mounted goes with the grant, also when the process has left it behind
// and others are in its namespaces.
func TestUnmountedAfterExit(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p, _, _ := f.mounted("plain")
	beside := inMountsOf(t, p)
	if !slices.Contains(beside.Mounted("bpf"), "/mnt") {
		t.Fatalf("mounted are %v", beside.Mounted("bpf"))
	}
	p.Kill()
	testtarget.Eventually(t, "the grant ends", func() bool { return f.Grants() == 0 })
	if mounted := beside.Mounted("bpf"); len(mounted) != 0 {
		t.Errorf("still mounted: %v", mounted)
	}

	// A daemon that was away can't find them, and says so.
	log := logged(t)
	p, _, _ = f.mounted("plain")
	beside = inMountsOf(t, p)
	f.Close()
	p.Kill()
	f.open()
	testtarget.Eventually(t, "the grant ends", func() bool { return f.Grants() == 0 })
	testtarget.Eventually(t, "it is in the journal", func() bool { return strings.Contains(log(), "while the daemon was stopped") })
	if mounted := beside.Mounted("bpf"); len(mounted) != 1 {
		t.Errorf("mounted: %v", mounted)
	}
}
