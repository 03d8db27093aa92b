// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/test/machines/internal/agent"
)

// commandName is what a process is called that stands for a command of an emulated machine.
const commandName = "machine-command"

// This program plays that part, too.
func init() {
	if os.Args[0] == commandName {
		agent.Run(os.Args[1:])
	}
}

// guestModules are the kernel modules that a machine has: for its disks and its root, and what network namespaces are
// tested with. It loads no other.
var guestModules = []string{"virtio_blk", "overlay", "veth"}

// maskedUnits have nothing to do in a machine, or make a container what this is.
var maskedUnits = []string{
	"getty@tty1.service", "machine-mounts.service", "modprobe@configfs.service", "modprobe@drm.service", "modprobe@efi_pstore.service",
	"netavark-dhcp-proxy.socket", "netavark-dhcp-proxy.service",
}

// agentUnit is the agent's, whose commands are in a group of their own.
const agentUnit = `[Unit]
Description=Agent for commands from outside
After=machine-command.service

[Service]
Type=exec
ExecStart=/usr/local/libexec/machine-guest
TasksMax=infinity
OOMScoreAdjust=-1000
IgnoreSIGPIPE=no
`

// logindUnit has logind not know of the virtual terminals, one of which would have to be each session's: the seat is as in
// the other machines.
const logindUnit = `[Service]
TemporaryFileSystem=/sys/devices/virtual/tty
`

// emulate is contain for an emulated machine.
func (m *Machine) emulate(ctx context.Context, options Options, ready chan<- error) error {
	if err := needTools("qemu-system-x86_64", "mke2fs", "xz"); err != nil {
		return err
	}
	kernel, err := Kernel(ctx, options.Kernel)
	if err != nil {
		return err
	}
	image, err := openImage(ctx, m.root)
	if err != nil {
		return err
	}
	defer image.Close()
	// Before this thread has a network namespace of its own.
	listener, err := net.Listen("unix", m.socket())
	if err != nil {
		return err
	}
	defer listener.Close()

	dir := filepath.Join(filepath.Dir(m.root.Name()), "machine")
	if err := m.mountRoot(dir); err != nil {
		return err
	}
	guest, err := buildGuest(ctx, dir)
	if err != nil {
		return err
	}
	root := filepath.Join(dir, "root")
	if options.Install != nil {
		if err := options.Install(root); err != nil {
			return fmt.Errorf("cannot install into the test machine: %w", err)
		}
	}
	if err := installGuest(root, guest); err != nil {
		return fmt.Errorf("cannot install the agent: %w", err)
	}
	installed := filepath.Join(dir, "installed")
	if err := makeImage(ctx, installed, filepath.Join(dir, "upper")); err != nil {
		return err
	}
	initramfs, err := makeGuestInitramfs(ctx, kernel, guest)
	if err != nil {
		return fmt.Errorf("cannot make the machine's initramfs: %w", err)
	}
	defer initramfs.Close()
	port, theirs, err := connection()
	if err != nil {
		return err
	}
	defer port.Close()

	// See RunInKernel for the processor and its memory.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none",
		"-accel", "tcg", "-cpu", "max,-cx16", "-smp", "1", "-m", "2048",
		"-kernel", kernel.Path, "-initrd", "/dev/fd/3",
		"-append", "console=ttyS0 quiet panic=-1 oops=panic slab_debug=F,kmalloc-* systemd.getty_auto=no systemd.mask="+strings.Join(maskedUnits, " systemd.mask="),
		"-serial", "file:/dev/stdout",
		"-drive", "if=virtio,format=raw,readonly=on,file=/dev/fd/4",
		"-drive", "if=virtio,format=raw,readonly=on,file="+installed,
		"-chardev", "socket,id=agent,fd=5", "-device", "virtio-serial-pci",
		"-device", "virtserialport,chardev=agent,name="+agent.PortName)
	cmd.Stdout, cmd.Stderr = &m.console, &m.console
	cmd.ExtraFiles = []*os.File{initramfs, image, theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return fmt.Errorf("cannot start QEMU: %w", err)
	}
	m.leader = cmd.Process.Pid
	proxy := agent.NewProxy(port)
	var helpers sync.WaitGroup
	helpers.Go(func() { _ = agent.Serve(listener, proxy) }) // until the listener is closed
	helpers.Go(func() { ready <- proxy.AwaitReady(ctx) })
	// Nothing of it is kept, so it needn't shut down.
	err = cmd.Wait()
	port.Close()
	listener.Close()
	helpers.Wait()
	if ctx.Err() == nil || cmd.ProcessState.Exited() { // and wasn't killed: whoever closes it may have come meanwhile
		return errors.Join(fmt.Errorf("the test machine has ended by itself; its console says:\n%s", lastLines(m.console.String(), 60)), err)
	}
	return nil
}

// socket is the address, which is in no directory, at which an emulated machine's commands find it.
func (m *Machine) socket() string { return "@" + m.name }

// emulatedCommand returns the process that stands for a command of an emulated machine.
func (m *Machine) emulatedCommand(ctx context.Context, command agent.Command) *exec.Cmd {
	args, err := agent.Args(m.socket(), command)
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = append([]string{commandName}, args...)
	cmd.Env = []string{} // not this process's
	cmd.Err = err
	return cmd
}

// connection returns both ends of a connection, one for a child process.
func connection() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "port"), os.NewFile(uintptr(fds[1]), "port")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn, theirs, nil
}

// openImage opens a file with a file system that has what the common root has, beside it in the cache, made if need be.
func openImage(ctx context.Context, root *os.File) (*os.File, error) {
	cache := filepath.Dir(root.Name())
	lock, err := lockFile(ctx, filepath.Join(cache, "lock"))
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	path := imagePath(root.Name())
	if image, err := os.Open(path); err == nil || !errors.Is(err, os.ErrNotExist) {
		return image, err
	}
	building := filepath.Join(cache, "building-image")
	defer os.Remove(building)
	if err := makeImage(ctx, building, root.Name()); err != nil {
		return nil, err
	}
	if err := os.Rename(building, path); err != nil {
		return nil, err
	}
	return os.Open(path)
}

// imagePath returns where the file system of a root is kept.
func imagePath(root string) string {
	return filepath.Join(filepath.Dir(root), strings.Replace(filepath.Base(root), "root-", "image-", 1))
}

// makeImage makes a file with a file system of what is in dir, for reading only.
func makeImage(ctx context.Context, path, dir string) error {
	cmd := exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", dir, path, "4G")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about the thread
	defer runtime.UnlockOSThread()
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot make a file system of %s: %w\n%s", dir, err, output)
	}
	return nil
}

// buildGuest compiles the machine's first program and agent into dir.
func buildGuest(ctx context.Context, dir string) (string, error) {
	path := filepath.Join(dir, "guest")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "./test/machines/guest")
	cmd.Dir = checkout()
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot compile the agent: %w\n%s", err, output)
	}
	return path, nil
}

// installGuest puts the agent into the machine's root.
func installGuest(root, guest string) error {
	program, err := os.ReadFile(guest)
	if err != nil {
		return err
	}
	for _, file := range []struct {
		path string
		mode os.FileMode
		data []byte
	}{
		{"usr/local/libexec/machine-guest", 0o755, program},
		{"etc/systemd/system/machine-agent.service", 0o644, []byte(agentUnit)},
		{"etc/systemd/system/systemd-logind.service.d/machine.conf", 0o644, []byte(logindUnit)},
		// The first boot would take ten seconds more.
		{"etc/.updated", 0o644, nil},
		{"var/.updated", 0o644, nil},
	} {
		path := filepath.Join(root, file.path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, file.data, file.mode)); err != nil {
			return err
		}
	}
	return os.Symlink("../machine-agent.service", filepath.Join(root, "etc/systemd/system/multi-user.target.wants/machine-agent.service"))
}

// makeGuestInitramfs returns the file system that a machine starts with, in memory. The caller closes it.
func makeGuestInitramfs(ctx context.Context, kernel *Image, guest string) (*os.File, error) {
	return inMemory(func(w io.Writer) error {
		a := newArchive(w)
		for _, dir := range []string{"/dev", "/root"} {
			a.mkdir(dir)
		}
		a.copy("/init", guest)
		for i, name := range guestModules {
			module, err := kernel.module(ctx, name)
			if err != nil {
				return err
			}
			a.write("/modules/"+strconv.Itoa(i), 0o644, module)
		}
		return a.close()
	})
}

// module returns one of the kernel's modules as the kernel takes it.
func (i *Image) module(ctx context.Context, name string) ([]byte, error) {
	var path string
	err := filepath.WalkDir(i.Modules, func(p string, _ os.DirEntry, err error) error {
		if strings.HasPrefix(filepath.Base(p), name+".ko") {
			path = p
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if path == "" {
		return nil, fmt.Errorf("cannot find the module %s", name)
	}
	var errors bytes.Buffer
	xz := exec.CommandContext(ctx, "xz", "--decompress", "--stdout", "--", path)
	xz.Stderr = &errors
	module, err := xz.Output()
	if err != nil {
		return nil, fmt.Errorf("cannot unpack %s: %w: %s", path, err, errors.Bytes())
	}
	return module, nil
}
