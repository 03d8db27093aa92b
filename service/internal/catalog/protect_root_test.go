// SPDX-License-Identifier: Apache-2.0

//go:build root

package catalog

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// fakeGuard has the maps that are protected.
type fakeGuard struct {
	ids  map[ebpf.MapID]bool
	fail error
}

func (g *fakeGuard) Protect(id ebpf.MapID) error {
	if g.fail == nil {
		g.ids[id] = true
	}
	return g.fail
}

func (g *fakeGuard) Unprotect(id ebpf.MapID) error {
	delete(g.ids, id)
	return nil
}

// The guard has the maps that are for reading alone for as long as they are loaded,
// whatever happens to the object and the daemon.
func TestProtected(t *testing.T) {
	f := newFixture(t)
	g := &fakeGuard{ids: map[ebpf.MapID]bool{}}
	f.GuardBy(g)
	object := func(access string) {
		t.Helper()
		f.object("kinds", "[Object]\nFile=ELF/kinds.bpf.o\nLoad=boot\n[Map hits]\nAccess="+access+"\n[Map events]\nAccess=consume\n"+
			"[Program on_raw]\nAttach=none\n[Program on_tracepoint]\nAttach=none\n")
	}
	want := func(what string, held bool) {
		t.Helper()
		if f.Held("kinds", "hits") != held || f.Held("kinds", "events") || len(g.ids) > 1 || (len(g.ids) == 1) != held {
			t.Errorf("%s: held %v, the guard has %v", what, f.Held("kinds", "hits"), g.ids)
		}
	}
	object("read-only")
	want("for reading", true)
	m := f.openMap("kinds", "hits", ReadOnly)
	info, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	_ = m.Close()
	if id, _ := info.ID(); !g.ids[id] {
		t.Errorf("the guard has %v, not %d", g.ids, id)
	}
	object("read-only read-write")
	want("for writing", false)
	object("write-only")
	want("for writing alone", false)
	object("read-only")
	want("for reading again", true)

	// The guard was put in anew, and knows nothing.
	f.Close()
	clear(g.ids)
	f.open()
	f.GuardBy(g)
	f.reload()
	want("adopted", true)

	// Killed while it was taken away.
	instances, err := filepath.Glob(f.root() + "/kinds@*")
	if err != nil || len(instances) != 1 {
		t.Fatal(instances, err)
	}
	if err := kernel.RenamePin(instances[0], filepath.Join(f.root(), stage+"kinds")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(f.files, "kinds.object")); err != nil {
		t.Fatal(err)
	}
	f.reload()
	want("half gone", false)

	g.fail = errors.New("full")
	object("read-only")
	want("not held", false)
}
