// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// maxPinDepth is how many directories below each other are searched for pins.
const maxPinDepth = 4096

// RemovePins removes everything in a BPF file system, whoever it belongs to, as
// each directory's owner: until it finds no pin any more, or the context ends.
// root is a descriptor of its root directory (O_PATH will do), and stays the
// caller's. Nothing is followed out of the file system, into what its users may
// have mounted there; that hides what is below, which is an error. Needs
// CAP_SETUID.
func RemovePins(ctx context.Context, root *os.File) error {
	runtime.LockOSThread()
	w := &unpinner{ctx: ctx}
	err := w.run(int(root.Fd()))
	// The identity is the thread's, which ends if it can't have its own back.
	if w.become(0) == nil {
		runtime.UnlockOSThread()
	}
	if err != nil {
		return fmt.Errorf("cannot remove what is pinned: %w", err)
	}
	return nil
}

type unpinner struct {
	ctx context.Context
	// dir is where it is, path the names that led there.
	dir  *os.File
	path []string
}

func (w *unpinner) run(root int) error {
	for {
		if err := w.enter(root); err != nil {
			return err
		}
		pins, err := w.pass()
		_ = w.dir.Close()
		if err != nil || pins == 0 {
			return err
		}
	}
}

// pass empties the file system once. It has one descriptor at a time, however deep
// that is.
func (w *unpinner) pass() (pins int, err error) {
	for {
		below, n, err := w.empty()
		pins += n
		if err != nil {
			return pins, err
		}
		if below != "" {
			if len(w.path) == maxPinDepth {
				return pins, errors.New("the directories are too deep")
			}
			if err := w.move(below); err != nil {
				return pins, err
			}
			w.path = append(w.path, below)
			continue
		}
		if len(w.path) == 0 {
			return pins, nil
		}
		name := w.path[len(w.path)-1]
		w.path = w.path[:len(w.path)-1]
		if err := w.move(".."); err != nil {
			return pins, err
		}
		if err := unix.Unlinkat(int(w.dir.Fd()), name, unix.AT_REMOVEDIR); err != nil && err != unix.ENOENT && err != unix.ENOTEMPTY {
			return pins, err
		}
	}
}

// empty removes all but directories, of which it returns one.
func (w *unpinner) empty() (below string, pins int, err error) {
	if _, err := w.dir.Seek(0, io.SeekStart); err != nil {
		return "", 0, err
	}
	for {
		if w.ctx.Err() != nil {
			return "", pins, w.ctx.Err()
		}
		entries, err := w.dir.ReadDir(256)
		for _, e := range entries {
			if e.IsDir() {
				below = e.Name()
				continue
			}
			err := unix.Unlinkat(int(w.dir.Fd()), e.Name(), 0)
			switch {
			case err == nil && e.Type() == 0:
				pins++
			// Some kernels have iterators of their own in each, for good (EPERM).
			case err != nil && err != unix.ENOENT && err != unix.EPERM:
				return "", pins, err
			}
		}
		if err == io.EOF {
			return below, pins, nil
		}
		if err != nil {
			return "", pins, err
		}
	}
}

// Nothing leads out of the file system.
const inside = unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS

// move goes to a directory below, or to the one above.
func (w *unpinner) move(name string) error {
	from := w.dir
	defer from.Close()
	fd, err := unix.Openat2(int(from.Fd()), name, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: inside,
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return w.enter(fd)
}

// enter opens a directory as its owner, who gets every right to it.
func (w *unpinner) enter(path int) error {
	var stat unix.Stat_t
	if err := unix.Fstat(path, &stat); err != nil {
		return err
	}
	if err := w.become(int(stat.Uid)); err != nil {
		return err
	}
	if stat.Mode&0o700 != 0o700 {
		if err := unix.Fchmodat(path, "", 0o700, unix.AT_EMPTY_PATH); err != nil { // Linux 6.6
			return err
		}
	}
	fd, err := unix.Openat2(path, ".", &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: inside})
	if err != nil {
		return err
	}
	w.dir = os.NewFile(uintptr(fd), "bpf")
	return nil
}

// become gives the thread an identity for files (setfsuid(2)), which the kernel
// lets nobody trace or signal it by.
func (w *unpinner) become(uid int) error {
	_, _ = unix.SetfsuidRetUid(uid)
	// The answer is the identity before, also where it couldn't be changed.
	if now, _ := unix.SetfsuidRetUid(-1); now != uid {
		return unix.EPERM
	}
	return nil
}
