// SPDX-License-Identifier: Apache-2.0

// Command guest is the first program of an emulated machine, which puts its root together, and later its agent.
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/test/machines/internal/agent"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest:", serve())
		os.Exit(1)
	}
	fmt.Fprintln(os.Stderr, "guest:", boot())
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// boot mounts the root and goes on as its init.
func boot() error {
	if err := unix.Mount("devtmpfs", "/dev", "devtmpfs", 0, ""); err != nil {
		return err
	}
	// The kernel found no console for it before.
	console, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for fd := range 3 {
		if err := unix.Dup2(int(console.Fd()), fd); err != nil {
			return err
		}
	}
	modules, err := filepath.Glob("/modules/*") // in order
	if err != nil {
		return err
	}
	for _, module := range modules {
		if err := load(module); err != nil {
			return fmt.Errorf("cannot load %s: %w", module, err)
		}
	}
	// Like the other machines' root: what is common to all, what was installed into this one, and what it writes.
	for _, mount := range []struct{ kind, source, target, data string }{
		{"ext4", "/dev/vda", "/base", ""},
		{"ext4", "/dev/vdb", "/installed", ""},
		{"tmpfs", "tmpfs", "/written", "mode=0755"},
		{"overlay", "overlay", "/root", "lowerdir=/installed:/base,upperdir=/written/upper,workdir=/written/work"},
	} {
		if err := os.MkdirAll(mount.target, 0o755); err != nil {
			return err
		}
		if mount.kind == "overlay" {
			if err := errors.Join(os.Mkdir("/written/upper", 0o755), os.Mkdir("/written/work", 0o755)); err != nil {
				return err
			}
		}
		var flags uintptr
		if mount.kind == "ext4" {
			flags = unix.MS_RDONLY
		}
		if err := unix.Mount(mount.source, mount.target, mount.kind, flags, mount.data); err != nil {
			return fmt.Errorf("cannot mount %s: %w", mount.target, err)
		}
	}
	if err := unix.Mount("/dev", "/root/dev", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot move /dev: %w", err)
	}
	if err := unix.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot make the root the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Exec("/sbin/init", []string{"/sbin/init"}, []string{"PATH=" + agent.RootPath})
}

// load loads a kernel module.
func load(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.FinitModule(int(file.Fd()), "", 0)
}

// serve is the agent.
func serve() error {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return err
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(data)) != agent.PortName {
			continue
		}
		file, err := os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(name))), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return agent.Serve(&portListener{port: &port{file}}, agent.Handler())
	}
	return errors.New("cannot find the agent's port")
}

// port is a connection out of a device.
type port struct{ *os.File }

func (p *port) LocalAddr() net.Addr  { return &net.UnixAddr{Name: p.Name()} }
func (p *port) RemoteAddr() net.Addr { return &net.UnixAddr{Name: p.Name()} }

// portListener accepts one connection, and waits for a second for good.
type portListener struct {
	port *port
	done bool
}

func (l *portListener) Accept() (net.Conn, error) {
	if l.done {
		for {
			time.Sleep(time.Hour)
		}
	}
	l.done = true
	return l.port, nil
}

func (l *portListener) Close() error   { return nil }
func (l *portListener) Addr() net.Addr { return l.port.LocalAddr() }
