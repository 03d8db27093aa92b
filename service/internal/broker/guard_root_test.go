// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package broker

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

const guardDir = "/sys/fs/bpf/guard"

// newGuarded makes a broker that has the guard.
func newGuarded(t *testing.T) *fake {
	t.Helper()
	err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0700")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(guard.Unload(guardDir), unix.Unmount("/sys/fs/bpf", 0)); err != nil {
			t.Error(err)
		}
	})
	f := &fake{t: t, profiles: t.TempDir(), dir: t.TempDir()}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(f.profiles, name+".profile"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.reopen()
	t.Cleanup(func() { f.Close() })
	return f
}

// reopen is what a start of the daemon does.
func (f *fake) reopen() {
	f.t.Helper()
	var err error
	if f.guard, err = guard.Open(guardDir); err != nil {
		f.t.Fatal(err)
	}
	f.open()
}

// held returns the grants that the guard holds.
func (f *fake) held() (ids []uint64) {
	f.t.Helper()
	known, err := f.guard.Grants()
	if err != nil {
		f.t.Fatal(err)
	}
	for _, g := range known {
		if !g.Revoked {
			ids = append(ids, g.ID)
		}
	}
	return ids
}

func (f *fake) forgotten() bool {
	known, err := f.guard.Grants()
	return err == nil && len(known) == 0
}

func TestGuarded(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newGuarded(t)
	if o, err := f.DescribeProfile("guarded"); err != nil || o.Refusal != nil || o.NotEnforced != nil {
		t.Errorf("got %+v, %v", o, err)
	}
	if o, err := f.DescribeProfile("held"); err != nil || o.Tier.String() != "basic" {
		t.Errorf("tier %s, %v", o.Tier, err)
	}
	c := caller(t, alice, testtarget.New(t, alice))
	if i := slices.IndexFunc(f.Broker.Check(t.Context(), c), func(x Finding) bool { return x.Subject == "guard" && x.State == "yes" }); i < 0 {
		t.Error("there is no guard")
	}
	_, c, g := f.mounted("guarded")
	if !g.Guarded || len(g.NotEnforced) != 0 {
		t.Errorf("got %+v", g)
	}
	q := f.questions()
	if details := q[len(q)-1].Details; details["guard"] != "active" {
		t.Errorf("polkit was told %v", details)
	}
	known, err := f.guard.Grants()
	if err != nil || len(known) != 1 || known[0].ID != uint64(g.ID) || known[0].Deadline != g.Deadline || known[0].Owner != alice || known[0].Revoked {
		t.Errorf("the guard has %+v, %v", known, err)
	}

	renewed, err := f.RenewGrant(t.Context(), c, g.ID.String())
	if err != nil {
		t.Fatal(err)
	}
	if known, err := f.guard.Grants(); err != nil || len(known) != 1 || known[0].Deadline != renewed.Deadline {
		t.Errorf("renewed: the guard has %+v, %v", known, err)
	}
	notReached, err := f.revoke(c, g.ID.String())
	if err != nil || len(notReached) != 0 {
		t.Errorf("not reached: %q, %v", notReached, err)
	}
	testtarget.Eventually(t, "the guard forgets it", f.forgotten)
}

// What a daemon finds that was killed, or whose guard somebody took away.
func TestGuardedRestart(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newGuarded(t)
	_, _, kept := f.mounted("guarded")
	_, _, lost := f.mounted("guarded")
	f.Close()
	if err := os.Remove(filepath.Join(f.dir, lost.ID.String())); err != nil {
		t.Fatal(err)
	}
	f.reopen()
	testtarget.Eventually(t, "the one without a row goes", func() bool {
		return cmp.Equal(f.held(), []uint64{uint64(kept.ID)})
	})
	f.Close()
	if err := guard.Unload(guardDir); err != nil {
		t.Fatal(err)
	}
	f.reopen()
	testtarget.Eventually(t, "the one without a guard goes", func() bool { return f.Grants() == 0 })
	if !f.forgotten() {
		t.Error("the guard has grants")
	}
}

// The end of a process and of a lease is one for the guard, too.
func TestGuardedEnds(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newGuarded(t)
	p, _, _ := f.mounted("guarded")
	p.Kill()
	testtarget.Eventually(t, "the guard forgets it", f.forgotten)
	f.change("guarded", "[Profile]\nLease=1s\n[Delegate]\nCommands=map_create\nMaps=hash\n")
	f.mounted("guarded")
	time.Sleep(time.Second)
	testtarget.Eventually(t, "the guard forgets it", f.forgotten)
}

// Who may read a published map can't open it for writing by a pin in a granted file
// system, as long as nobody may write it.
func TestGuardedObject(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newGuarded(t)
	file, _ := f.publish()
	p, c, _ := f.mounted("guarded")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	set := func(access string) {
		t.Helper()
		changed := strings.Replace(string(text), "Access=read-only read-write", "Access="+access, 1)
		if err := os.WriteFile(file, []byte(changed), 0o600); err != nil {
			t.Fatal(err)
		}
		f.SetObjects(catalog.Load(config.Dirs{Etc: filepath.Dir(file)}))
	}
	read := func(warns bool) *os.File {
		t.Helper()
		file, warnings, err := f.OpenMap(t.Context(), c, "kinds", "hits", catalog.ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = file.Close() })
		if (len(warnings) > 0) != warns {
			t.Errorf("warnings %q", warnings)
		}
		return file
	}
	reopen := func(file *os.File, flags uint64, want error) {
		t.Helper()
		if _, _, err := p.Do("reopen", []string{strconv.FormatUint(flags, 10), "/mnt/map"}, file); !errors.Is(err, want) {
			t.Errorf("opened with flags %d: %v, want %v", flags, err, want)
		}
	}
	opened := read(true)
	reopen(opened, 0, nil) // which is why
	set("read-only")
	reopen(opened, 0, unix.EPERM) // also by what was handed out before
	opened = read(false)
	for _, flags := range []uint64{0, kernel.PinWriteOnly} {
		reopen(opened, flags, unix.EPERM)
	}
	reopen(opened, kernel.PinReadOnly, nil)

	// What is mounted for it is not for writing either.
	p.Must("mkdir", "/tmp/objects")
	m, err := f.MountObjects(t.Context(), c, []string{"kinds"}, nil, "/tmp/objects")
	if err != nil || m.Warnings != nil {
		t.Errorf("mounted: %+v, %v", m, err)
	}
	// Whom the broker lets write can, when others may.
	set("read-only read-write")
	reopen(read(true), 0, nil)
	set("read-only")
	reopen(opened, 0, unix.EPERM)

	// The object goes, and the guard has nothing of it.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	f.SetObjects(catalog.Load(config.Dirs{Etc: filepath.Dir(file)}))
	reopen(opened, 0, nil)
}
