// SPDX-License-Identifier: Apache-2.0

//go:build root

package catalog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// Each thing that happens to an object is told, once and in order.
func TestNews(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	news := make(chan string, 100)
	f.Watch(func(s Status, n News) {
		offers := 0
		if s.Object != nil {
			offers = len(s.Object.MapNames()) + len(s.Object.ProgramNames())
		}
		news <- fmt.Sprint([]string{"appeared", "changed", "gone"}[n], " ", s.Name, " ", s.State, " ", offers, " ", s.Err != nil)
	})
	want := func(after string, want ...string) {
		t.Helper()
		var got []string
		for len(news) > 0 {
			got = append(got, <-news)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("after %s (-want +got):\n%s", after, diff)
		}
	}
	f.object("kinds", head)
	want("its file came", "appeared kinds unloaded 2 false")
	f.openMap("kinds", "hits", ReadOnly).Close()
	want("its first use", "changed kinds loaded 2 false")
	f.openMap("kinds", "hits", ReadOnly).Close()
	f.reload()
	if _, err := f.Status("kinds"); err != nil {
		t.Error(err)
	}
	want("nothing")
	f.object("kinds", head+"[Data]\nstep=2\n")
	want("it was loaded anew", "changed kinds loaded 2 false")
	f.object("kinds", head+"[Data]\nstep=2\n[Program on_xdp]\nPublish=yes\n")
	want("it offered more", "changed kinds loaded 3 false")
	f.object("kinds", head+"[Data]\nnonesuch=2\n")
	want("its file was wrong", "changed kinds failed 0 true")
	f.object("kinds", head+"[Data]\nstep=2\n")
	want("its file was mended", "changed kinds loaded 2 false")
	f.object("bad", "[Object]\nFile=ELF/bad.bpf.o\n[Program on_bad]\nPublish=yes\n")
	want("another one came", "appeared bad unloaded 1 false")
	for range 2 {
		if _, err := f.OpenProgram("bad", "on_bad", f.self(), 0); err == nil {
			t.Error("the verifier takes it")
		}
	}
	want("it couldn't be loaded", "changed bad failed 1 true")
	f.check(os.Remove(filepath.Join(f.files, "bad.object")))
	f.check(os.Remove(filepath.Join(f.files, "kinds.object")))
	f.reload()
	want("the files had gone", "gone bad failed 1 true", "gone kinds loaded 2 false")

	// What is wrong with the ELF file shows when somebody looks.
	f.object("none", "[Object]\nFile=ELF/nonesuch.bpf.o\n")
	want("a file without an ELF file came", "appeared none unloaded 0 false")
	if s, err := f.Status("none"); err != nil || s.State != Failed {
		t.Errorf("%+v, %v", s, err)
	}
	want("somebody looked", "changed none failed 0 true")
	if _, err := f.Status("nonesuch"); !errors.Is(err, ErrNoSuchObject) {
		t.Errorf("got %v", err)
	}
	f.check(os.Remove(filepath.Join(f.files, "none.object")))

	user := testtarget.Start(t, testtarget.Attr{})
	f.object("used", head+"[Object]\nKeep=while-used\n")
	want("one with users came", "gone none failed 0 true", "appeared used unloaded 2 false")
	f.openBy(user, "used")
	want("its first use", "changed used loaded 2 false")
	user.Kill()
	testtarget.Eventually(t, "it is unloaded", func() bool { return len(news) > 0 })
	want("its user's end", "changed used unloaded 2 false")
}

// Who asks for an object while the files are read again gets it, whether its turn
// has come or not, and that isn't undone.
func TestOpenDuringReload(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	f.object("first", head)
	f.object("old", head)
	f.write(filepath.Join(f.files, "new.object"), strings.ReplaceAll(head, "ELF", f.elf))
	f.mu.Lock()
	first := f.entries["first"]
	f.mu.Unlock()
	first.mu.Lock() // as while it is loaded
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.Set(Load(config.Dirs{Etc: f.files}))
	}()
	testtarget.Eventually(t, "the new object is known", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.entries["new"] != nil
	})
	for _, name := range []string{"old", "new"} {
		if d, err := f.Describe(name); err != nil || d.State != Unloaded {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
		f.openMap(name, "hits", ReadOnly).Close()
	}
	first.mu.Unlock()
	<-done
	for _, name := range []string{"old", "new"} {
		if s, err := f.Status(name); err != nil || s.State != Loaded {
			t.Errorf("%s after it: %+v, %v", name, s, err)
		}
		f.openMap(name, "hits", ReadOnly).Close()
	}
}

// What Keep= says when an object's time comes counts, and not what it said when
// its last user ended.
func TestKeepIsEdited(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	f.object("kinds", head+"[Object]\nKeep=1s\n")
	user := testtarget.Start(t, testtarget.Attr{})
	f.openBy(user, "kinds")
	user.Kill()
	e := f.entries["kinds"]
	testtarget.Eventually(t, "its last user has ended", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.expiry != nil
	})
	f.object("kinds", head)
	time.Sleep(1100 * time.Millisecond)
	if s, err := f.Status("kinds"); err != nil || s.State != Loaded {
		t.Errorf("%+v, %v", s, err)
	}
}

// One user's processes don't keep the others from objects.
func TestUsersAreLimited(t *testing.T) {
	testtarget.NoLeaks(t)
	f := newFixture(t)
	f.object("kinds", head+"[Object]\nKeep=while-used\n")
	user := testtarget.Start(t, testtarget.Attr{})
	process, err := kernel.NewProcess(user.Dup())
	f.check(err)
	defer process.Close()
	f.owners[1000] = maxUsersOfOwner - 1
	open := func(p *kernel.Process, owner uint32) error {
		file, err := f.OpenMap("kinds", "hits", ReadOnly, p, owner)
		if err == nil {
			err = file.Close()
		}
		return err
	}
	f.check(open(process, 1000))
	f.check(open(process, 1000)) // it is one already
	if err := open(f.self(), 1000); !errors.Is(err, ErrTooManyUsers) {
		t.Errorf("one more: got %v", err)
	}
	f.check(open(f.self(), 1001))
	f.again() // which knows whose they are
	user.Kill()
	testtarget.Eventually(t, "its end is seen", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return len(f.owners) == 1 && f.owners[1001] == 1
	})
}
