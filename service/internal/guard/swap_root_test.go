// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// full says whether the attacks are made as often as it takes to believe in
// what they find (make test-attacks), or as often as there is time for.
var full = os.Getenv("BPFBROKER_TEST_ATTACKS") == "full"

// times is how often something is done.
func times(few, many int) int {
	if full {
		return many
	}
	return few
}

// swap is what a process does: links again and again, while a thread that
// interrupts it puts one descriptor in another's place.
type swap struct {
	Tries  int
	Attach uint32
	// Field of LINK_CREATE's has the descriptor: 0 the program, 1 the target.
	Field int
	// Target says that the third file is what is linked to.
	Target bool
	// Info is where the link says what it was made with (struct bpf_link_info),
	// and Own what that is when it may be.
	Info int
	Own  uint64
}

type swapResult struct {
	Swaps, Own, Other int
	Errors            map[string]int
	Microseconds      int64
}

func init() {
	// swap PLAN OWN OTHER: answers with a swapResult. The process may have
	// real-time priority, and its last program is linked, unless Field says
	// that it is one of the two.
	ops["swap"] = func(args []string, files []*os.File) (string, []*os.File, error) {
		var s swap
		if err := json.Unmarshal([]byte(args[0]), &s); err != nil {
			return "", nil, err
		}
		// Neither thread may wait for the other's system calls.
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
		runtime.LockOSThread()
		slot := dup(int(files[0].Fd()))
		defer unix.Close(slot)
		var stop atomic.Bool
		var swapper sync.WaitGroup
		r := swapResult{Errors: map[string]int{}}
		ready := make(chan error)
		swapper.Go(func() {
			runtime.LockOSThread() // and never unlock: the thread ends with its priority
			ready <- unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
			pause := unix.Timespec{Nsec: 150_000} // more than one swap in a system call may undo each other
			for ; !stop.Load(); r.Swaps++ {
				_, _, _ = syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pause)), 0, 0)
				_, _, _ = syscall.RawSyscall(unix.SYS_DUP3, files[r.Swaps%2].Fd(), uintptr(slot), unix.O_CLOEXEC)
			}
		})
		if err := <-ready; err != nil {
			return "", nil, fmt.Errorf("cannot interrupt: %v", err)
		}
		var attr [16]uint32
		attr[0], attr[2] = uint32(last()), s.Attach
		if s.Target {
			attr[1] = uint32(files[2].Fd())
		}
		attr[s.Field] = uint32(slot)
		var info [16]uint64
		ask := struct {
			link, size uint32
			info       unsafe.Pointer
		}{info: unsafe.Pointer(&info)}
		start := time.Now()
		errors := map[syscall.Errno]int{}
		for range s.Tries {
			fd, _, errno := syscall.RawSyscall(unix.SYS_BPF, 28, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
			if errno != 0 {
				errors[errno]++
				continue
			}
			ask.link, ask.size = uint32(fd), uint32(unsafe.Sizeof(info))
			_, _, errno = syscall.RawSyscall(unix.SYS_BPF, 15, uintptr(unsafe.Pointer(&ask)), unsafe.Sizeof(ask))
			if errno == 0 && uint64((*[32]uint32)(unsafe.Pointer(&info))[s.Info]) == s.Own {
				r.Own++
			} else {
				r.Other++
			}
			_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
		}
		r.Microseconds = time.Since(start).Microseconds()
		stop.Store(true)
		swapper.Wait()
		for errno, n := range errors {
			r.Errors[errno.Error()] = n
		}
		data, err := json.Marshal(r)
		return string(data), nil, err
	}
}

// race watches a process's LINK_CREATE: what a guard would see that looked at
// the descriptor when the system call begins, and what the kernel then takes.
type race struct {
	value *ebpf.Map
	links []link.Link
}

// raced counts links by what was seen and what was taken, of which Own may be.
type raced struct {
	TGID, _     uint32
	Own, Seen   uint64
	OtherOther  uint64
	OtherTaken  uint64 // own was taken, other seen
	OwnReplaced uint64 // other was taken, own seen: a guard that believes its eyes is deceived
	OwnOwn      uint64
}

// step is a field that is read, of a struct or of one inside that.
type step struct {
	in, field string
	inside    *step
	size      int32 // 8 if it isn't said
}

// watch attaches the programs that watch, before and after the guard's own.
// field is where LINK_CREATE has the descriptor.
func watch(t *testing.T, field int, seen, taken []step) *race {
	t.Helper()
	types, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	offset := func(s step) int32 {
		at := fieldOffset(t, types, s.in, s.field)
		if s.inside != nil {
			at += fieldOffset(t, types, s.inside.in, s.inside.field)
		}
		return at
	}
	value, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(unsafe.Sizeof(raced{})), MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	r := &race{value: value}
	t.Cleanup(func() {
		for _, l := range r.links {
			_ = l.Close()
		}
		_ = value.Close()
	})
	// begin leaves the context in R6 and the value in R9, for the process.
	begin := func() asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMapValue(asm.R9, value.FD(), 0),
			asm.FnGetCurrentPidTgid.Call(),
			asm.RSh.Imm(asm.R0, 32),
			asm.LoadMem(asm.R1, asm.R9, 0, asm.Word),
			asm.JNE.Reg(asm.R0, asm.R1, "end"),
		}
	}
	// follow reads from R7 on, field by field, into R7.
	follow := func(steps []step) (i asm.Instructions) {
		for _, s := range steps {
			i = append(i,
				asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, -8, asm.R1, asm.DWord),
				asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, -8),
				asm.Mov.Imm(asm.R2, cmp.Or(s.size, 8)),
				asm.Mov.Reg(asm.R3, asm.R7), asm.Add.Imm(asm.R3, offset(s)),
				asm.FnProbeReadKernel.Call(),
				asm.LoadMem(asm.R7, asm.RFP, -8, asm.DWord),
			)
		}
		return i
	}
	end := asm.Instructions{asm.Mov.Imm(asm.R0, 0).WithSymbol("end"), asm.Return()}

	look := begin()
	look = append(look,
		asm.LoadMem(asm.R1, asm.R6, 0, asm.DWord), // the command
		asm.JNE.Imm32(asm.R1, 28, "end"),
		asm.LoadMem(asm.R3, asm.R6, 8, asm.DWord), // the attributes
		asm.Add.Imm(asm.R3, int32(4*field)),
		asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, -16, asm.R1, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, -16),
		asm.Mov.Imm(asm.R2, 4),
		asm.FnProbeReadKernel.Call(),
		asm.FnGetCurrentTaskBtf.Call(),
		asm.Mov.Reg(asm.R7, asm.R0),
	)
	look = append(look, follow([]step{{in: "task_struct", field: "files"}, {in: "files_struct", field: "fdt"}, {in: "fdtable", field: "fd"}})...)
	look = append(look,
		asm.LoadMem(asm.R1, asm.RFP, -16, asm.DWord),
		asm.LSh.Imm(asm.R1, 3),
		asm.Add.Reg(asm.R7, asm.R1),
	)
	look = append(look, follow(append([]step{{}}, seen...))...)
	// As if the guard took its time, so that there is a swap in it more often.
	look = append(look,
		asm.StoreMem(asm.R9, int16(unsafe.Offsetof(raced{}.Seen)), asm.R7, asm.DWord),
		asm.Mov.Imm(asm.R1, 20_000), // the verifier counts, too
		asm.Sub.Imm(asm.R1, 1).WithSymbol("wait"),
		asm.JNE.Imm(asm.R1, 0, "wait"),
	)
	look = append(look, end...)

	take := append(begin(), asm.LoadMem(asm.R7, asm.R6, 0, asm.DWord))
	take = append(take, follow(taken)...)
	take = append(take,
		asm.LoadMem(asm.R1, asm.R9, int16(unsafe.Offsetof(raced{}.Own)), asm.DWord),
		asm.LoadMem(asm.R2, asm.R9, int16(unsafe.Offsetof(raced{}.Seen)), asm.DWord),
		asm.JNE.Reg(asm.R2, asm.R1, "seen"),
		asm.Add.Imm(asm.R9, 16),
		asm.JNE.Reg(asm.R7, asm.R1, "taken").WithSymbol("seen"),
		asm.Add.Imm(asm.R9, 8),
		asm.LoadMem(asm.R1, asm.R9, int16(unsafe.Offsetof(raced{}.OtherOther)), asm.DWord).WithSymbol("taken"),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R9, int16(unsafe.Offsetof(raced{}.OtherOther)), asm.R1, asm.DWord),
	)
	take = append(take, end...)
	for function, instructions := range map[string]asm.Instructions{"security_bpf": look, "bpf_link_prime": take} {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFEntry, AttachTo: function, License: "GPL", Instructions: instructions,
		})
		if err != nil {
			t.Fatalf("%+v", err)
		}
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		_ = p.Close()
		if err != nil {
			t.Fatal(err)
		}
		r.links = append(r.links, l)
	}
	return r
}

// start has a process's links counted, and what may be linked known.
func (r *race) start(t *testing.T, pid int, own uint64) {
	t.Helper()
	if err := r.value.Put(uint32(0), raced{TGID: uint32(pid), Own: own}); err != nil {
		t.Fatal(err)
	}
}

// end returns the counts.
func (r *race) end(t *testing.T) (counts raced) {
	t.Helper()
	if err := r.value.Lookup(uint32(0), &counts); err != nil {
		t.Fatal(err)
	}
	return counts
}

// fieldOffset is where a struct has a field; nothing is at the start of nothing.
func fieldOffset(t *testing.T, types *btf.Spec, in, field string) int32 {
	t.Helper()
	if in == "" {
		return 0
	}
	var s *btf.Struct
	if err := types.TypeByName(in, &s); err != nil {
		t.Fatal(err)
	}
	for _, m := range s.Members {
		if m.Name == field {
			return int32(m.Offset.Bytes())
		}
	}
	t.Fatalf("struct %s has no %s", in, field)
	return 0
}

// preempt has the kernel interrupt itself for threads that come first, where it
// waits otherwise until a system call ends.
func preempt(t *testing.T) {
	t.Helper()
	if err := unix.Mount("debugfs", "/sys/kernel/debug", "debugfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount("/sys/kernel/debug", 0) })
	const path = "/sys/kernel/debug/sched/preempt"
	modes, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, before, _ := strings.Cut(string(modes), "(")
	before, _, _ = strings.Cut(before, ")")
	set := func(mode string) {
		if err := os.WriteFile(path, []byte(mode), 0); err != nil {
			t.Fatal(err)
		}
	}
	set("full")
	t.Cleanup(func() { set(before) })
}

func init() {
	// swapupdate TRIES OWN OTHER: puts its last program in the place of the own
	// link's while another process, with which it shares descriptors as long as that
	// lives, puts the other link there and ends. Answers how often that worked.
	ops["swapupdate"] = func(args []string, files []*os.File) (string, []*os.File, error) {
		type answer struct {
			done int
			err  error
		}
		answers := make(chan answer)
		go func() {
			runtime.LockOSThread() // which ends with it
			done, err := swapUpdate(int(number(args[0])), files[0].Fd(), files[1].Fd())
			answers <- answer{done, err}
		}()
		a := <-answers
		return strconv.Itoa(a.done), nil, a.err
	}
}

// swapUpdate is for a thread of its own.
func swapUpdate(tries int, own, other uintptr) (done int, err error) {
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return 0, err
	}
	slot := dup(int(own))
	attr := struct{ link, program, flags, old uint32 }{link: uint32(slot), program: uint32(last())}
	if _, err := call(29, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
		return 0, fmt.Errorf("cannot update what is its own: %w", err)
	}
	for i := range tries {
		if err := unix.Dup3(int(own), slot, unix.O_CLOEXEC); err != nil {
			return done, err
		}
		// The runtime's signals would have handlers there.
		var all, before [8]byte
		for i := range all {
			all[i] = 0xff
		}
		_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&before)), 8, 0, 0)
		pid, errno := swapAndEnd(other, uintptr(slot), int64(200_000+i%100*5_000))
		_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&before)), 0, 8, 0, 0)
		if errno != 0 {
			return done, errno
		}
		for ended := false; !ended; {
			got, _, _ := syscall.RawSyscall6(unix.SYS_WAIT4, pid, 0, unix.WNOHANG|unix.WALL, 0, 0, 0)
			ended = got == pid
			// While they share, and of the other, it is refused.
			for range 10 {
				if _, _, errno := syscall.RawSyscall(unix.SYS_BPF, 29, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr)); errno == 0 {
					done++
				}
			}
		}
	}
	return done, nil
}

// swapAndEnd starts a process that, after a time, comes before all others, puts a
// descriptor in another's place and ends. It is a copy with one thread, and has no
// runtime.
//
//go:nosplit
//go:norace
func swapAndEnd(other, slot uintptr, wait int64) (pid uintptr, errno syscall.Errno) {
	pause := [2]int64{0, wait}
	priority := int32(1)
	pid, _, errno = syscall.RawSyscall6(unix.SYS_CLONE, unix.CLONE_FILES, 0, 0, 0, 0, 0)
	if pid != 0 || errno != 0 {
		return pid, errno
	}
	_, _, _ = syscall.RawSyscall(unix.SYS_SCHED_SETSCHEDULER, 0, unix.SCHED_FIFO, uintptr(unsafe.Pointer(&priority)))
	_, _, _ = syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pause)), 0, 0)
	_, _, _ = syscall.RawSyscall(unix.SYS_DUP3, other, slot, unix.O_CLOEXEC)
	for {
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
}

// TestSwapUpdate swaps a link while LINK_UPDATE looks at it, by who shares the
// descriptors until then and not any more afterwards.
func TestSwapUpdate(t *testing.T) {
	g := open(t)
	preempt(t)
	own, _ := cgroup(t, "update", testtarget.Alice)
	root := openFile(t, "/sys/fs/cgroup")
	target := testtarget.New(t, testtarget.Alice)
	if err := unix.Prlimit(target.PID, unix.RLIMIT_RTPRIO, &unix.Rlimit{Cur: 1, Max: 1}, nil); err != nil {
		t.Fatal(err)
	}
	grant(t, g, target, confinedTo(profile.ReachOwn))
	expect(t, target, 0, "load", loading(simple[typeCgroupSKB]))
	links := []*os.File{keep(t, simple[typeCgroupSKB], own), keep(t, simple[typeCgroupSKB], root)}
	before := linkedProgram(t, links[1])
	tries, start := times(150, 10_000), time.Now()
	out, _, err := target.Do("swapupdate", []string{strconv.Itoa(tries)}, links...)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("attack: swap of a link in an update, by who shares the descriptors until then: %d tries in %.1f s, %s updated\n", tries, time.Since(start).Seconds(), out)
	if after := linkedProgram(t, links[1]); out != "0" || after != before {
		t.Errorf("it has replaced the program of a link that isn't its own %s times: program %d is %d now", out, before, after)
	}
	expect(t, target, 0, "dropall", nil)
}

// TestSwap swaps a descriptor between the moments when the kernel has read its
// number and when it looks what that is: of a control group, of a network
// namespace, and of a program. What may be attached is, the rest never; where it
// may, the same swaps deceive whoever looks at the number.
func TestSwap(t *testing.T) {
	g := open(t)
	preempt(t)
	own, _ := cgroup(t, "swap", testtarget.Alice)
	root := openFile(t, "/sys/fs/cgroup")
	hostNet := openFile(t, "/proc/self/ns/net")
	// Without programs that stay, each link would change the kernel's text.
	kept, _ := cgroup(t, "kept", testtarget.Alice)
	keep(t, simple[typeCgroupSKB], kept)
	keep(t, simple[typeSKLookup], hostNet)

	const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET
	inode := []step{{in: "file", field: "f_inode"}, {in: "inode", field: "i_ino"}}
	programID := []step{{in: "bpf_prog", field: "aux"}, {in: "bpf_prog_aux", field: "id", size: 4}}
	// oneProgram gives the process a program to be linked, and answers with what is
	// swapped and with the number of the first.
	oneProgram := func(t *testing.T, target *testtarget.Process, reach profile.Reach, p program, own, other *os.File) ([]*os.File, uint64) {
		grant(t, g, target, confinedTo(reach))
		expect(t, target, 0, "load", loading(p))
		var stat unix.Stat_t
		if err := unix.Fstat(int(own.Fd()), &stat); err != nil {
			t.Fatal(err)
		}
		return []*os.File{own, other}, stat.Ino
	}
	for _, test := range []struct {
		name        string
		attack      swap
		seen, taken []step
		reach       profile.Reach
		few, many   int
		prepare     func(*testing.T, *testtarget.Process, profile.Reach) ([]*os.File, uint64)
	}{
		{
			name: "cgroup", attack: swap{Attach: attachEgress, Field: 1, Info: 4}, reach: profile.ReachOwn, few: 20_000, many: 1_000_000,
			seen: inode, taken: []step{{in: "bpf_cgroup_link", field: "cgroup"}, {in: "cgroup", field: "kn"}, {in: "kernfs_node", field: "id"}},
			prepare: func(t *testing.T, target *testtarget.Process, reach profile.Reach) ([]*os.File, uint64) {
				return oneProgram(t, target, reach, simple[typeCgroupSKB], own, root)
			},
		},
		{
			name: "network", attack: swap{Attach: attachSKLookup, Field: 1, Info: 4}, reach: profile.ReachOwn, few: 5_000, many: 100_000,
			seen: inode, taken: []step{{in: "bpf_netns_link", field: "net"}, {in: "net", field: "ns", inside: &step{in: "ns_common", field: "inum"}, size: 4}},
			prepare: func(t *testing.T, target *testtarget.Process, reach profile.Reach) ([]*os.File, uint64) {
				return oneProgram(t, target, reach, simple[typeSKLookup], openFile(t, fmt.Sprintf("/proc/%d/ns/net", target.PID)), hostNet)
			},
		},
		{
			name: "program", attack: swap{Attach: attachEgress, Info: 2, Target: true}, reach: profile.ReachNone, few: 5_000, many: 100_000,
			seen: append([]step{{in: "file", field: "private_data"}}, programID...), taken: append([]step{{in: "bpf_link", field: "prog"}}, programID...),
			prepare: func(t *testing.T, target *testtarget.Process, reach profile.Reach) ([]*os.File, uint64) {
				// By a grant that may attach it, and by another to the same process.
				var programs []*os.File
				for _, reach := range []profile.Reach{profile.ReachAny, reach} {
					grant(t, g, target, confinedTo(reach))
					expect(t, target, 0, "load", loading(simple[typeCgroupSKB]))
					_, files, err := target.Do("give", nil)
					if err != nil || len(files) != 1 {
						t.Fatalf("got %d files, %v", len(files), err)
					}
					t.Cleanup(func() { files[0].Close() })
					programs = append(programs, files[0])
				}
				p, err := ebpf.NewProgramFromFD(dup(int(programs[0].Fd())))
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				info, err := p.Info()
				if err != nil {
					t.Fatal(err)
				}
				id, _ := info.ID()
				return append(programs, root), uint64(id)
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			race := watch(t, test.attack.Field, test.seen, test.taken)
			for _, reach := range []profile.Reach{profile.ReachAny, test.reach} {
				target := testtarget.NewWith(t, testtarget.Alice, namespaces, testtarget.Root)
				if err := unix.Prlimit(target.PID, unix.RLIMIT_RTPRIO, &unix.Rlimit{Cur: 1, Max: 1}, nil); err != nil {
					t.Fatal(err)
				}
				attack := test.attack
				var files []*os.File
				files, attack.Own = test.prepare(t, target, reach)
				attack.Tries = times(test.few, test.many)
				if reach == profile.ReachAny {
					attack.Tries = 5_000
				}
				race.start(t, target.PID, attack.Own)
				data, err := json.Marshal(attack)
				if err != nil {
					t.Fatal(err)
				}
				out, _, err := target.Do("swap", []string{string(data)}, files...)
				if err != nil {
					t.Fatal(err)
				}
				var r swapResult
				if err := json.Unmarshal([]byte(out), &r); err != nil {
					t.Fatal(err)
				}
				raced := race.end(t)
				fmt.Printf("attack: swap of a %s, reach %v: %d tries in %.1f s, %d swaps; own seen and other taken %d, other seen and own taken %d; linked to own %d, to other %d, refused %v\n",
					test.name, reach, attack.Tries, float64(r.Microseconds)/1e6, r.Swaps, raced.OwnReplaced, raced.OtherTaken, r.Own, r.Other, r.Errors)
				if raced.OwnReplaced == 0 || r.Own == 0 {
					t.Errorf("reach %v: nothing was swapped in time, or linked: %+v, %+v", reach, raced, r)
				}
				refused := r.Errors[unix.EPERM.Error()]
				if reach == profile.ReachAny {
					if uint64(r.Other) < raced.OwnReplaced || refused != 0 {
						t.Errorf("where it may: %+v, %+v", raced, r)
					}
				} else if r.Other != 0 || refused != attack.Tries-r.Own || uint64(refused) < raced.OwnReplaced {
					t.Errorf("where it must not: %+v, %+v", raced, r)
				}
				expect(t, target, 0, "dropall", nil)
				target.Kill()
			}
		})
	}
}

// linkedProgram is the number of a link's program.
func linkedProgram(t *testing.T, link *os.File) uint32 {
	t.Helper()
	var info [16]uint64
	ask := struct {
		link, size uint32
		info       unsafe.Pointer
	}{uint32(link.Fd()), uint32(unsafe.Sizeof(info)), unsafe.Pointer(&info)}
	if _, err := call(15, unsafe.Pointer(&ask), unsafe.Sizeof(ask)); err != nil {
		t.Fatal(err)
	}
	return uint32(info[1]) // after its type and number
}

// keep attaches a program to something until the test ends.
func keep(t *testing.T, p program, target *os.File) (link *os.File) {
	t.Helper()
	fd, err := load(p)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	l, err := createLink(uint32(fd), uint32(target.Fd()), p.Attach)
	if err != nil {
		t.Fatal(err)
	}
	link = os.NewFile(uintptr(l), "link")
	t.Cleanup(func() { link.Close() })
	return link
}
