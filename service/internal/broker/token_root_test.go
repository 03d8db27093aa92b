// SPDX-License-Identifier: Apache-2.0

//go:build root

package broker

import (
	"context"
	"errors"
	"fmt"
	"maps"
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
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func TestAcquireToken(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p := testtarget.New(t, alice)
	c := caller(t, alice, p)
	c.Interactive = true
	g, mount, err := f.AcquireToken(t.Context(), c, "leased")
	if err != nil {
		t.Fatal(err)
	}
	defer mount.Close()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(mount.Fd()), &fs); err != nil || fs.Type != unix.BPF_FS_MAGIC {
		t.Errorf("the mount is %#x, %v", fs.Type, err)
	}
	var ns unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/user", p.PID), &ns); err != nil {
		t.Fatal(err)
	}
	want := grant.Grant{
		Namespace: ns.Ino,
		ID:        g.ID, Profile: "leased", Tier: "basic", Owner: alice, Target: alice,
		PID: c.Process.PID, Inode: c.Process.Inode, Unit: g.Unit,
		Created: g.Created, Expires: g.Created + time.Hour.Microseconds(), Deadline: g.Deadline,
		Capabilities: []string{"CAP_BPF"}, NotEnforced: []string{"Lease="},
		Began: g.Began, Rights: &profile.Rights{Commands: 1, Maps: 1 << 1},
	}
	if diff := cmp.Diff(want, g); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]grant.Grant{g}, f.list(c)); diff != "" {
		t.Errorf("listed (-want +got):\n%s", diff)
	}
	asked := f.questions()
	if len(asked) != 1 {
		t.Fatalf("asked %v", asked)
	}
	if q := asked[0]; q.Action != authority.TokenBasic || !q.Interactive || q.Subject.UID != alice || q.Subject.PidFD != c.Process.FD() {
		t.Errorf("asked %+v", q)
	}
	f.Withdraw(g.ID)
	f.Withdraw(g.ID) // it may have gone meanwhile
	f.nothingIs(p)
}

func TestMountToken(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p := testtarget.New(t, alice)
	p.Must("mkdir", "/mnt/bpf")
	// Who asks for another process needs no namespaces.
	c := caller(t, alice, testtarget.Start(t, testtarget.Attr{UID: alice}))
	process := processOf(t, p)
	g, err := f.MountToken(t.Context(), c, "plain", process, "/", "/mnt/bpf")
	if err != nil {
		t.Fatal(err)
	}
	if g.Path != "/mnt/bpf" || g.Mount == 0 || g.PID != p.PID || g.Owner != alice {
		t.Errorf("got %+v", g)
	}
	if diff := cmp.Diff([]string{"/mnt/bpf"}, p.Mounted("bpf")); diff != "" {
		t.Errorf("mounts (-want +got):\n%s", diff)
	}
	notReached, err := f.revoke(c, g.ID.String())
	if err != nil {
		t.Error(err)
	}
	if len(notReached) != 2 {
		t.Errorf("not reached: %q", notReached)
	}
	f.nothingIs(p)
	if !process.Alive() || process.FD() < 0 {
		t.Error("the process isn't the caller's any more")
	}
}

// What is granted for a process ends with it, and what can't be unmounted is
// said.
func TestRevokeUnmounted(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p := testtarget.New(t, alice)
	c := caller(t, alice, p)
	g, err := f.MountToken(t.Context(), c, "plain", c.Process, "/", "/mnt")
	if err != nil {
		t.Fatal(err)
	}
	p.Must("umount", "/mnt")
	notReached, err := f.revoke(c, g.ID.String())
	if err != nil {
		t.Error(err)
	}
	if !slices.ContainsFunc(notReached, func(s string) bool { return strings.Contains(s, "not mounted") }) {
		t.Errorf("not reached: %q", notReached)
	}
	f.nothingIs(p)

	if _, err := f.MountToken(t.Context(), c, "plain", c.Process, "/", "/mnt"); err != nil {
		t.Fatal(err)
	}
	p.Kill()
	testtarget.Eventually(t, "the grant ends", func() bool { return f.Grants() == 0 })
	f.nothingIs(p)
}

// Each refusal that a request can meet, in the order of the steps: one that
// comes before the authority's keeps it from being asked.
func TestRefused(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	own := testtarget.New(t, alice)
	own.Must("write", "/mnt/file")
	own.Must("symlink", ".", "/mnt/link")
	closed := t.TempDir() + "/closed/in"
	if err := os.MkdirAll(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(closed), 0); err != nil {
		t.Fatal(err)
	}
	exited := testtarget.New(t, alice)
	gone := processOf(t, exited)
	exited.Kill()
	plain := testtarget.Start(t, testtarget.Attr{UID: alice})
	others := testtarget.NewContainer(t, alice).Start(testtarget.Attr{UID: 1})
	c := caller(t, alice, plain)
	target := processOf(t, own)
	for name, test := range map[string]struct {
		profile string
		process *kernel.Process
		path    string
		want    string
		asked   bool
	}{
		"no profile":          {"missing", target, "/mnt", "NoSuchProfile", false},
		"an empty name":       {"", target, "/mnt", "NoSuchProfile", false},
		"a path for a name":   {"../plain", target, "/mnt", "NoSuchProfile", false},
		"a huge name":         {strings.Repeat("a", 1<<20), target, "/mnt", "NoSuchProfile", false},
		"a misspelt profile":  {"misspelt", target, "/mnt", "InvalidProfile", false},
		"no guard":            {"guarded", target, "/mnt", "GuardUnavailable", false},
		"no profile, no path": {"missing", target, "mnt", "PathInvalid", false},
		"initial":             {"plain", c.Process, "/mnt", "NamespaceInitial", false},
		"nested":              {"plain", processOf(t, others.Start(testtarget.Attr{Namespaces: both})), "/mnt", "NamespaceNested", false},
		"the host's mounts":   {"plain", processOf(t, testtarget.NewWith(t, alice, unix.CLONE_NEWUSER, testtarget.Root)), "/mnt", "MountNamespaceNotOwned", false},
		"exited":              {"plain", gone, "/mnt", "ProcessGone", false},
		"an owner not mapped": {"plain", processOf(t, testtarget.NewWith(t, alice, both, testtarget.None)), "/mnt", "OwnerNotMapped", true},
		"a relative path":     {"plain", target, "mnt", "PathInvalid", false},
		"an empty path":       {"plain", target, "", "PathInvalid", false},
		"..":                  {"plain", target, "/mnt/../mnt", "PathInvalid", false},
		"NUL":                 {"plain", target, "/mnt\x00", "PathInvalid", false},
		"5000 characters":     {"plain", target, "/" + strings.Repeat("a", 5000), "PathInvalid", false},
		"a name too long":     {"plain", target, "/mnt/" + strings.Repeat("a", 300), "PathInvalid", true},
		"no directory":        {"plain", target, "/mnt/missing", "PathNotFound", true},
		"a file":              {"plain", target, "/mnt/file", "PathNotDirectory", true},
		"a link":              {"plain", target, "/mnt/link", "PathIsLink", true},
		"a magic link":        {"plain", target, "/proc/self/root/mnt", "PathIsLink", true},
		"closed":              {"plain", target, closed, "PathDenied", true},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(f.questions())
			_, err := f.MountToken(t.Context(), c, test.profile, test.process, "/", test.path)
			e := named(t, err, test.want)
			if len(e.Reason) > 5000 {
				t.Errorf("a reason of %d bytes", len(e.Reason))
			}
			if got := len(f.questions()) != before; got != test.asked {
				t.Errorf("the authority was asked: %v", got)
			}
			f.nothingIs(own)
		})
	}
}

// What the authority says, and what happens while it thinks.
func TestAuthority(t *testing.T) {
	testtarget.NoLeaks(t)
	say := func(err error) func(context.Context) error { return func(context.Context) error { return err } }
	for name, test := range map[string]struct {
		answer func(*fake, *testtarget.Process) func(context.Context) error
		others bool
		want   string
	}{
		"denied":      {func(*fake, *testtarget.Process) func(context.Context) error { return say(authority.ErrDenied) }, false, "NotAuthorized"},
		"dismissed":   {func(*fake, *testtarget.Process) func(context.Context) error { return say(authority.ErrDismissed) }, false, "NotAuthorized"},
		"challenge":   {func(*fake, *testtarget.Process) func(context.Context) error { return say(authority.ErrChallenge) }, false, "InteractionRequired"},
		"unavailable": {func(*fake, *testtarget.Process) func(context.Context) error { return say(authority.ErrUnavailable) }, false, "AuthorityUnavailable"},
		"too late": {func(*fake, *testtarget.Process) func(context.Context) error { return say(context.DeadlineExceeded) },
			false, "AuthorizationTimeout"},
		"nonsense":             {func(*fake, *testtarget.Process) func(context.Context) error { return say(errors.New("secret")) }, false, "Internal"},
		"others', denied":      {func(*fake, *testtarget.Process) func(context.Context) error { return say(authority.ErrDenied) }, true, "NamespaceNotOwned"},
		"others', dismissed":   {func(*fake, *testtarget.Process) func(context.Context) error { return say(authority.ErrDismissed) }, true, "NamespaceNotOwned"},
		"others', challenge":   {func(*fake, *testtarget.Process) func(context.Context) error { return say(authority.ErrChallenge) }, true, "NamespaceNotOwned"},
		"others', unavailable": {func(*fake, *testtarget.Process) func(context.Context) error { return say(authority.ErrUnavailable) }, true, "AuthorityUnavailable"},
		"the caller has left":  {func(*fake, *testtarget.Process) func(context.Context) error { return waitForEnd }, false, "Canceled"},
		"left, allowed anyhow": {func(*fake, *testtarget.Process) func(context.Context) error { return allowAtTheEnd }, false, "Canceled"},
		"the process exits": {func(_ *fake, p *testtarget.Process) func(context.Context) error {
			return func(context.Context) error { p.Kill(); return nil }
		}, false, "ProcessGone"},
		"the process moves": {func(_ *fake, p *testtarget.Process) func(context.Context) error {
			return func(context.Context) error { p.Must("unshare", strconv.Itoa(unix.CLONE_NEWNS)); return nil }
		}, false, "ProcessGone"},
		"the profile changes": {func(f *fake, _ *testtarget.Process) func(context.Context) error {
			return func(context.Context) error { f.change("plain", files["plain"]+"# and\nMaps=hash\n"); return nil }
		}, false, "Busy"},
		"the profile goes": {func(f *fake, _ *testtarget.Process) func(context.Context) error {
			return func(context.Context) error { f.change("plain", ""); return nil }
		}, false, "NoSuchProfile"},
		"the profile breaks": {func(f *fake, _ *testtarget.Process) func(context.Context) error {
			return func(context.Context) error { f.change("plain", "["); return nil }
		}, false, "InvalidProfile"},
		"the profile needs a guard": {func(f *fake, _ *testtarget.Process) func(context.Context) error {
			return func(context.Context) error { f.change("plain", files["guarded"]); return nil }
		}, false, "GuardUnavailable"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			p := testtarget.New(t, alice)
			uid := uint32(alice)
			if test.others {
				uid = bob
			}
			c := caller(t, uid, p)
			before := p.Mounts()
			f.answers(test.answer(f, p))
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if test.want == "Canceled" {
				time.AfterFunc(20*time.Millisecond, cancel)
			}
			defer cancel()
			_, err := f.MountToken(ctx, c, "plain", c.Process, "/", "/mnt")
			e := named(t, err, test.want)
			if strings.Contains(e.Reason, "secret") {
				t.Errorf("the peer is told %q", e.Reason)
			}
			f.nothingIs(p)
			if alive(p) {
				if diff := cmp.Diff(len(before), len(p.Mounts())); diff != "" {
					t.Errorf("mounts (-before +after):\n%s", diff)
				}
			}
			if n := len(f.questions()); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

func waitForEnd(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func allowAtTheEnd(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// change writes a profile anew.
func (f *fake) change(name, text string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.profiles, name+".profile"), []byte(text), 0o600); err != nil {
		f.t.Error(err)
	}
	f.SetProfiles(f.load())
}

// A reload that changes nothing is no reason to ask again.
func TestReloadDuringAuthorization(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p := testtarget.New(t, alice)
	c := caller(t, alice, p)
	f.answers(func(context.Context) error { f.SetProfiles(f.load()); return nil })
	_, mount, err := f.AcquireToken(t.Context(), c, "plain")
	if err != nil {
		t.Fatal(err)
	}
	mount.Close()
}

// The details are those of the access table and nothing else, and say what was
// verified: not what the caller has to do with it.
func TestDetails(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	for name, test := range map[string]struct {
		uid, owner uint32
		profile    string
		action     authority.Action
		want       map[string]string
	}{
		"one's own":    {alice, alice, "plain", authority.TokenTracing, map[string]string{"profile": "plain", "tier": "tracing", "guard": "unneeded", "programs": "socket_filter", "target.uid": "1000"}},
		"another's":    {bob, alice, "plain", authority.TokenTracingOthers, map[string]string{"profile": "plain", "tier": "tracing", "guard": "unneeded", "programs": "socket_filter", "target.uid": "1000"}},
		"root's own":   {0, 0, "plain", authority.TokenTracing, map[string]string{"profile": "plain", "tier": "tracing", "guard": "unneeded", "programs": "socket_filter", "target.uid": "0"}},
		"root's":       {alice, 0, "plain", authority.TokenTracingOthers, map[string]string{"profile": "plain", "tier": "tracing", "guard": "unneeded", "programs": "socket_filter", "target.uid": "0"}},
		"by root":      {0, alice, "plain", authority.TokenTracingOthers, map[string]string{"profile": "plain", "tier": "tracing", "guard": "unneeded", "programs": "socket_filter", "target.uid": "1000"}},
		"not enforced": {alice, alice, "leased", authority.TokenBasic, map[string]string{"profile": "leased", "tier": "basic", "guard": "absent", "programs": "", "target.uid": "1000"}},
		"everything":   {alice, alice, "any", authority.TokenUnlimited, map[string]string{"profile": "any", "tier": "unlimited", "guard": "unneeded", "target.uid": "1000"}},
		"everything of another's": {bob, alice, "any", authority.TokenUnlimitedOthers,
			map[string]string{"profile": "any", "tier": "unlimited", "guard": "unneeded", "target.uid": "1000"}},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(f.questions())
			p := testtarget.New(t, int(test.owner))
			c := caller(t, test.uid, testtarget.Start(t, testtarget.Attr{}))
			if _, err := f.MountToken(t.Context(), c, test.profile, processOf(t, p), "/", "/mnt"); err != nil {
				t.Fatal(err)
			}
			q := f.questions()[before]
			if q.Action != test.action || q.Subject.UID != test.uid || q.Subject.PidFD != c.Process.FD() {
				t.Errorf("asked %+v", q)
			}
			access := Methods["MountToken"]
			if diff := cmp.Diff(slices.Sorted(slices.Values(access.Details)), slices.Sorted(maps.Keys(q.Details))); diff != "" {
				t.Errorf("keys (-table +got):\n%s", diff)
			}
			if !slices.Contains(access.Actions, q.Action) {
				t.Errorf("the action %s isn't in the table", q.Action)
			}
			for key, want := range test.want {
				if q.Details[key] != want {
					t.Errorf("%s is %q, not %q", key, q.Details[key], want)
				}
			}
		})
	}
}

func TestQuota(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p := testtarget.New(t, alice)
	c := caller(t, alice, p)
	for range grant.MaxPerUser {
		g := grant.Grant{Owner: alice, PID: c.Process.PID, Inode: c.Process.Inode}
		if err := f.Broker.ledger.Begin(&g, c.Process, nil); err != nil {
			t.Fatal(err)
		}
		if err := f.Broker.ledger.Commit(g.ID); err != nil {
			t.Fatal(err)
		}
	}
	_, _, err := f.AcquireToken(t.Context(), c, "plain")
	named(t, err, "QuotaExceeded")
	if asked := f.questions(); len(asked) != 0 {
		t.Errorf("asked %v", asked)
	}
	other := testtarget.New(t, bob)
	_, mount, err := f.AcquireToken(t.Context(), caller(t, bob, other), "plain")
	if err != nil {
		t.Fatalf("bob: %v", err)
	}
	mount.Close()
	p.Kill()
	testtarget.Eventually(t, "alice's end", func() bool { return f.Grants() == 1 })
}

// Nobody learns of others' grants.
func TestOthersGrants(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p := testtarget.New(t, alice)
	c := caller(t, alice, p)
	g, mount, err := f.AcquireToken(t.Context(), c, "plain")
	if err != nil {
		t.Fatal(err)
	}
	mount.Close()
	stranger := caller(t, bob, testtarget.Start(t, testtarget.Attr{UID: bob}))
	f.answers(func(context.Context) error { return authority.ErrDenied })
	if got := f.list(stranger); len(got) != 0 {
		t.Errorf("bob sees %v", got)
	}
	missing := grant.ID(uint64(g.ID) ^ 1).String()
	_, err = f.revoke(stranger, g.ID.String())
	others := named(t, err, "NoSuchGrant")
	_, err = f.revoke(stranger, missing)
	none := named(t, err, "NoSuchGrant")
	if got := strings.ReplaceAll(none.Reason, missing, g.ID.String()); got != others.Reason || none.Layer != others.Layer || none.Remedy != others.Remedy {
		t.Errorf("another's is %+v, one that isn't is %+v", others, none)
	}
	for _, id := range []string{"", "x", strings.Repeat("f", 16), "../" + g.ID.String(), strings.ToUpper(g.ID.String()) + " ", strings.Repeat("a", 1<<20), "\x00", "\n\x1b[2J"} {
		_, err := f.revoke(c, id)
		if e := named(t, err, "NoSuchGrant"); len(e.Reason) > 1000 || strings.ContainsAny(e.Reason, "\x00\n\x1b") {
			t.Errorf("%.40q: the reason is %.200q", id, e.Reason)
		}
	}
	if f.Grants() != 1 {
		t.Error("the grant has gone")
	}
	if _, err := f.revoke(c, g.ID.String()); err != nil {
		t.Error(err)
	}
}

// A broker that was killed between mounting and committing left a mount that
// nobody was told of.
func TestCrash(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	p := testtarget.New(t, alice)
	p.Must("mkdir", "/mnt/complete")
	p.Must("mkdir", "/mnt/pending")
	c := caller(t, alice, p)
	complete, err := f.MountToken(t.Context(), c, "plain", c.Process, "/", "/mnt/complete")
	if err != nil {
		t.Fatal(err)
	}
	pending, err := f.MountToken(t.Context(), c, "plain", c.Process, "/", "/mnt/pending")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	row := filepath.Join(f.dir, pending.ID.String())
	if err := os.Rename(row, row+".pending"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/mnt/complete", "/mnt/pending"}, p.Mounted("bpf")); diff != "" {
		t.Errorf("while it is away (-want +got):\n%s", diff)
	}
	f.open()
	testtarget.Eventually(t, "the pending grant is undone", func() bool { return f.Grants() == 1 })
	if diff := cmp.Diff([]string{"/mnt/complete"}, p.Mounted("bpf")); diff != "" {
		t.Errorf("mounts (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]grant.Grant{complete}, f.list(c)); diff != "" {
		t.Errorf("grants (-want +got):\n%s", diff)
	}
	if _, err := f.revoke(c, complete.ID.String()); err != nil {
		t.Error(err)
	}
	f.nothingIs(p)
}

// A user can't fill the journal, nor keep others' refusals out of it.
func TestRefusalsInTheJournal(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	log := logged(t)
	process := testtarget.Start(t, testtarget.Attr{})
	c := caller(t, alice, process)
	for range 3 * refusalsLogged {
		_, _, err := f.AcquireToken(t.Context(), c, "missing\nMESSAGE=x")
		named(t, err, "NoSuchProfile")
	}
	if n := strings.Count(log(), "Request refused"); n != refusalsLogged-1 {
		t.Errorf("%d refusals were logged", n)
	}
	if n := strings.Count(log(), "Limit exceeded"); n != 1 {
		t.Errorf("%d times it was said that there are more", n)
	}
	if strings.Contains(log(), "\nMESSAGE=") {
		t.Error("a name makes lines of its own")
	}
	_, _, err := f.AcquireToken(t.Context(), caller(t, bob, process), "missing")
	named(t, err, "NoSuchProfile")
	if n := strings.Count(log(), "Request refused"); n != refusalsLogged {
		t.Errorf("bob's refusal wasn't logged")
	}
}

// The same goes for failures that nobody has a name for.
func TestFailuresInTheJournal(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFake(t)
	log := logged(t)
	p := testtarget.New(t, alice)
	c := caller(t, alice, p)
	f.answers(func(context.Context) error { return errors.New("strange") })
	for range 3 * refusalsLogged {
		_, _, err := f.AcquireToken(t.Context(), c, "plain")
		named(t, err, "Internal")
	}
	if n := strings.Count(log(), "a request failed"); n == 0 || n > refusalsLogged {
		t.Errorf("%d failures were logged", n)
	}
}
