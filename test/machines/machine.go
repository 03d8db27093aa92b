// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/test/machines/internal/agent"
)

// closeTime is what a machine has to shut down in before it is killed: on two processors with another one beside it, more than ten
// seconds.
const closeTime = 30 * time.Second

// bootTime is what a machine has to boot in.
const bootTime = 5 * time.Minute

// running counts the machines of this process, for their names.
var running atomic.Int64

// Options says how a machine differs from the common one. The zero value is a machine without the product.
type Options struct {
	// Install puts files into the machine's root before it boots; nil puts nothing. The mounts behind root exist only for
	// the thread that Install is called on and for the programs it starts: it may not touch root from another goroutine.
	Install func(root string) error
	// Kernel is the version of a kernel of Debian's that the machine is to run, see Kernel; "" is the host's kernel.
	Kernel string
}

// Machine is a booted system. Its methods may be used from several goroutines. It is a container, with a mount, process,
// network, IPC and UTS namespace and a control group of its own; the kernel, with its settings, its BPF objects and its log,
// is the host's. Or, with a kernel of its own, it is an emulated machine with one processor, 2 GiB of memory and no network:
// nothing that happens in it reaches the host, and all of it takes ten times as long.
type Machine struct {
	root     *os.File // the common root, held as long as the machine uses it
	name     string
	emulated bool
	leader   int
	init     *os.Process // what leader is the number of
	console  console
	commands commandGroup // that Command's processes belong to
	alive    *os.File     // nothing is written to it: its end tells the machine that this process has ended
	stop     context.CancelFunc
	closed   sync.Once
	ended    chan struct{} // closed when the machine is down and all of it is removed
	err      error         // what the end of the machine met with; read it after ended
}

// Boot starts a machine and returns it when its boot has finished and no unit has failed. Root is made if need be. The
// machine lives until Close, until ctx is cancelled, or until this process ends, however it ends. A caller who wants an
// orderly end on SIGINT makes ctx with signal.NotifyContext and waits for Close.
func Boot(ctx context.Context, options Options) (*Machine, error) {
	m, err := boot(ctx, options)
	if options.Kernel != "" && errors.Is(err, errHangs) && ctx.Err() == nil {
		// One in some 25 emulated machines does, idle and soon after its init has started. The cause isn't known.
		fmt.Fprintln(os.Stderr, "machines: trying once more:", err)
		m, err = boot(ctx, options)
	}
	return m, err
}

var errHangs = errors.New("its boot has not finished")

func boot(ctx context.Context, options Options) (*Machine, error) {
	root, err := openRoot(ctx)
	if err != nil {
		return nil, err
	}
	life, stop := context.WithCancel(ctx)
	m := &Machine{
		root:     root,
		name:     fmt.Sprintf("bpfbroker-%d-%d", os.Getpid(), running.Add(1)),
		emulated: options.Kernel != "",
		commands: commandGroup{path: "/system.slice/machine-command.service"},
		stop:     stop,
		ended:    make(chan struct{}),
	}
	run := m.contain
	if m.emulated {
		run = m.emulate
	}
	ready := make(chan error, 1)
	go func() {
		// Never unlocked: the thread has namespaces of its own and ends with this goroutine. As long as it lives, so does
		// nspawn, or QEMU (Pdeathsig).
		runtime.LockOSThread()
		defer close(m.ended)
		defer root.Close()
		defer stop()
		m.err = run(life, options, ready)
	}()

	booting, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	select {
	case err = <-ready:
	case <-m.ended:
		err = errors.New("it ended before its boot had finished")
	case <-booting.Done():
		err = fmt.Errorf("%w: %w", errHangs, booting.Err())
	}
	if err == nil {
		err = m.settle(booting)
	}
	if err != nil {
		err = errors.Join(ctx.Err(), err, m.Close())
		return nil, fmt.Errorf("cannot boot the test machine: %w\n%s", err, lastLines(m.console.String(), 40))
	}
	return m, nil
}

// contain brings the machine up, sends to ready when its init says that the boot has finished, and returns when nothing of
// the machine is left. It needs a thread of its own.
func (m *Machine) contain(ctx context.Context, options Options, ready chan<- error) error {
	if err := needTools("systemd-nspawn", "nsenter"); err != nil {
		return err
	}
	dir := filepath.Join(filepath.Dir(m.root.Name()), "machine")
	if err := m.mountRoot(dir); err != nil {
		return err
	}
	root := filepath.Join(dir, "root")
	if options.Install != nil {
		if err := options.Install(root); err != nil {
			return fmt.Errorf("cannot install into the test machine: %w", err)
		}
	}

	args := []string{
		"--quiet", "--settings=no", "--directory=" + root, "--machine=" + m.name, "--hostname=machine", "--boot", "--register=no",
		"--notify-ready=yes", "--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--capability=all",
		"--system-call-filter=bpf perf_event_open",
	}
	attributes := &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if !systemdRuns() {
		// Nobody else makes a control group for it.
		args = append(args, "--keep-unit")
		group, err := makeGroup(ctx, filepath.Dir(m.root.Name()), m.name)
		if err != nil {
			return err
		}
		defer group.remove()
		attributes.UseCgroupFD, attributes.CgroupFD = true, int(group.dir.Fd())
	}

	// In a directory that only this machine sees, so that the name can be a short one.
	address := &net.UnixAddr{Name: filepath.Join(nspawnDir, "notify"), Net: "unixgram"}
	notify, err := net.ListenUnixgram("unixgram", address)
	if err != nil {
		return err
	}
	defer notify.Close()

	cmd := exec.CommandContext(ctx, "systemd-nspawn", args...)
	cmd.Env = []string{
		"PATH=" + agent.RootPath, "LANG=C.UTF-8", "NOTIFY_SOCKET=" + address.Name,
		"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=yes", "SYSTEMD_NSPAWN_LOCK=0",
	}
	cmd.Stdout, cmd.Stderr = &m.console, &m.console
	cmd.SysProcAttr = attributes
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = closeTime
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start systemd-nspawn: %w", err)
	}
	listened := make(chan struct{})
	var helpers sync.WaitGroup
	helpers.Go(func() {
		err := m.awaitReady(ctx, notify)
		close(listened)
		if err != nil {
			ready <- err
			return
		}
		// The machine's init tells more as long as it lives, and waits for whoever
		// doesn't listen.
		helpers.Go(func() {
			buffer := make([]byte, 4096)
			for {
				if _, err := notify.Read(buffer); err != nil {
					return // closed, as nspawn has ended
				}
			}
		})
		watcher, err := m.startWatcher(ctx)
		ready <- err
		if err == nil {
			_ = watcher.Wait() // it is killed with the machine
		}
	})
	err = cmd.Wait()
	notify.Close()
	<-listened
	if m.init != nil {
		_ = m.init.Kill() // where nspawn had to be killed, the machine has survived it
	}
	helpers.Wait()
	if m.init != nil {
		_ = m.init.Release()
	}
	if m.alive != nil {
		m.alive.Close()
	}
	if ctx.Err() == nil {
		return errors.Join(errors.New("the test machine has ended by itself"), err)
	}
	if err != nil && !errors.Is(err, ctx.Err()) {
		return fmt.Errorf("cannot shut the test machine down: %w\n%s", err, lastLines(m.console.String(), 20))
	}
	return nil
}

// awaitReady reads what nspawn reports until the machine's init has said that it is up.
func (m *Machine) awaitReady(ctx context.Context, notify *net.UnixConn) error {
	buffer := make([]byte, 4096)
	for {
		n, err := notify.Read(buffer)
		if err != nil {
			return fmt.Errorf("it has not become ready: %w", err) // closed, as nspawn has ended
		}
		for line := range strings.Lines(string(buffer[:n])) {
			key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
			switch {
			case key == "X_NSPAWN_LEADER_PID":
				if m.leader, err = strconv.Atoi(value); err != nil {
					return err
				}
				if m.init, err = os.FindProcess(m.leader); err != nil {
					return fmt.Errorf("cannot find the machine's init: %w", err)
				}
				// An init that is still starting may not hear that it is to stop.
				defer context.AfterFunc(ctx, func() { _ = m.init.Kill() })()
			case key == "READY" && value == "1" && m.leader != 0:
				m.commands, err = m.openGroup(m.commands.path)
				return err
			}
		}
	}
}

// startWatcher starts a program in the machine that stops the machine at once when this process has ended: the kernel then
// kills nspawn (Pdeathsig), but not what nspawn has started.
func (m *Machine) startWatcher(ctx context.Context) (*exec.Cmd, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close()
	watcher := m.Command(context.WithoutCancel(ctx), "root", "sh", "-c", "read -r line; exec systemctl poweroff --force --force")
	watcher.Stdin = read
	watcher.SysProcAttr.Setsid = true
	if err := watcher.Start(); err != nil {
		write.Close()
		return nil, fmt.Errorf("cannot start the machine's watcher: %w", err)
	}
	m.alive = write
	return watcher, nil
}

// settle waits until the machine has nothing more to start, and returns an error with the reasons if a unit has failed.
func (m *Machine) settle(ctx context.Context) error {
	state, err := m.Command(ctx, "root", "systemctl", "is-system-running", "--wait").CombinedOutput()
	if err == nil {
		return nil
	}
	failed, _ := m.Command(ctx, "root", "systemctl", "--failed", "--no-pager").CombinedOutput()
	journal, _ := m.Journal(ctx, "--boot", "--priority=warning")
	return fmt.Errorf("its state is %q (%w)\n%s\n%s", strings.TrimSpace(string(state)), err, failed, lastLines(journal, 40))
}

// RootPID returns the process ID, on the host, of the machine's init, or of QEMU if it is emulated.
func (m *Machine) RootPID() int { return m.leader }

// Close shuts the machine down, within half a minute or by killing it, or switches it off if it is emulated, and removes all of it. It is to be called for a machine
// that has ended by itself, too; calling it again does nothing. No command may be on its way to be started meanwhile.
func (m *Machine) Close() error {
	m.stop()
	<-m.ended
	m.closed.Do(func() {
		m.commands.close()
	})
	return m.err
}

// inside returns the host's name of a path in the machine. Links with absolute targets lead out of the machine: use it for
// paths that have none.
func (m *Machine) inside(path string) string {
	return filepath.Join("/proc", strconv.Itoa(m.leader), "root", path)
}

// nspawnDir is where nspawn keeps run-time files. Each machine has its own there.
const nspawnDir = "/run/systemd/nspawn"

// mountRoot gives the calling thread a mount and a network namespace and mounts the machine's writable root at dir/root.
// No other process sees the mounts, and they end with the last process of the machine.
func (m *Machine) mountRoot(dir string) error {
	if err := os.MkdirAll(nspawnDir, 0o755); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("cannot make namespaces: %w", err)
	}
	for _, mount := range []struct {
		kind, target string
		flags        uintptr
		data         string
	}{
		{"", "/", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"tmpfs", nspawnDir, 0, "mode=0755"},
		{"tmpfs", dir, 0, "mode=0755"},
		{"overlay", filepath.Join(dir, "root"), 0,
			"lowerdir=" + m.root.Name() + ",upperdir=" + filepath.Join(dir, "upper") + ",workdir=" + filepath.Join(dir, "work")},
	} {
		if mount.kind == "overlay" {
			for _, name := range []string{"root", "upper", "work"} {
				if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
					return err
				}
			}
		}
		if err := unix.Mount(mount.kind, mount.target, mount.kind, mount.flags, mount.data); err != nil {
			return fmt.Errorf("cannot mount %s at %s: %w", mount.kind, mount.target, err)
		}
	}
	if systemdRuns() {
		return nil
	}
	// nspawn and the machine are to see one hierarchy, even where the host has the ones of cgroup v1 too.
	return mountGroups()
}
