// SPDX-License-Identifier: Apache-2.0

package testtarget

import (
	"encoding/json"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// ops are what every process can be told to do.
var ops = map[string]Op{
	// start ATTR: answers with the pid, a socket and a pidfd.
	"start": func(args []string, _ []*os.File) (string, []*os.File, error) {
		var a Attr
		if err := json.Unmarshal([]byte(args[0]), &a); err != nil {
			return "", nil, err
		}
		cmd, socket, pidfd, err := start(a)
		if err != nil {
			return "", nil, err
		}
		go func() { _ = cmd.Wait() }()
		return strconv.Itoa(cmd.Process.Pid), []*os.File{socket, pidfd}, nil
	},
	// tmpfs DIR
	"tmpfs": simple(func(args []string) error { return unix.Mount("tmpfs", args[0], "tmpfs", 0, "mode=0755") }),
	// bind FROM TO
	"bind": simple(func(args []string) error { return unix.Mount(args[0], args[1], "", unix.MS_BIND, "") }),
	// umount DIR
	"umount": simple(func(args []string) error { return unix.Unmount(args[0], unix.MNT_DETACH) }),
	// mkdir DIR [MODE]
	"mkdir": simple(func(args []string) error {
		mode := uint64(0o755)
		if len(args) > 1 {
			var err error
			if mode, err = strconv.ParseUint(args[1], 8, 32); err != nil {
				return err
			}
		}
		return unix.Mkdir(args[0], uint32(mode))
	}),
	// symlink TO NAME
	"symlink": simple(func(args []string) error { return unix.Symlink(args[0], args[1]) }),
	// write FILE
	"write": simple(func(args []string) error { return os.WriteFile(args[0], nil, 0o644) }),
	// unshare FLAGS, of the main thread
	"unshare": simple(func(args []string) error {
		flags, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		return unix.Unshare(flags)
	}),
	// fuse DIR, with a node of the device
	"fuse": fuse,
	// open FILE: answers with it, open for reading.
	"open": func(args []string, _ []*os.File) (string, []*os.File, error) {
		fd, err := unix.Open(args[0], unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", nil, err
		}
		return "", []*os.File{os.NewFile(uintptr(fd), args[0])}, nil
	},
	// setns FILE, of the main thread
	"setns": simple(func(args []string) error {
		fd, err := unix.Open(args[0], unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Setns(fd, 0)
	}),
	// connect PATH: answers with a connected stream socket.
	"connect": func(args []string, _ []*os.File) (string, []*os.File, error) {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return "", nil, err
		}
		socket := os.NewFile(uintptr(fd), "socket")
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: args[0]}); err != nil {
			_ = socket.Close()
			return "", nil, err
		}
		return "", []*os.File{socket}, nil
	},
}

func simple(do func(args []string) error) Op {
	return func(args []string, _ []*os.File) (string, []*os.File, error) { return "", nil, do(args) }
}
