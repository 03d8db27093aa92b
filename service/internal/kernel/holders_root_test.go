// SPDX-License-Identifier: Apache-2.0

//go:build root

package kernel

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func TestHolders(t *testing.T) {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.RawTracepoint, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sys_enter", Program: program})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		t.Fatal(err)
	}
	hold := func(fd int, as *syscall.SysProcAttr) *exec.Cmd {
		t.Helper()
		fd, err := unix.Dup(fd)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "object")
		defer f.Close()
		cmd := exec.Command("sleep", "1000")
		cmd.ExtraFiles = []*os.File{f}
		cmd.SysProcAttr = as
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		return cmd
	}
	own := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: testtarget.Alice, Gid: testtarget.Alice}}
	inside := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, Credential: &syscall.Credential{NoSetGroups: true},
		UidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 1}}, GidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 1}},
	}
	linked, loaded, stranger := hold(linkFD(t, l), own), hold(program.FD(), own), hold(int(os.Stdin.Fd()), own)
	service, container := hold(linkFD(t, l), nil), hold(linkFD(t, l), inside)
	for what, test := range map[string]struct {
		id   uint32
		want []int
	}{
		LinkID:    {uint32(info.ID), []int{linked.Process.Pid, service.Process.Pid, container.Process.Pid}},
		ProgramID: {uint32(info.Program), []int{linked.Process.Pid, loaded.Process.Pid, service.Process.Pid, container.Process.Pid}},
	} {
		var found map[uint32][]int
		var err error
		asDaemon(t, func() { found, err = Holders(t.Context(), what, map[uint32]bool{test.id: true, 1 << 31: true}) })
		if err != nil || len(found) != 1 || !slices.Equal(found[test.id], test.want) {
			t.Errorf("%s: got %v, %v, want %v", what, found, err, test.want)
		}
	}
	// The container's user namespace is root's: those of root's that have the link
	// are others than the user's.
	for uid, holders := range map[uint32][]*exec.Cmd{testtarget.Alice: {linked}, 0: {service, container}} {
		asDaemon(t, func() {
			if killed, err := KillHolders(t.Context(), LinkID, uint32(info.ID), uid); err != nil || killed != len(holders) {
				t.Errorf("killed %d of uid %d, %v", killed, uid, err)
			}
		})
		for _, cmd := range holders {
			var ended *exec.ExitError
			if err := cmd.Wait(); !errors.As(err, &ended) || !ended.Sys().(syscall.WaitStatus).Signaled() {
				t.Errorf("a holder of uid %d ended: %v", uid, err)
			}
		}
	}
	for _, cmd := range []*exec.Cmd{loaded, stranger} {
		if err := unix.Kill(cmd.Process.Pid, 0); err != nil {
			t.Errorf("%v: %v", cmd.Process.Pid, err)
		}
	}
}

func linkFD(t *testing.T, l link.Link) int {
	t.Helper()
	raw, ok := l.(interface{ FD() int })
	if !ok {
		t.Fatalf("a %T has no descriptor", l)
	}
	return raw.FD()
}

func TestInNetwork(t *testing.T) {
	inode := func(path string) uint32 {
		t.Helper()
		var stat unix.Stat_t
		if err := unix.Stat(path, &stat); err != nil {
			t.Fatal(err)
		}
		return uint32(stat.Ino)
	}
	own := inode("/proc/thread-self/ns/net")
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET, Credential: &syscall.Credential{Uid: testtarget.Alice, Gid: testtarget.Alice},
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	other := inode("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/ns/net")
	failure := errors.New("failed")
	for _, number := range []uint32{own, other} {
		var err error
		asDaemon(t, func() {
			err = InNetwork(number, func() error {
				if got := inode("/proc/thread-self/ns/net"); got != number {
					t.Errorf("in network namespace %d, want %d", got, number)
				}
				return failure
			})
		})
		if !errors.Is(err, failure) {
			t.Errorf("got %v", err)
		}
	}
	if got := inode("/proc/thread-self/ns/net"); got != own {
		t.Errorf("it has stayed in network namespace %d", got)
	}
	if err := InNetwork(1, func() error { return nil }); !errors.Is(err, ErrProcessGone) {
		t.Errorf("got %v", err)
	}
}
