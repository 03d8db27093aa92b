// SPDX-License-Identifier: Apache-2.0

//go:build root

package kernel

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// asDaemon does something without the capabilities that have to do with files, which
// the daemon hasn't got.
func asDaemon(t *testing.T, what func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all [2]unix.CapUserData
	if err := unix.Capget(&header, &all[0]); err != nil {
		t.Fatal(err)
	}
	few := all
	few[0].Effective &^= 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH | 1<<unix.CAP_FOWNER
	if err := unix.Capset(&header, &few[0]); err != nil {
		t.Fatal(err)
	}
	what()
	if err := unix.Capset(&header, &all[0]); err != nil {
		t.Fatal(err)
	}
}

// TestRemovePins has a file system that its users have made hard to empty.
func TestRemovePins(t *testing.T) {
	mount := func(kind, dir string) {
		t.Helper()
		if err := unix.Mount("none", dir, kind, 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	}
	dir, outside := t.TempDir(), t.TempDir()
	mount("bpf", dir)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	own := func(path string, mode uint32) {
		t.Helper()
		must(os.Chown(path, testtarget.Alice, testtarget.Alice))
		must(unix.Chmod(path, mode))
	}
	file := filepath.Join(outside, "file")
	must(os.WriteFile(file, nil, 0o600))
	path := dir
	for range 100 {
		must(Pin(filepath.Join(path, "pin"), m.FD()))
		path = filepath.Join(path, "sub")
		must(os.Mkdir(path, 0o700))
	}
	must(os.Symlink(outside, filepath.Join(path, "symlink")))
	must(os.Symlink("/proc", filepath.Join(dir, "proc")))
	must(Pin(filepath.Join(path, "pin"), m.FD()))
	must(os.Link(filepath.Join(path, "pin"), filepath.Join(dir, "hard")))
	for ; path != dir; path = filepath.Dir(path) {
		own(path, 0)
	}
	many := filepath.Join(dir, "many")
	must(os.Mkdir(many, 0o700))
	for i := range 1000 {
		must(Pin(filepath.Join(many, string(rune('a'+i%26))+time.Duration(i).String()), m.FD()))
	}
	own(many, 0o1755)
	own(dir, 0o700)
	kernels, err := filepath.Glob(filepath.Join(dir, "*.debug"))
	must(err)
	open := func() *os.File {
		t.Helper()
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(err)
		f := os.NewFile(uintptr(fd), dir)
		t.Cleanup(func() { f.Close() })
		return f
	}
	remove := func(ctx context.Context) (err error) {
		root := open()
		asDaemon(t, func() { err = RemovePins(ctx, root) })
		return err
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := remove(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := remove(t.Context()); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != len(kernels) {
		t.Errorf("left are %v, %v", left, err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if uid, _ := unix.SetfsuidRetUid(-1); uid != 0 {
		t.Errorf("the thread is %d", uid)
	}

	// What is mounted in there isn't the file system's, and hides a pin.
	hidden := filepath.Join(dir, "hidden")
	must(os.Mkdir(hidden, 0o700))
	must(Pin(filepath.Join(hidden, "pin"), m.FD()))
	mount("tmpfs", hidden)
	file = filepath.Join(hidden, "file")
	must(os.WriteFile(file, nil, 0o600))
	if err := remove(t.Context()); !errors.Is(err, unix.EXDEV) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}
