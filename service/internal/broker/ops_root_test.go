// SPDX-License-Identifier: Apache-2.0

//go:build root

package broker

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// kept is what a target holds until it ends.
var kept []any

// ops are what targets do with a grant: the library finds its token.
var ops = map[string]testtarget.Op{
	// reopen FLAGS PATH, with a map: pins it there, opens the pin and removes it.
	"reopen": func(args []string, files []*os.File) (string, []*os.File, error) {
		flags, err := strconv.ParseUint(args[0], 10, 32)
		if err != nil {
			return "", nil, err
		}
		if err := kernel.Pin(args[1], int(files[0].Fd())); err != nil {
			return "", nil, err
		}
		again, err := kernel.OpenPinned(args[1], uint32(flags))
		if err == nil {
			err = again.Close()
		}
		return "", nil, errors.Join(err, os.Remove(args[1]))
	},
	// map: makes one and keeps it.
	"map": func([]string, []*os.File) (string, []*os.File, error) {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		kept = append(kept, m)
		return "", nil, err
	},
	// give: answers with a map that it doesn't keep.
	"give": func([]string, []*os.File) (string, []*os.File, error) {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		if err != nil {
			return "", nil, err
		}
		fd, err := unix.FcntlInt(uintptr(m.FD()), unix.F_DUPFD_CLOEXEC, 3)
		_ = m.Close()
		return "", []*os.File{os.NewFile(uintptr(fd), "map")}, err
	},
	// xdp INTERFACE, cgroup PATH, without PATH (no link), raw NAME: attaches a
	// program and keeps the link.
	"xdp": attaching(ebpf.XDP, ebpf.AttachXDP, func(p *ebpf.Program, to string) (any, error) {
		index, err := strconv.Atoi(to)
		if err != nil {
			return nil, err
		}
		return link.AttachXDP(link.XDPOptions{Program: p, Interface: index})
	}),
	"cgroup": attaching(ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress, func(p *ebpf.Program, to string) (any, error) {
		dir, err := os.Open(to)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		return link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: p, Attach: ebpf.AttachCGroupInetEgress})
	}),
	"without": attaching(ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress, func(p *ebpf.Program, to string) (any, error) {
		dir, err := os.Open(to)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		return nil, link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: ebpf.AttachCGroupInetEgress, Flags: unix.BPF_F_ALLOW_MULTI})
	}),
	"raw": attaching(ebpf.RawTracepoint, ebpf.AttachNone, func(p *ebpf.Program, to string) (any, error) {
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: to, Program: p})
	}),
	// pin PATH: pins the last link. drop: closes all that is kept.
	"pin": func(args []string, _ []*os.File) (string, []*os.File, error) {
		return "", nil, kept[len(kept)-1].(link.Link).Pin(args[0])
	},
	// keep DIR: keeps it open, and answers with a path to it that stays.
	"keep": func(args []string, _ []*os.File) (string, []*os.File, error) {
		f, err := os.Open(args[0])
		if err != nil {
			return "", nil, err
		}
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		return fmt.Sprintf("/proc/self/fd/%d", fd), nil, errors.Join(err, f.Close())
	},
	// entries DIR: answers with their names.
	"entries": func(args []string, _ []*os.File) (string, []*os.File, error) {
		entries, err := os.ReadDir(args[0])
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return strings.Join(names, " "), nil, err
	},
	"drop": func([]string, []*os.File) (string, []*os.File, error) {
		for _, k := range kept {
			if c, ok := k.(interface{ Close() error }); ok {
				_ = c.Close()
			} else {
				k.(interface{ Close() }).Close()
			}
		}
		kept = nil
		return "", nil, nil
	},
	// shell SCRIPT: runs it in the background. answers with its pid.
	"shell": func(args []string, _ []*os.File) (string, []*os.File, error) {
		cmd := exec.Command("sh", "-c", args[0])
		if err := cmd.Start(); err != nil {
			return "", nil, err
		}
		go func() { _ = cmd.Wait() }()
		return strconv.Itoa(cmd.Process.Pid), nil, nil
	},
	// stop PID: stops it.
	"stop": func(args []string, _ []*os.File) (string, []*os.File, error) {
		pid, err := strconv.Atoi(args[0])
		if err != nil {
			return "", nil, err
		}
		return "", nil, unix.Kill(pid, unix.SIGSTOP)
	},
	// trace: starts a process that is stopped, also at its exit. The tracer is the
	// main thread, which stays.
	"trace": func([]string, []*os.File) (string, []*os.File, error) {
		cmd := exec.Command("sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
		if err := cmd.Start(); err != nil {
			return "", nil, err
		}
		if _, err := unix.Wait4(cmd.Process.Pid, nil, unix.WALL, nil); err != nil {
			return "", nil, err
		}
		return "", nil, unix.PtraceSetOptions(cmd.Process.Pid, unix.PTRACE_O_TRACEEXIT)
	},
	// headless: the main thread exits, others stay. There is no answer.
	"headless": func([]string, []*os.File) (string, []*os.File, error) {
		go func() {
			for {
				time.Sleep(time.Second)
			}
		}()
		runtime.LockOSThread()
		unix.Syscall(unix.SYS_EXIT, 0, 0, 0)
		return "", nil, errors.New("it is still there")
	},
}

func attaching(kind ebpf.ProgramType, attach ebpf.AttachType, do func(*ebpf.Program, string) (any, error)) testtarget.Op {
	return func(args []string, _ []*os.File) (string, []*os.File, error) {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: kind, AttachType: attach, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		if err != nil {
			return "", nil, fmt.Errorf("cannot load: %w", err)
		}
		l, err := do(p, args[0])
		if err != nil {
			p.Close()
			return "", nil, fmt.Errorf("cannot attach: %w", err)
		}
		kept = append(kept, p)
		if l != nil {
			kept = append(kept, l)
		}
		return "", nil, nil
	}
}
