// SPDX-License-Identifier: Apache-2.0

// Command ebpf-example is an ordinary program built on cilium/ebpf that knows
// nothing of bpfbroker: it creates a map, loads a socket filter that counts in
// it, and sends one packet to a socket of its own. "ebpf-example kprobe" loads a kprobe
// program instead.
package main

import (
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

func main() {
	do := countPackets
	if len(os.Args) > 1 && os.Args[1] == "kprobe" {
		do = loadKprobe
	}
	if err := do(); err != nil {
		fmt.Fprintln(os.Stderr, "ebpf-example:", err)
		os.Exit(1)
	}
}

func countPackets() error {
	packets, err := ebpf.NewMap(&ebpf.MapSpec{Name: "packets", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		return err
	}
	defer packets.Close()
	count, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "count",
		Type: ebpf.SocketFilter,
		Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.LoadMapPtr(asm.R1, packets.FD()),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.Mov.Imm(asm.R1, 1),
			asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0),
			asm.Mov.Imm(asm.R0, 0xffff).WithSymbol("out"), // so much of it passes
			asm.Return(),
		},
	})
	if err != nil {
		return err
	}
	defer count.Close()
	sockets, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(sockets[0], unix.SOL_SOCKET, unix.SO_ATTACH_BPF, count.FD()); err != nil {
		return fmt.Errorf("cannot attach it: %w", err)
	}
	if _, err := unix.Write(sockets[1], []byte("packet")); err != nil {
		return err
	}
	var seen uint64
	if err := packets.Lookup(uint32(0), &seen); err != nil {
		return err
	}
	fmt.Printf("loaded a socket filter; it saw %d packet\n", seen)
	return nil
}

func loadKprobe() error {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.Kprobe,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		License:      "GPL",
	})
	if err != nil {
		return err
	}
	return program.Close()
}
