// SPDX-License-Identifier: Apache-2.0

package grant

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	testtarget.Main(m, nil, nil)
}

// end is what a ledger said of a grant's end.
type end struct {
	ID     ID
	Reason Reason
	Err    error
}

// fixture is a ledger and what it has called.
type fixture struct {
	t   *testing.T
	dir string
	*Ledger
	undoErr error
	// namespaces are those of every target.
	namespaces *kernel.Namespaces

	mu     sync.Mutex
	undone []ID
	ends   []end
}

// errLost is what undo says when it gets no namespaces.
var errLost = errors.New("lost")

// open opens the ledger in a directory. close closes it, as does the end of
// the test.
func open(t *testing.T, dir string) *fixture {
	t.Helper()
	f := &fixture{t: t, dir: dir, namespaces: namespacesOf(t, self(t))}
	var err error
	f.Ledger, err = Open(dir, func(g Grant, n *kernel.Namespaces) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if n == nil {
			return errLost
		}
		if same, err := f.namespaces.Same(n); err != nil || !same {
			t.Errorf("undo got other namespaces: %v", err)
		}
		f.undone = append(f.undone, g.ID)
		return f.undoErr
	}, func(g Grant, reason Reason, err error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.ends = append(f.ends, end{g.ID, reason, err})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.close)
	return f
}

func (f *fixture) close() {
	if f.Ledger != nil {
		f.Close()
		f.Ledger = nil
	}
}

// of lists a user's grants.
func (f *fixture) of(owner uint32) []Grant {
	grants := []Grant{}
	for _, g := range f.List(func(g *Grant) bool { return g.Owner == owner }) {
		grants = append(grants, *g)
	}
	return grants
}

func (f *fixture) heard() (undone []ID, ends []end) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.undone), slices.Clone(f.ends)
}

// waitFor waits until the grants have ended, and then wants exactly that.
func (f *fixture) waitFor(undone []ID, ends ...end) {
	f.t.Helper()
	testtarget.Eventually(f.t, "the grants end", func() bool { _, got := f.heard(); return len(got) >= len(ends) })
	gotUndone, gotEnds := f.heard()
	if diff := cmp.Diff(ends, gotEnds, cmpopts.EquateErrors()); diff != "" {
		f.t.Errorf("ends (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(undone, gotUndone); diff != "" {
		f.t.Errorf("undone (-want +got):\n%s", diff)
	}
}

// rows wants exactly these files in the directory, readable for their owner
// alone.
func (f *fixture) rows(want ...string) {
	f.t.Helper()
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		f.t.Fatal(err)
	}
	var got []string
	for _, entry := range entries {
		got = append(got, entry.Name())
		if info, err := entry.Info(); err == nil && info.Mode() != 0o600 {
			f.t.Errorf("%s has mode %v", entry.Name(), info.Mode())
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		f.t.Errorf("rows (-want +got):\n%s", diff)
	}
}

func start(t *testing.T) (*testtarget.Process, *kernel.Process) {
	t.Helper()
	p := testtarget.Start(t, testtarget.Attr{})
	process, err := kernel.NewProcess(p.Dup())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Close() })
	return p, process
}

func begin(t *testing.T, l *Ledger, owner uint32, lease time.Duration, process *kernel.Process) Grant {
	t.Helper()
	g := Grant{Profile: "network", Tier: "network", Owner: owner, PID: process.PID, Inode: process.Inode, Path: "/mnt", Mount: 7,
		Rights: &profile.Rights{Commands: 1}}
	g.SetLease(lease)
	namespaces, err := self(t).Namespaces() // the process may have exited
	if err != nil {
		t.Fatal(err)
	}
	defer namespaces.Close()
	if err := l.Begin(&g, process, namespaces); err != nil {
		t.Fatal(err)
	}
	return g
}

// self is this process, whose namespaces are those of the processes that it starts.
func self(t *testing.T) *kernel.Process {
	t.Helper()
	process, err := kernel.OpenProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Close() })
	return process
}

func namespacesOf(t *testing.T, process *kernel.Process) *kernel.Namespaces {
	t.Helper()
	namespaces, err := process.Namespaces()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(namespaces.Close)
	return namespaces
}

func add(t *testing.T, l *Ledger, owner uint32, lease time.Duration, process *kernel.Process) Grant {
	t.Helper()
	g := begin(t, l, owner, lease, process)
	if err := l.Commit(g.ID); err != nil {
		t.Fatal(err)
	}
	return g
}

func TestID(t *testing.T) {
	t.Parallel()
	for _, id := range []ID{0, 1, 0xdeadbeef, 1<<64 - 1} {
		var got ID
		if err := got.UnmarshalText([]byte(id.String())); err != nil || got != id {
			t.Errorf("%v: got %v, %v", id, got, err)
		}
	}
	for _, text := range []string{
		"", "0", "123456789abcdef", "0123456789abcdef0", "0123456789ABCDEF", "0x23456789abcdef", "+123456789abcdef", "-123456789abcdef",
		"0123456789abcde ", "0123456789abcdeg", "01234567_9abcdef", "../../etc/passwd", "................", "0123456789abcde\x00", "０１２３４５６７８９ａｂｃｄｅｆ",
		strings.Repeat("0", 1<<20),
	} {
		id := ID(7)
		if err := id.UnmarshalText([]byte(text)); err == nil || id != 7 {
			t.Errorf("%.40q: got %v, %v", text, id, err)
		} else if len(err.Error()) > 200 {
			t.Errorf("%.40q: an error of %d bytes", text, len(err.Error()))
		}
	}
}

func TestLifeOfAGrant(t *testing.T) {
	testtarget.NoLeaks(t)
	f := open(t, t.TempDir())
	_, process := start(t)
	g := begin(t, f.Ledger, 1000, time.Hour, process)
	f.rows(g.ID.String() + ".pending")
	if f.Len() != 1 {
		t.Errorf("%d grants", f.Len())
	}
	// It isn't anybody's yet.
	if _, err := f.Get(g.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("a pending grant: got %v", err)
	}
	if err := f.End(g.ID, Revoked); !errors.Is(err, ErrNotFound) {
		t.Errorf("the end of a pending grant: got %v", err)
	}
	if got := f.of(1000); len(got) != 0 {
		t.Errorf("a pending grant is listed: %v", got)
	}
	if err := f.Commit(g.ID); err != nil {
		t.Fatal(err)
	}
	f.rows(g.ID.String())
	got, err := f.Get(g.ID)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(g, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]Grant{g}, f.of(1000)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := f.of(1001); got == nil || len(got) != 0 {
		t.Errorf("another user has %#v", got)
	}
	if lease := time.Duration(g.Deadline - kernel.Now()); lease < 59*time.Minute || lease > time.Hour || g.Expires-g.Created != time.Hour.Microseconds() {
		t.Errorf("the lease is %v, from %d to %d", lease, g.Created, g.Expires)
	}
	if err := f.End(g.ID, Revoked); err != nil {
		t.Error(err)
	}
	if err := f.End(g.ID, Revoked); !errors.Is(err, ErrNotFound) {
		t.Errorf("twice: got %v", err)
	}
	f.rows()
	f.waitFor([]ID{g.ID}, end{g.ID, Revoked, nil})
	if f.Len() != 0 || len(f.perUser) != 0 {
		t.Errorf("%d grants, users %v", f.Len(), f.perUser)
	}
}

func TestAbort(t *testing.T) {
	testtarget.NoLeaks(t)
	f := open(t, t.TempDir())
	_, process := start(t)
	g := begin(t, f.Ledger, 1000, time.Millisecond, process)
	f.Abort(g.ID)
	f.rows()
	// Nobody had it, so it has no end to tell of.
	f.waitFor([]ID{g.ID})
	if f.Len() != 0 || len(f.perUser) != 0 {
		t.Errorf("%d grants, users %v", f.Len(), f.perUser)
	}
}

func TestList(t *testing.T) {
	testtarget.NoLeaks(t)
	f := open(t, t.TempDir())
	_, process := start(t)
	want := map[uint32][]ID{}
	for i := range 30 {
		owner := uint32(i % 3)
		want[owner] = append(want[owner], add(t, f.Ledger, owner, 0, process).ID)
		time.Sleep(2 * time.Microsecond)
	}
	for owner, want := range want {
		var got []ID
		for _, g := range f.of(owner) {
			got = append(got, g.ID)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("of %d (-want +got):\n%s", owner, diff)
		}
	}
}

func TestWhatCannotBeUndone(t *testing.T) {
	testtarget.NoLeaks(t)
	f := open(t, t.TempDir())
	_, process := start(t)
	f.undoErr = errors.New("no luck")
	g := add(t, f.Ledger, 1000, 0, process)
	if err := f.End(g.ID, Revoked); err != f.undoErr {
		t.Errorf("got %v", err)
	}
	f.rows()
	_, ends := f.heard()
	if len(ends) != 1 || ends[0].Err != f.undoErr {
		t.Errorf("got %v", ends)
	}
}

func TestQuotas(t *testing.T) {
	testtarget.NoLeaks(t)
	f := open(t, t.TempDir())
	_, process := start(t)
	refused := func(owner uint32, want error) {
		t.Helper()
		if err := f.Room(owner); !errors.Is(err, want) {
			t.Errorf("room for %d: got %v", owner, err)
		}
		g := Grant{Owner: owner, PID: process.PID, Inode: process.Inode}
		if err := f.Begin(&g, process, nil); !errors.Is(err, want) {
			t.Errorf("a grant of %d: got %v", owner, err)
		}
	}
	f.perUser[1] = MaxPerUser - 1
	add(t, f.Ledger, 1, 0, process)
	refused(1, ErrQuotaUser)
	g := add(t, f.Ledger, 2, 0, process)
	fill := f.Len()
	for i := range ID(MaxTotal - fill) {
		f.entries[^i] = &entry{Grant: &Grant{ID: ^i}}
	}
	refused(2, ErrQuotaTotal)
	refused(1, ErrQuotaUser)
	if err := f.End(g.ID, Revoked); err != nil {
		t.Error(err)
	}
	if err := f.Room(2); err != nil {
		t.Errorf("after an end: %v", err)
	}
	// Pending ones count.
	p := begin(t, f.Ledger, 2, 0, process)
	refused(2, ErrQuotaTotal)
	f.Abort(p.ID)
	if err := f.Room(2); err != nil {
		t.Errorf("after an abort: %v", err)
	}
}

func TestRefusedToDisk(t *testing.T) {
	testtarget.NoLeaks(t)
	dir := t.TempDir()
	f := open(t, dir)
	_, process := start(t)
	g := begin(t, f.Ledger, 1, 0, process)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(g.ID); err == nil {
		t.Error("committed to nowhere")
	}
	f.Abort(g.ID)
	if err := f.Begin(&Grant{Owner: 1}, process, nil); err == nil {
		t.Error("begun in nowhere")
	}
	if f.Len() != 0 || len(f.perUser) != 0 {
		t.Errorf("%d grants, users %v", f.Len(), f.perUser)
	}
}

func TestExpiry(t *testing.T) {
	testtarget.NoLeaks(t)
	f := open(t, t.TempDir())
	_, process := start(t)
	add(t, f.Ledger, 1, 0, process)
	add(t, f.Ledger, 1, time.Hour, process)
	late := add(t, f.Ledger, 1, 90*time.Millisecond, process)
	early := add(t, f.Ledger, 2, 30*time.Millisecond, process)
	pending := begin(t, f.Ledger, 1, time.Millisecond, process)
	for _, g := range []Grant{early, late} {
		testtarget.Eventually(t, "the lease ends", func() bool { _, err := f.Get(g.ID); return err != nil })
		if now := kernel.Now(); now < g.Deadline {
			t.Errorf("ended %v early", time.Duration(g.Deadline-now))
		}
	}
	f.waitFor([]ID{early.ID, late.ID}, end{early.ID, Expired, nil}, end{late.ID, Expired, nil})
	// One whose lease ends before it begins ends at once then.
	if err := f.Commit(pending.ID); err != nil {
		t.Fatal(err)
	}
	f.waitFor([]ID{early.ID, late.ID, pending.ID}, end{early.ID, Expired, nil}, end{late.ID, Expired, nil}, end{pending.ID, Expired, nil})
	if n := len(f.of(1)); n != 2 {
		t.Errorf("%d grants are left", n)
	}
}

func TestExit(t *testing.T) {
	testtarget.NoLeaks(t)
	f := open(t, t.TempDir())
	p, process := start(t)
	_, other := start(t)
	a, b := add(t, f.Ledger, 1, 0, process), add(t, f.Ledger, 2, time.Hour, process)
	stays := add(t, f.Ledger, 1, 0, other)
	pending := begin(t, f.Ledger, 1, 0, process)
	p.Kill()
	testtarget.Eventually(t, "the grants end", func() bool { _, ends := f.heard(); return len(ends) == 2 })
	undone, ends := f.heard()
	// Others may have the namespaces of what has gone.
	if len(undone) != 2 {
		t.Errorf("undone: %v", undone)
	}
	for _, e := range ends {
		if e.ID != a.ID && e.ID != b.ID || e.Reason != Exited || e.Err != nil {
			t.Errorf("got %v", e)
		}
	}
	// A process may exit while its grant is made.
	if err := f.Commit(pending.ID); err != nil {
		t.Fatal(err)
	}
	testtarget.Eventually(t, "the late grant ends", func() bool { return f.Len() == 1 })
	f.rows(stays.ID.String())
}

func TestReopen(t *testing.T) {
	testtarget.NoLeaks(t)
	dir := t.TempDir()
	f := open(t, dir)
	// It has to be reaped, too.
	goes := testtarget.Start(t, testtarget.Attr{}).Start(testtarget.Attr{})
	going, err := kernel.NewProcess(goes.Dup())
	if err != nil {
		t.Fatal(err)
	}
	defer going.Close()
	_, stays := start(t)
	adopted := add(t, f.Ledger, 1, 0, stays)
	leased := add(t, f.Ledger, 1, 2*time.Second, stays)
	expired := add(t, f.Ledger, 2, 400*time.Millisecond, stays)
	gone := add(t, f.Ledger, 3, 0, going)
	pending := begin(t, f.Ledger, 4, 0, stays)
	pendingGone := begin(t, f.Ledger, 5, 0, going)
	f.close()
	if _, ends := f.heard(); len(ends) != 0 {
		t.Errorf("closing ended %v", ends)
	}
	goes.Kill()
	testtarget.Eventually(t, "the process is reaped", func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d", goes.PID))
		return err != nil
	})
	time.Sleep(time.Duration(max(0, expired.Deadline-kernel.Now())))

	f = open(t, dir)
	testtarget.Eventually(t, "what is over ends", func() bool { return f.Len() == 2 })
	undone, ends := f.heard()
	for _, want := range []struct {
		end
		undone bool
	}{
		{end{expired.ID, Expired, nil}, true},
		{end{gone.ID, Exited, errLost}, false},
		{end{pending.ID, Undone, nil}, true},
		{end{pendingGone.ID, Exited, errLost}, false},
	} {
		if !slices.Contains(ends, want.end) || slices.Contains(undone, want.ID) != want.undone {
			t.Errorf("want %+v: got %v, undone %v", want, ends, undone)
		}
	}
	if len(ends) != 4 {
		t.Errorf("ends: %v", ends)
	}
	for _, want := range []Grant{adopted, leased} {
		got, err := f.Get(want.ID)
		if err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	f.rows(adopted.ID.String(), leased.ID.String())
	// What was adopted ends as any other.
	testtarget.Eventually(t, "an adopted lease ends", func() bool { _, err := f.Get(leased.ID); return err != nil })
	if err := f.End(adopted.ID, Revoked); err != nil {
		t.Error(err)
	}
	testtarget.Eventually(t, "all end", func() bool { return f.Len() == 0 })
	f.rows()
}

// A pid that has come round, and the same after a boot, is no process of the
// ledger's.
func TestReopenForAnother(t *testing.T) {
	testtarget.NoLeaks(t)
	dir := t.TempDir()
	_, process := start(t)
	for name, g := range map[string]Grant{
		"another inode": {ID: 1, PID: process.PID, Inode: process.Inode + 1},
		"another pid":   {ID: 2, PID: 1, Inode: process.Inode},
		"no process":    {ID: 3},
		"a huge pid":    {ID: 4, PID: 1 << 40, Inode: 1},
	} {
		g.Rights = &profile.Rights{}
		data, err := json.Marshal(g)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, g.ID.String()), data, 0o600); err != nil {
			t.Fatal(err)
		}
		f := open(t, dir)
		f.waitFor(nil, end{g.ID, Exited, errLost})
		f.rows()
		f.close()
		if t.Failed() {
			t.Fatal(name)
		}
	}
}

func TestHostileRows(t *testing.T) {
	testtarget.NoLeaks(t)
	dir := t.TempDir()
	f := open(t, dir)
	_, process := start(t)
	good := add(t, f.Ledger, 1, 0, process)
	f.close()
	data, err := os.ReadFile(filepath.Join(dir, good.ID.String()))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"0000000000000001":         "",
		"0000000000000002":         "null",
		"0000000000000003":         "{",
		"0000000000000004":         string(data), // another's
		"0000000000000005.pending": string(data),
		"0000000000000006":         `{"id":6}`,
		"0000000000000007":         `{"id":"0000000000000007","process":"x"}`,
		"000000000000000e":         `{"id":"000000000000000e"}`, // without rights
		"0000000000000008":         strings.Repeat("a", 1<<20),
		"0000000000000009":         "{" + strings.Repeat(" ", 1<<20),
		"000000000000000a":         strings.Repeat("[", 1<<20),
		"000000000000000b":         "\x00\xff",
		"000000000000000c.pending": string(data[:len(data)/2]), // cut off
		"..pending":                string(data),
		"README":                   "hello",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "000000000000000d"), 0o700); err != nil {
		t.Fatal(err)
	}
	f = open(t, dir)
	f.rows(good.ID.String())
	if _, err := f.Get(good.ID); err != nil || f.Len() != 1 {
		t.Errorf("of %d grants: got %v", f.Len(), err)
	}
	f.waitFor(nil)
}

func TestNoLedger(t *testing.T) {
	testtarget.NoLeaks(t)
	if l, err := Open(filepath.Join(t.TempDir(), "missing"), nil, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, %v", l, err)
	}
}

// However many ways a grant ends at once, it ends once.
func TestEndsOnce(t *testing.T) {
	testtarget.NoLeaks(t)
	f := open(t, t.TempDir())
	for range 20 {
		p, process := start(t)
		g := add(t, f.Ledger, 1, 2*time.Millisecond, process)
		var ended atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				switch err := f.End(g.ID, Revoked); {
				case err == nil:
					ended.Add(1)
				case !errors.Is(err, ErrNotFound):
					t.Error(err)
				}
			})
		}
		wg.Go(p.Kill)
		wg.Wait()
		testtarget.Eventually(t, "the grant ends", func() bool { return f.Len() == 0 })
		if n := ended.Load(); n > 1 {
			t.Errorf("revoked %d times", n)
		}
	}
	testtarget.Eventually(t, "all are heard of", func() bool { _, ends := f.heard(); return len(ends) >= 20 })
	_, ends := f.heard()
	seen := map[ID]bool{}
	for _, e := range ends {
		if seen[e.ID] {
			t.Errorf("%v ended twice", e.ID)
		}
		seen[e.ID] = true
	}
	f.rows()
}

func TestManyGrants(t *testing.T) {
	testtarget.NoLeaks(t)
	f := open(t, t.TempDir())
	p, process := start(t)
	const each = 250 // three descriptors each; a small kernel allows 4096
	ids := make(chan ID, 4*each)
	var wg sync.WaitGroup
	for owner := range uint32(4) {
		wg.Go(func() {
			for range each {
				ids <- add(t, f.Ledger, owner, time.Hour, process).ID
			}
		})
	}
	wg.Wait()
	for range each {
		if err := f.End(<-ids, Revoked); err != nil {
			t.Error(err)
		}
	}
	p.Kill()
	testtarget.Eventually(t, "the others end with their process", func() bool { return f.Len() == 0 })
	f.rows()
}

// A target that can't be undone for long holds up neither the start nor the
// grants of others.
func TestSlowUndo(t *testing.T) {
	testtarget.NoLeaks(t)
	dir := t.TempDir()
	f := open(t, dir)
	_, process := start(t)
	slow := begin(t, f.Ledger, 1, 0, process)
	quick := begin(t, f.Ledger, 2, 0, process)
	expires := add(t, f.Ledger, 1, 300*time.Millisecond, process)
	f.close()
	time.Sleep(time.Duration(max(0, expires.Deadline-kernel.Now())))

	release, ended := make(chan struct{}), make(chan ID, 10)
	opened := make(chan *Ledger)
	go func() {
		l, err := Open(dir, func(g Grant, _ *kernel.Namespaces) error {
			if g.Owner == 1 {
				<-release
			}
			return nil
		}, func(g Grant, _ Reason, _ error) { ended <- g.ID })
		if err != nil {
			panic(fmt.Sprint("cannot open the ledger: ", err))
		}
		opened <- l
	}()
	var l *Ledger
	select {
	case l = <-opened:
	case <-time.After(3 * time.Second):
		t.Error("the start is held up")
		close(release)
		(<-opened).Close()
		return
	}
	if got := <-ended; got != quick.ID {
		t.Errorf("%v ended first", got)
	}
	add(t, l, 2, 0, process)
	close(release)
	if a, b := <-ended, <-ended; a+b != slow.ID+expires.ID {
		t.Errorf("%v and %v ended, not %v and %v", a, b, slow.ID, expires.ID)
	}
	l.Close()
}

func TestShorten(t *testing.T) {
	testtarget.NoLeaks(t)
	dir := t.TempDir()
	f := open(t, dir)
	_, process := start(t)
	for name, lease := range map[string]time.Duration{"a lease": 8 * time.Hour, "no lease": 0} {
		g := add(t, f.Ledger, 1, lease, process)
		got, err := f.Shorten(g.ID, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if got.Lease() != time.Hour || got.Began != g.Began || got.Created != g.Created {
			t.Errorf("%s: got %+v of %+v", name, got, g)
		}
		if off := got.Expires - got.Created - time.Hour.Microseconds(); off < -time.Second.Microseconds() || off > time.Second.Microseconds() {
			t.Errorf("%s: it expires %d µs off", name, off)
		}
		// From the beginning of the lease: twice is no less than once.
		again, err := f.Shorten(g.ID, time.Hour)
		if err != nil || again.Deadline != got.Deadline {
			t.Errorf("%s: again: %+v, %v", name, again, err)
		}
		renewed, err := f.Renew(g.ID, time.Hour)
		if err != nil || renewed.Began <= g.Began || renewed.Deadline <= got.Deadline || renewed.Created != g.Created {
			t.Errorf("%s: renewed: %+v, %v", name, renewed, err)
		}
	}
	// What is over already ends.
	g := add(t, f.Ledger, 2, 0, process)
	time.Sleep(2 * time.Millisecond)
	if _, err := f.Shorten(g.ID, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	f.waitFor([]ID{g.ID}, end{g.ID, Expired, nil})
	if _, err := f.Shorten(g.ID, time.Hour); !errors.Is(err, ErrNotFound) {
		t.Errorf("an ended grant: got %v", err)
	}
	want := f.of(1)
	f.close()
	f = open(t, dir)
	if diff := cmp.Diff(want, f.of(1)); diff != "" {
		t.Errorf("after a restart (-want +got):\n%s", diff)
	}
	// Rows of the same rights share them.
	if got := f.of(1); len(got) != 2 || got[0].Rights != got[1].Rights {
		t.Error("the rights aren't shared")
	}
}

// Who has many grants that can't be undone holds up nobody, not the end of the
// daemon either: what has no time stays written down.
func TestEndLater(t *testing.T) {
	testtarget.NoLeaks(t)
	dir := t.TempDir()
	f := open(t, dir)
	_, process := start(t)
	a, b := add(t, f.Ledger, 1, 0, process), add(t, f.Ledger, 1, 0, process)
	other := add(t, f.Ledger, 2, 0, process)
	entered, release := make(chan ID, 3), make(chan struct{})
	f.Ledger.undo = func(g Grant, _ *kernel.Namespaces) error {
		entered <- g.ID
		if g.Owner == 1 {
			<-release
		}
		return nil
	}
	f.EndLater(a.ID, Narrowed)
	f.EndLater(b.ID, Narrowed)
	f.EndLater(b.ID, Narrowed)
	f.EndLater(other.ID, Narrowed)
	f.EndLater(ID(7), Narrowed)
	if got := f.List(func(*Grant) bool { return true }); len(got) != 0 {
		t.Errorf("still seen: %v", got)
	}
	testtarget.Eventually(t, "the other's ends", func() bool { _, ends := f.heard(); return len(ends) == 1 })
	closed := make(chan struct{})
	go func() {
		f.Ledger.Close()
		close(closed)
	}()
	testtarget.Eventually(t, "it is closing", func() bool {
		f.Ledger.mu.Lock()
		defer f.Ledger.mu.Unlock()
		return f.Ledger.closed
	})
	close(release)
	<-closed
	f.Ledger = nil
	if n := len(entered); n != 2 {
		t.Errorf("%d were undone", n)
	}
	f.rows(b.ID.String())
	f = open(t, dir)
	if got := f.of(1); len(got) != 1 || got[0].ID != b.ID {
		t.Errorf("after a restart there are %v", got)
	}
}
