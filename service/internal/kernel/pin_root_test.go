// SPDX-License-Identifier: Apache-2.0

//go:build root

package kernel

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func init() { ops["pins"] = tryPins }

// tryPins tries what root of a user namespace could do with pins at a path.
func tryPins(args []string, _ []*os.File) (string, []*os.File, error) {
	results := bpfResults{}
	note := func(name string, err error) {
		var errno syscall.Errno
		errors.As(err, &errno)
		results[name] = errno
	}
	get := func(name string, flags uint32) {
		fd, err := pinned(unix.BPF_OBJ_GET, -1, args[0]+name, 0, flags)
		if err == nil {
			_ = unix.Close(fd)
		}
		note("get"+name+map[uint32]string{0: "", PinReadOnly: " to read", PinWriteOnly: " to write"}[flags], err)
	}
	for _, name := range []string{"/o/read", "/o/both"} {
		for _, flags := range []uint32{0, PinReadOnly, PinWriteOnly} {
			get(name, flags)
		}
	}
	note("chmod", os.Chmod(args[0]+"/o/read", 0o666))
	note("unlink", os.Remove(args[0]+"/o/read"))
	note("mkdir", os.Mkdir(args[0]+"/p", 0o755))
	note("remount", unix.Mount("", args[0], "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	note("remount the file system", unix.Mount("", args[0], "", unix.MS_REMOUNT, "mode=0777"))
	// A mount that can be written to changes nothing.
	note("chmod, again", os.Chmod(args[0]+"/o/read", 0o666))
	note("unlink, again", os.Remove(args[0]+"/o/read"))
	note("mkdir, again", os.Mkdir(args[0]+"/p", 0o755))
	get("/o/read", 0)
	data, err := json.Marshal(results)
	return string(data), nil, err
}

func TestPins(t *testing.T) {
	testtarget.NoLeaks(t)
	fd, err := createMap(mapArray, 0)
	if err != nil {
		t.Fatal(err)
	}
	array := os.NewFile(uintptr(fd), "map")
	defer array.Close()
	target := testtarget.New(t, testtarget.Alice)
	target.Must("mkdir", "/mnt/pins")
	n := namespacesOf(t, target)
	before := target.Mounts()

	pins, err := NewPins()
	if err != nil {
		t.Fatal(err)
	}
	defer pins.Close()
	if err := errors.Join(pins.Mkdir("o"), pins.Pin("o/read", array, 0o444), pins.Pin("o/both", array, 0o666)); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{"/mnt/nothing": ErrPathNotFound, "mnt": ErrPathInvalid} {
		if err := pins.Attach(n, testtarget.Alice, path); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", path, err, want)
		}
	}
	if err := pins.Attach(n, testtarget.Alice, "/mnt/pins"); err != nil {
		t.Fatal(err)
	}
	var got bpfResults
	if err := json.Unmarshal([]byte(target.Must("pins", "/mnt/pins")), &got); err != nil {
		t.Fatal(err)
	}
	want := bpfResults{
		"get/o/read": unix.EACCES, "get/o/read to read": 0, "get/o/read to write": unix.EACCES,
		"get/o/both": 0, "get/o/both to read": 0, "get/o/both to write": 0,
		"chmod": unix.EROFS, "unlink": unix.EROFS, "mkdir": unix.EROFS,
		"remount": got["remount"], "remount the file system": unix.EPERM,
		"chmod, again": unix.EPERM, "unlink, again": unix.EACCES, "mkdir, again": unix.EACCES,
	}
	if got["remount"] == unix.EPERM {
		want["chmod, again"], want["unlink, again"], want["mkdir, again"] = unix.EROFS, unix.EROFS, unix.EROFS
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	t.Logf("remount: %v", got["remount"])
	if err := Detach(n, testtarget.Alice, pins.ID, "/mnt/pins"); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, target.Mounts()); diff != "" {
		t.Errorf("mounts (-before +after):\n%s", diff)
	}
}

// What is pinned is opened again, with what it is asked to be good for.
func TestOpenPinned(t *testing.T) {
	testtarget.NoLeaks(t)
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if !IsBPFFilesystem(dir) || IsBPFFilesystem(t.TempDir()) {
		t.Error("a BPF file system is not told from others")
	}
	fd, err := createMap(mapArray, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	path := filepath.Join(dir, "map")
	if err := Pin(path, fd); err != nil {
		t.Fatal(err)
	}
	for _, flags := range []uint32{0, PinReadOnly, PinWriteOnly} {
		file, err := OpenPinned(path, flags)
		if err != nil {
			t.Errorf("%#x: %v", flags, err)
			continue
		}
		_ = file.Close()
	}
	if _, err := OpenPinned(path+"s", 0); !errors.Is(err, ErrNotPinned) {
		t.Errorf("nothing: got %v", err)
	}
	if err := Pin(path, fd); err == nil {
		t.Error("pinned over another pin")
	}
}
