// SPDX-License-Identifier: Apache-2.0

// Command reach does with BPF what a grant may let it do or not. It knows nothing
// of bpfbroker. What it makes ends with it.
//
//	reach xdp DEVICE          attach a program to a network device
//	reach tcx DEVICE          attach another, on the way in
//	reach cgroup DIRECTORY    attach a program to a control group
//	reach tracepoint NAME     attach a program to a raw tracepoint
//	reach helper NAME         load a program that calls a helper without arguments
//	reach kernel              load a program that reads the kernel's memory
//	reach samples             attach a program to a clock of one's own
//	reach denied N            load a program that calls a helper N times, print how
//	                          often that was refused
//	reach maps N              make N arrays of 4 KiB, print how many there could be
//	reach programs N          load N programs, print how many there could be
//	reach hold                load a program again and again, until standard input
//	                          ends; print "yes" or "no" when that changes
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "reach:", err)
		os.Exit(1)
	}
}

func run(verb string, args []string) error {
	switch {
	case len(args) == 1 && (verb == "xdp" || verb == "tcx"):
		return device(verb, args[0])
	case len(args) == 1 && verb == "cgroup":
		p, err := program(ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress)
		if err != nil {
			return err
		}
		return attached(link.AttachCgroup(link.CgroupOptions{Path: args[0], Attach: ebpf.AttachCGroupInetEgress, Program: p}))
	case len(args) == 1 && verb == "tracepoint":
		p, err := program(ebpf.RawTracepoint, ebpf.AttachNone)
		if err != nil {
			return err
		}
		return attached(link.AttachRawTracepoint(link.RawTracepointOptions{Name: args[0], Program: p}))
	case len(args) == 1 && verb == "helper":
		helper := map[string]asm.BuiltinFunc{"ktime_get_ns": asm.FnKtimeGetNs, "get_prandom_u32": asm.FnGetPrandomU32}[args[0]]
		_, err := program(ebpf.SocketFilter, ebpf.AttachNone, helper.Call())
		return err
	case len(args) == 0 && verb == "kernel":
		_, err := program(ebpf.SocketFilter, ebpf.AttachNone,
			asm.Mov.Reg(asm.R1, asm.RFP),
			asm.Add.Imm(asm.R1, -8),
			asm.Mov.Imm(asm.R2, 8),
			asm.Mov.Imm(asm.R3, 0),
			asm.FnProbeReadKernel.Call())
		return err
	case len(args) == 0 && verb == "samples":
		return samples()
	case len(args) == 1 && verb == "denied":
		return denied(args[0])
	case len(args) == 1 && (verb == "maps" || verb == "programs"):
		return many(verb, args[0])
	case len(args) == 0 && verb == "hold":
		hold()
		return nil
	}
	return fmt.Errorf("cannot do %s %q", verb, args)
}

// program loads a program that begins with instructions and returns 1.
func program(kind ebpf.ProgramType, attach ebpf.AttachType, instructions ...asm.Instruction) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "reach", Type: kind, AttachType: attach, License: "GPL",
		Instructions: append(instructions, asm.Mov.Imm(asm.R0, 1), asm.Return()),
	})
}

func device(verb, name string) error {
	device, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	if verb == "xdp" {
		p, err := program(ebpf.XDP, ebpf.AttachNone)
		if err != nil {
			return err
		}
		return attached(link.AttachXDP(link.XDPOptions{Program: p, Interface: device.Index}))
	}
	p, err := program(ebpf.SchedCLS, ebpf.AttachNone)
	if err != nil {
		return err
	}
	return attached(link.AttachTCX(link.TCXOptions{Program: p, Interface: device.Index, Attach: ebpf.AttachTCXIngress}))
}

func attached(l link.Link, err error) error {
	if err != nil {
		return fmt.Errorf("cannot attach it: %w", err)
	}
	fmt.Println("attached")
	return l.Close()
}

// samples attaches a program to samples of this process's own time.
func samples() error {
	p, err := program(ebpf.PerfEvent, ebpf.AttachNone)
	if err != nil {
		return err
	}
	event, err := unix.PerfEventOpen(&unix.PerfEventAttr{
		Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_TASK_CLOCK, Size: unix.PERF_ATTR_SIZE_VER0,
		Sample: 1_000_000, Bits: unix.PerfBitExcludeKernel | unix.PerfBitExcludeHv,
	}, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot open a perf event: %w", err)
	}
	if err := unix.IoctlSetInt(event, unix.PERF_EVENT_IOC_SET_BPF, p.FD()); err != nil {
		return fmt.Errorf("cannot attach it: %w", err)
	}
	fmt.Println("attached")
	return nil
}

func denied(number string) error {
	n, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	refused := 0
	for range n {
		// Without a log it isn't tried twice.
		p, err := ebpf.NewProgramWithOptions(&ebpf.ProgramSpec{
			Type: ebpf.SocketFilter, License: "GPL", Instructions: asm.Instructions{asm.FnKtimeGetNs.Call(), asm.Return()},
		}, ebpf.ProgramOptions{LogDisabled: true})
		if err != nil {
			refused++
			continue
		}
		_ = p.Close()
	}
	fmt.Println(refused)
	return nil
}

func many(verb, number string) error {
	n, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	var kept []io.Closer
	for range n {
		var one io.Closer
		if verb == "maps" {
			one, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4096, MaxEntries: 1})
		} else {
			one, err = program(ebpf.SocketFilter, ebpf.AttachNone)
		}
		if err != nil {
			break
		}
		kept = append(kept, one)
	}
	fmt.Println(len(kept))
	for _, one := range kept {
		_ = one.Close()
	}
	return nil
}

func hold() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	said := ""
	for ; ; time.Sleep(50 * time.Millisecond) {
		now := "yes"
		p, err := program(ebpf.SocketFilter, ebpf.AttachNone)
		if err == nil {
			_ = p.Close()
		} else {
			now = "no"
		}
		if now != said {
			fmt.Println(now)
			said = now
		}
	}
}
