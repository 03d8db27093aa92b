// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
)

// archive writes a cpio archive of the "newc" format, which is what the kernel unpacks as its first file system
// (Documentation/driver-api/early-userspace/buffer-format.rst in its source). close returns the first error.
type archive struct {
	w     *bufio.Writer
	dirs  map[string]bool
	count int
	err   error
}

const (
	modeDir  = 0o040000
	modeFile = 0o100000
)

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriter(w), dirs: map[string]bool{"/": true}}
}

// mkdir adds a directory, and the ones it is in.
func (a *archive) mkdir(name string) {
	if a.dirs[name] {
		return
	}
	a.mkdir(path.Dir(name))
	a.dirs[name] = true
	a.entry(name, modeDir|0o755, nil)
}

// write adds a file.
func (a *archive) write(name string, mode os.FileMode, data []byte) {
	if !path.IsAbs(name) || path.Clean(name) != name {
		a.err = fmt.Errorf("cannot add %q: it is not an absolute, clean path", name)
	}
	if a.err != nil {
		return
	}
	a.mkdir(path.Dir(name))
	a.entry(name, modeFile|uint32(mode.Perm()), data)
}

// copy adds a file of the host's, with its permissions.
func (a *archive) copy(name, from string) {
	info, err := os.Stat(from)
	if err != nil {
		a.err = err
		return
	}
	data, err := os.ReadFile(from)
	if err != nil {
		a.err = err
		return
	}
	a.write(name, info.Mode(), data)
}

// close ends the archive.
func (a *archive) close() error {
	a.entry("/TRAILER!!!", 0, nil)
	if a.err != nil {
		return a.err
	}
	return a.w.Flush()
}

func (a *archive) entry(name string, mode uint32, data []byte) {
	if a.err != nil {
		return
	}
	name = name[1:]
	a.count++
	// Its number, mode, owner, group, links, time, size, four device numbers, length of the name, and no checksum.
	_, a.err = fmt.Fprintf(a.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.count, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad(110 + len(name) + 1)
	if a.err == nil {
		_, a.err = a.w.Write(data)
	}
	a.pad(len(data))
}

// pad fills up to the next multiple of four.
func (a *archive) pad(written int) {
	if a.err == nil {
		_, a.err = a.w.Write(make([]byte, -written&3))
	}
}
