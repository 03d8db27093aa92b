// SPDX-License-Identifier: Apache-2.0

//go:build root

package delegate

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func TestMain(m *testing.M) {
	testtarget.Main(m, nil, func() error { return kernel.StartHelpers(func() { panic("no helpers any more") }) })
}

func processOf(t *testing.T, p *testtarget.Process) *kernel.Process {
	t.Helper()
	process, err := kernel.NewProcess(p.Dup())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Close() })
	return process
}

func targetOf(t *testing.T, p *testtarget.Process) *Target {
	t.Helper()
	target, err := NewTarget(processOf(t, p))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(target.Close)
	return target
}

const both = unix.CLONE_NEWUSER | unix.CLONE_NEWNS

func TestNewTarget(t *testing.T) {
	testtarget.NoLeaks(t)
	alice := testtarget.New(t, testtarget.Alice)
	others := testtarget.NewContainer(t, testtarget.Alice).Start(testtarget.Attr{UID: 1})
	exited := testtarget.New(t, testtarget.Alice)
	held := processOf(t, exited)
	exited.Kill()
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	own, err := kernel.NewProcess(os.NewFile(uintptr(self), "pidfd"))
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	for name, test := range map[string]struct {
		process *kernel.Process
		owner   uint32
		want    error
	}{
		"alice's":               {processOf(t, alice), testtarget.Alice, nil},
		"beside":                {processOf(t, alice.Start(testtarget.Attr{})), testtarget.Alice, nil},
		"bob's":                 {processOf(t, testtarget.New(t, testtarget.Bob)), testtarget.Bob, nil},
		"root's":                {processOf(t, testtarget.New(t, 0)), 0, nil},
		"the broker itself":     {own, 0, ErrInitial},
		"initial":               {processOf(t, testtarget.Start(t, testtarget.Attr{UID: testtarget.Alice})), 0, ErrInitial},
		"initial, other mounts": {processOf(t, testtarget.Start(t, testtarget.Attr{Namespaces: unix.CLONE_NEWNS})), 0, ErrInitial},
		"nested":                {processOf(t, alice.Start(testtarget.Attr{Namespaces: both})), testtarget.Alice, nil},
		"nested, mounts not":    {processOf(t, alice.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWUSER})), 0, ErrMountNotOwned},
		"nested, another's":     {processOf(t, others.Start(testtarget.Attr{Namespaces: both})), 0, ErrNested},
		"the host's mounts":     {processOf(t, testtarget.NewWith(t, testtarget.Alice, unix.CLONE_NEWUSER, testtarget.Root)), 0, ErrMountNotOwned},
		"exited":                {held, 0, kernel.ErrProcessGone},
	} {
		target, err := NewTarget(test.process)
		if !errors.Is(err, test.want) {
			t.Errorf("%s: got %v", name, err)
		}
		if err != nil {
			continue
		}
		if target.Owner != test.owner {
			t.Errorf("%s: the owner is %d", name, target.Owner)
		}
		if err := target.Recheck(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		target.Close()
	}
}

func TestRecheck(t *testing.T) {
	testtarget.NoLeaks(t)
	for name, test := range map[string]struct {
		change func(*testtarget.Process)
		want   error
	}{
		"nothing":               {func(*testtarget.Process) {}, nil},
		"a child elsewhere":     {func(p *testtarget.Process) { p.Start(testtarget.Attr{Namespaces: both}) }, nil},
		"another network":       {func(p *testtarget.Process) { p.Must("unshare", strconv.Itoa(unix.CLONE_NEWNET)) }, nil},
		"unshare of the mounts": {func(p *testtarget.Process) { p.Must("unshare", strconv.Itoa(unix.CLONE_NEWNS)) }, ErrMoved},
		"setns to other mounts": {func(p *testtarget.Process) {
			other := p.Start(testtarget.Attr{Namespaces: unix.CLONE_NEWNS})
			p.Must("unshare", strconv.Itoa(unix.CLONE_FS)) // or it couldn't
			p.Must("setns", "/proc/"+strconv.Itoa(other.PID)+"/ns/mnt")
		}, ErrMoved},
		"exit": {func(p *testtarget.Process) { p.Kill() }, kernel.ErrProcessGone},
	} {
		t.Run(name, func(t *testing.T) {
			p := testtarget.New(t, testtarget.Alice)
			target := targetOf(t, p)
			test.change(p)
			if err := target.Recheck(); !errors.Is(err, test.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestFilesystem(t *testing.T) {
	testtarget.NoLeaks(t)
	p := testtarget.New(t, testtarget.Alice)
	target := targetOf(t, p)
	before := p.Mounts()
	mount := func() uint64 {
		f, err := target.Filesystem(&profile.Profile{Commands: 1 << 5, Maps: 1 << 1, Programs: 1 << 1, Attachments: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Attach("/", "/mnt"); err != nil {
			t.Fatal(err)
		}
		return f.ID
	}
	id := mount()
	if mounted := p.Mounted("bpf"); !slices.Contains(mounted, "/mnt") {
		t.Errorf("mounted are %v", mounted)
	}
	unmount := func(id uint64) error { return kernel.Detach(target.Namespaces(), target.Owner, id, "/mnt") }
	if err := unmount(id + 1); !errors.Is(err, kernel.ErrNotMounted) {
		t.Errorf("another mount: got %v", err)
	}
	if err := unmount(id); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, p.Mounts()); diff != "" {
		t.Errorf("mounts (-before +after):\n%s", diff)
	}
	// The namespaces are where it is, wherever the process goes.
	id = mount()
	beside := p.Start(testtarget.Attr{})
	p.Must("unshare", strconv.Itoa(unix.CLONE_NEWNS)) // which copies it
	if err := unmount(id); err != nil {
		t.Error(err)
	}
	if mounted := beside.Mounted("bpf"); slices.Contains(mounted, "/mnt") {
		t.Errorf("left behind is %v", mounted)
	}
}
