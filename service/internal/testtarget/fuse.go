// SPDX-License-Identifier: Apache-2.0

package testtarget

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The files of the file system that Fuse mounts.
const (
	// FuseFile answers to nothing but its opening and closing.
	FuseFile = "file"
	// FuseStubborn doesn't answer to its closing either.
	FuseStubborn = "stubborn"
	// FuseHang is a name that is looked up in vain.
	FuseHang = "hang"
)

// Fuse has a process mount, at an existing directory, a file system that it
// serves itself, badly. The files are there and open, but get no answer to
// most of what they are asked.
func (p *Process) Fuse(dir string) {
	p.t.Helper()
	// /dev/fuse may be closed to users; the mount must be by who opened it.
	node := filepath.Join(p.t.TempDir(), "fuse")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))); err != nil {
		p.t.Fatal(err)
	}
	if err := os.Chmod(node, 0o666); err != nil {
		p.t.Fatal(err)
	}
	fd, err := unix.Open(node, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), node)
	defer file.Close()
	if _, _, err := p.Do("fuse", []string{dir}, file); err != nil {
		p.t.Fatalf("cannot mount FUSE: %v", err)
	}
}

func fuse(args []string, files []*os.File) (string, []*os.File, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", files[0].Fd()), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, err
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=%d,allow_other", fd, os.Getgid())
	err = unix.Mount("fuse", args[0], "fuse", 0, options)
	go serveFuse(fd)
	return "", nil, err
}

// Node numbers.
const (
	fuseRoot = 1 + iota
	fuseFile
	fuseStubborn
)

// serveFuse answers requests as include/uapi/linux/fuse.h has them, until the
// file system is unmounted.
func serveFuse(fd int) {
	const headerSize = 40
	buffer := make([]byte, 1<<20)
	for {
		n, err := unix.Read(fd, buffer)
		if err == unix.EINTR || err == unix.ENOENT {
			continue
		}
		if err != nil || n < headerSize {
			return
		}
		opcode := binary.NativeEndian.Uint32(buffer[4:])
		unique := binary.NativeEndian.Uint64(buffer[8:])
		node := binary.NativeEndian.Uint64(buffer[16:])
		var body []byte
		var errno unix.Errno
		switch opcode {
		case 26: // INIT
			body = make([]byte, 64)
			binary.NativeEndian.PutUint32(body[0:], 7)
			binary.NativeEndian.PutUint32(body[4:], 31)
			binary.NativeEndian.PutUint32(body[20:], 4096) // max_write
		case 1: // LOOKUP
			var found uint64
			switch name := unix.ByteSliceToString(buffer[headerSize:n]); name {
			case FuseFile:
				found = fuseFile
			case FuseStubborn:
				found = fuseStubborn
			case FuseHang:
				continue
			default:
				errno = unix.ENOENT
			}
			if errno == 0 {
				body = make([]byte, 40)
				binary.NativeEndian.PutUint64(body, found)
				binary.NativeEndian.PutUint64(body[16:], 3600)
				body = append(body, fuseAttr(found, unix.S_IFREG|0o666)...)
			}
		case 3: // GETATTR
			if node != fuseRoot {
				continue
			}
			body = append(make([]byte, 16), fuseAttr(node, unix.S_IFDIR|0o777)...)
		case 14, 27: // OPEN, OPENDIR
			body = make([]byte, 16)
		case 18: // RELEASE
		case 25: // FLUSH
			if node == fuseStubborn {
				continue
			}
		default:
			continue
		}
		answer := binary.NativeEndian.AppendUint32(nil, uint32(16+len(body)))
		answer = binary.NativeEndian.AppendUint32(answer, uint32(-int32(errno)))
		answer = binary.NativeEndian.AppendUint64(answer, unique)
		_, _ = unix.Write(fd, append(answer, body...))
	}
}

func fuseAttr(node uint64, mode uint32) []byte {
	attr := make([]byte, 88)
	binary.NativeEndian.PutUint64(attr, node)
	binary.NativeEndian.PutUint32(attr[60:], mode)
	binary.NativeEndian.PutUint32(attr[64:], 1) // nlink
	return attr
}
