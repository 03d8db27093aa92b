// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/test/machines/internal/agent"
)

const (
	// guestTime is what a guest has if nobody says how long it may take. It boots in 4 to 6 seconds.
	guestTime = 120 * time.Second
	// guestOutput is how many bytes a guest may write. The port takes about half a MiB a second.
	guestOutput = 4 << 20
)

// RunInKernel boots a kernel in an emulated machine with one processor, 1 GiB of memory and no network, and runs a command
// there, as root. The machine has busybox's programs, the given files (by their paths in the guest; the permissions are the
// host files'), the file systems of a real system but for a bpffs, and loads no module. The command's standard input is
// empty; what it writes to standard output and error is returned, also with an error, as far as it got. The exit code is a
// shell's: 127 if there is no such program, 128 and the signal if it was killed. A kernel that oopses is an error. The
// machine has until ctx's deadline, or two minutes; nothing of it is left when RunInKernel returns.
func RunInKernel(ctx context.Context, image *Image, files map[string]string, argv, env []string) (output []byte, exitCode int, err error) {
	// With CMPXCHG16B (cx16), one boot of Linux 6.12 in ten crashed in Debian 12's QEMU, with nonsense in the processor's flags;
	// without, none in 80 did. Without it, newer kernels have memory for BPF's local storage only where they debug it (mm/slub.c).
	return runInKernel(ctx, image, files, argv, env, "slab_debug=F,kmalloc-*", "-cpu", "max,-cx16")
}

// CountInKernel is RunInKernel with a machine whose clock counts instructions: each takes a nanosecond there, whatever else
// the host does, and time in which the machine has nothing to do passes at once. Its kernel doesn't debug itself, which would
// make some of what it does ten times slower; so one run in ten may crash, with an error.
func CountInKernel(ctx context.Context, image *Image, files map[string]string, argv, env []string) (output []byte, exitCode int, err error) {
	return runInKernel(ctx, image, files, argv, env, "", "-cpu", "max", "-icount", "shift=0,sleep=off")
}

// runInKernel is RunInKernel with parameters of the kernel's and arguments of QEMU's.
func runInKernel(ctx context.Context, image *Image, files map[string]string, argv, env []string, parameters string, machine ...string) (output []byte, exitCode int, err error) {
	if err := needTools("qemu-system-x86_64"); err != nil {
		return nil, 0, err
	}
	if _, ok := ctx.Deadline(); !ok {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, guestTime)
		defer stop()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Nothing that the command prints looks like this.
	end := "\n" + rand.Text() + " "
	initramfs, err := makeInitramfs(image, files, guestInit(argv, env, end))
	if err != nil {
		return nil, 0, fmt.Errorf("cannot make the guest's initramfs: %w", err)
	}
	defer initramfs.Close()

	// Two processors crashed.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append(machine,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none",
		"-accel", "tcg", "-smp", "1", "-m", "1024",
		"-kernel", image.Path, "-initrd", "/dev/fd/3",
		"-append", "console=ttyS0 quiet panic=-1 oops=panic "+parameters,
		// The second port is the command's alone.
		"-serial", "file:/dev/stderr", "-serial", "file:/dev/stdout")...)
	var console console
	printed := guestPort{overflow: func() { cancel(errors.New("it writes too much")) }}
	cmd.Stdout, cmd.Stderr = &printed, &console
	cmd.ExtraFiles = []*os.File{initramfs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about the thread
	defer runtime.UnlockOSThread()
	err = cmd.Run()
	if ctx.Err() != nil {
		err = context.Cause(ctx) // rather than how QEMU ended of it
	}
	output, code, ended := bytes.Cut(printed.data, []byte(end))
	switch {
	case err == nil && ended:
		exitCode, err = strconv.Atoi(strings.TrimSpace(string(code)))
	case err == nil:
		err = errors.New("the machine stopped before the command had ended")
	}
	if err != nil {
		err = fmt.Errorf("cannot run %s in Linux %s: %w; its console says:\n%s", argv[0], image.Release, err, lastLines(console.String(), 60))
	}
	return output, exitCode, err
}

// guestPort keeps what a guest writes, up to a bound, and calls overflow when there is more.
type guestPort struct {
	data     []byte
	overflow func()
}

func (p *guestPort) Write(data []byte) (int, error) {
	keep := min(len(data), guestOutput-len(p.data))
	p.data = append(p.data, data[:keep]...)
	if keep < len(data) {
		p.overflow()
	}
	return len(data), nil
}

// guestInit returns the script that is the init of a guest. It writes end and the exit code when the command has ended.
func guestInit(argv, env []string, end string) string {
	command := append([]string{"env", "-i", "PATH=" + agent.RootPath, "HOME=/root"}, env...)
	command = append(command, argv...)
	for i, word := range command {
		command[i] = quote(word)
	}
	// Changing a terminal's modes waits until all that was written to it is out, which switching off doesn't.
	return fmt.Sprintf(`#!/bin/busybox sh
set -e
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /tmp
mount -t tmpfs -o mode=0755 tmpfs /run
exec 3<>/dev/ttyS1
stty raw <&3
code=0
(exec %[1]s </dev/null >&3 2>&1 3>&-) || code=$?
printf '%%s%%s\n' %[2]s $code >&3
stty raw <&3
poweroff -f
`, strings.Join(command, " "), quote(end))
}

// quote returns a word for the shell.
func quote(word string) string { return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'" }

// makeInitramfs returns a file system for a guest, in memory. The caller closes it.
func makeInitramfs(image *Image, files map[string]string, init string) (*os.File, error) {
	return inMemory(func(w io.Writer) error {
		a := newArchive(w)
		for _, dir := range []string{"/dev", "/etc", "/mnt", "/proc", "/root", "/run", "/sys", "/tmp"} {
			a.mkdir(dir)
		}
		a.write("/init", 0o755, []byte(init))
		a.write("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/:/bin/sh\nbob:x:1001:1001::/:/bin/sh\n"))
		a.write("/etc/group", 0o644, []byte("root:x:0:\nalice:x:1000:\nbob:x:1001:\n"))
		a.copy("/bin/busybox", image.busybox)
		for path, from := range files {
			a.copy(path, from)
		}
		return a.close()
	})
}

// inMemory returns a file that is in no directory, with what write writes. The caller closes it.
func inMemory(write func(io.Writer) error) (*os.File, error) {
	fd, err := unix.MemfdCreate("initramfs", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "initramfs")
	if err := write(file); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}
