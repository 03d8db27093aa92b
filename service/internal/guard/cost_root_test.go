// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// cost is what is measured with the guard and without it.
type cost struct {
	Kind, Name string
	// With and Without are nanoseconds of a call.
	With, Without []int64
	// do takes some samples.
	do func() []int64
}

// BenchmarkCost prints the samples of what the guard makes slower, or could, as
// JSON: test/bench runs it. It attaches the guard and detaches it in turns;
// tokens, and what the guard knows of them, stay. The environment has to say
// GODEBUG=asyncpreemptoff=1, since signals end what the kernel is at.
func BenchmarkCost(b *testing.B) {
	const rounds = 4
	b.Cleanup(func() {
		if current != nil {
			current.Close()
			current = nil
		}
		if err := Unload(dir); err != nil {
			b.Error(err)
		}
	})
	g := open(b)
	shipped, err := profile.Load(profile.DefaultDirs()).Get("network")
	if err != nil {
		b.Fatal(err)
	}
	// One that has the guard look at each instruction.
	limited := *shipped
	limited.Helpers = profile.Names{Deny: true, List: []string{"probe_read_kernel", "override_return"}}

	root, bob := testtarget.Start(b, testtarget.Attr{}), testtarget.Start(b, testtarget.Attr{UID: testtarget.Bob})
	_, files, err := root.Do("make map", nil)
	if err != nil {
		b.Fatal(err)
	}
	defer files[0].Close()
	prepare := func(p *testtarget.Process, op string) {
		if _, _, err := p.Do(op, nil, files...); err != nil {
			b.Fatal(err)
		}
		// Nothing else has a turn meanwhile, but for interrupts.
		if err := setScheduler(p.PID, 1, 1); err != nil {
			b.Fatal(err)
		}
	}
	prepare(root, "prepare")
	prepare(bob, "prepare")
	var ids []uint64
	granted := func(p *profile.Profile) *testtarget.Process {
		target := testtarget.NewWith(b, testtarget.Alice, unix.CLONE_NEWUSER|unix.CLONE_NEWNS|unix.CLONE_NEWNET, testtarget.Root)
		id := grant(b, g, target, p)
		ids = append(ids, id)
		limits := Limits{Profile: p, Owner: testtarget.Alice, Deadline: kernel.Now() + kernel.BootTime(8*time.Hour)}
		if err := g.Renew(id, limits); err != nil {
			b.Fatal(err)
		}
		prepare(target, "prepare granted")
		return target
	}
	network, listed := granted(shipped), granted(&limited)

	var costs []*cost
	measure := func(kind, name string, p *testtarget.Process, samples int, what ...string) {
		costs = append(costs, &cost{Kind: kind, Name: name, do: func() (took []int64) {
			for range samples {
				ns, err := strconv.ParseInt(p.Must("time", what...), 10, 64)
				if err != nil {
					b.Fatal(err)
				}
				took = append(took, ns)
			}
			return took
		}})
	}
	measure("create", "MAP_CREATE, array of 1", network, 5, "map", "2", "1")
	measure("create", "MAP_CREATE, hash of 10240", network, 3, "map", "1", "10240")
	measure("create", "MAP_CREATE, ring buffer of 64 KiB", network, 5, "map", "27", "65536")
	measure("load", "PROG_LOAD, 1000 instructions", network, 3, "load", "1000")
	measure("load", "PROG_LOAD, 1000 instructions, Helpers=", listed, 3, "load", "1000")
	if !testing.Short() {
		measure("long load", "PROG_LOAD, 100000 instructions", network, 1, "load", "100000")
		measure("long load", "PROG_LOAD, 100000 instructions, Helpers=", listed, 1, "load", "100000")
	}
	measure("run", "1000 instructions run", network, 2, "run")
	measure("stranger", "a user's MAP_LOOKUP_ELEM", bob, 5, "lookup")
	measure("stranger", "a user's MAP_UPDATE_ELEM", bob, 5, "update")
	measure("stranger", "a user's OBJ_GET_INFO_BY_FD", bob, 5, "info")
	measure("stranger", "root's MAP_CREATE, array of 1", root, 5, "map", "2", "1")
	measure("stranger", "root's MAP_CREATE, hash of 10240", root, 3, "map", "1", "10240")
	measure("stranger", "root's MAP_GET_FD_BY_ID", root, 5, "by id")
	measure("stranger", "root's PROG_LOAD, 2 instructions", root, 5, "load", "2")
	measure("stranger", "root's PROG_TEST_RUN", root, 5, "test run")
	measure("stranger", "root's LINK_CREATE", root, 5, "link")
	measure("stranger", "root's PROG_ATTACH", root, 5, "attach")

	for round := range rounds + 1 {
		for _, with := range []bool{round%2 == 0, round%2 != 0} {
			if with {
				open(b)
			}
			settle()
			for _, c := range costs {
				took := c.do()
				switch {
				case round == 0: // in which caches are filled
				case with:
					c.With = append(c.With, took...)
				default:
					c.Without = append(c.Without, took...)
				}
			}
			if with {
				detach(b, ids)
			}
		}
	}
	open(b)
	for _, c := range costs {
		data, err := json.Marshal(c)
		if err != nil {
			b.Fatal(err)
		}
		fmt.Printf("cost: %s\n", data)
	}
}

// detach ends the guard's programs, and leaves its maps. What was made under it
// has gone before, or would stay in the maps.
func detach(b *testing.B, ids []uint64) {
	for _, id := range ids {
		testtarget.Eventually(b, "the guard has forgotten what was measured", func() bool {
			usage, err := current.Usage(id)
			return err == nil && usage.Programs == 0 && usage.Maps == 0
		})
	}
	links, _ := filepath.Glob(filepath.Join(dir, linksPrefix+"*"))
	for _, path := range links {
		if err := os.RemoveAll(path); err != nil {
			b.Fatal(err)
		}
	}
	current.Close()
	current = nil
}

// settle waits until the kernel has done what it does later, as with links and
// with free memory. The machine's time passes at once.
func settle() { time.Sleep(time.Minute) }

func init() {
	ops["make map"] = func([]string, []*os.File) (string, []*os.File, error) {
		fd, err := createMap(mapHash, 16)
		return "", []*os.File{os.NewFile(uintptr(fd), "map")}, err
	}
	// prepare MAP: keeps it, and has nothing come between what is measured.
	ops["prepare"] = func(_ []string, files []*os.File) (string, []*os.File, error) {
		debug.SetGCPercent(-1)
		timedMap = dup(int(files[0].Fd()))
		return "", nil, nil
	}
	// prepare granted MAP: the same, with the capabilities that bpfbroker run gives for the profile.
	ops["prepare granted"] = func(args []string, files []*os.File) (string, []*os.File, error) {
		if err := limitCapabilities(1<<12 | 1<<39); err != nil {
			return "", nil, err
		}
		return ops["prepare"](args, files)
	}
	// time WHAT...: takes one sample, in nanoseconds.
	ops["time"] = func(args []string, _ []*os.File) (string, []*os.File, error) {
		took, err := timings[args[0]](args[1:])
		// What is left to be done for what was closed is no part of the next sample.
		time.Sleep(100 * time.Millisecond)
		return strconv.FormatInt(took, 10), nil, err
	}
}

// timedMap is a hash map of root's.
var timedMap int

// setScheduler gives a process's main thread a policy of sched(7)'s.
func setScheduler(pid, policy, priority int) error {
	parameter := struct{ priority int32 }{int32(priority)}
	_, _, errno := unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, uintptr(pid), uintptr(policy), uintptr(unsafe.Pointer(&parameter)))
	if errno != 0 {
		return errno
	}
	return nil
}

// limitCapabilities leaves a process no others.
func limitCapabilities(set uint64) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		data[i].Effective, data[i].Permitted = uint32(set>>(32*i)), uint32(set>>(32*i))
	}
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// timings take one sample each.
var timings = map[string]func(args []string) (int64, error){
	"map": func(args []string) (int64, error) {
		kind, entries := number(args[0]), number(args[1])
		return timed(8, func() (int, error) { return createMap(kind, entries) })
	},
	"load": func(args []string) (int64, error) {
		p := simple[typeSocketFilter]
		if n := int(number(args[0])); n > len(p.Instructions) {
			p = realistic(n)
		}
		return timed(1, func() (int, error) { return load(p) })
	},
	// in the kernel's own words
	"run": func([]string) (int64, error) {
		fd, err := load(realistic(1000))
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		return testRuns(fd, 2000)
	},
	"lookup": func([]string) (int64, error) { return timed(32, func() (int, error) { return onElement(1) }) },
	"update": func([]string) (int64, error) { return timed(32, func() (int, error) { return onElement(2) }) },
	"info": func([]string) (int64, error) {
		return timed(32, func() (int, error) { _, err := mapID(); return -1, err })
	},
	"by id": func([]string) (int64, error) {
		id, err := mapID()
		if err != nil {
			return 0, err
		}
		attr := struct{ id, _, flags uint32 }{id: id}
		return timed(16, func() (int, error) { return call(14, unsafe.Pointer(&attr), unsafe.Sizeof(attr)) })
	},
	"test run": func([]string) (int64, error) {
		fd, err := load(simple[typeXDP])
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		return timed(16, func() (int, error) { return -1, testRun(uint32(fd), 64) })
	},
	"link": func([]string) (int64, error) {
		return withCgroup(func(program, cgroup uint32) (int64, error) {
			return timed(8, func() (int, error) { return createLink(program, cgroup, attachEgress) })
		})
	},
	"attach": func([]string) (int64, error) {
		return withCgroup(func(program, cgroup uint32) (int64, error) {
			attr := struct{ target, program, kind, flags, replace uint32 }{cgroup, program, attachEgress, 0, 0}
			took, err := timed(1, func() (int, error) {
				_, err := call(8, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
				return -1, err
			})
			_, _ = call(9, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
			return took, err
		})
	},
}

// withCgroup has something be done with a program and a cgroup for it.
func withCgroup(do func(program, cgroup uint32) (int64, error)) (int64, error) {
	program, err := load(simple[typeCgroupSKB])
	if err != nil {
		return 0, err
	}
	defer unix.Close(program)
	cgroup, err := unix.Open("/sys/fs/cgroup", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(cgroup)
	return do(uint32(program), uint32(cgroup))
}

// mapID asks the kernel for the map's.
func mapID() (uint32, error) {
	var info [32]uint32
	attr := struct {
		fd, size uint32
		info     unsafe.Pointer
	}{uint32(timedMap), uint32(unsafe.Sizeof(info)), unsafe.Pointer(&info)}
	_, err := call(15, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return info[1], err
}

// timed returns what a call takes, in nanoseconds. The descriptors that the calls
// make are closed after the last.
func timed(calls int, do func() (int, error)) (int64, error) {
	fds := make([]int, 0, calls)
	start := time.Now()
	for range calls {
		fd, err := do()
		if err != nil {
			return 0, err
		}
		fds = append(fds, fd)
	}
	took := time.Since(start)
	for _, fd := range fds {
		if fd > 0 {
			_ = unix.Close(fd)
		}
	}
	return took.Nanoseconds() / int64(calls), nil
}

// onElement looks up or updates one of the map's.
func onElement(command uintptr) (int, error) {
	key, value := uint32(1), uint64(1)
	attr := struct {
		fd, _      uint32
		key, value unsafe.Pointer
		flags      uint64
	}{fd: uint32(timedMap), key: unsafe.Pointer(&key), value: unsafe.Pointer(&value)}
	_, err := call(command, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err == unix.ENOENT {
		err = nil
	}
	return -1, err
}

// testRuns has a program run, and returns the kernel's mean, in nanoseconds.
func testRuns(program, times int) (int64, error) {
	data := make([]byte, 128)
	attr := struct {
		program, result, in, out uint32
		data, _                  *byte
		repeat, took             uint32
		_                        [10]uint32
	}{program: uint32(program), in: uint32(len(data)), data: &data[0], repeat: uint32(times)}
	_, err := call(10, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(data)
	return int64(attr.took), err
}

// realistic is a program of about so many instructions: it looks into a map, and then reads and writes packets,
// calculates, branches and calls helpers. The kernel is quick with it: it has nothing to insert after the beginning, which
// takes it a time that grows with the square of the size.
func realistic(count int) program {
	insn := func(code, dst, src, off, imm uint64) uint64 {
		return code | dst<<8 | src<<12 | off&0xffff<<16 | imm&0xffffffff<<32
	}
	const key = ^uint64(3) // on the stack
	p := program{Type: typeXDP, Attach: attachXDP, Instructions: []uint64{
		insn(0x61, 6, 1, 0, 0), // r6 = *(u32 *)(r1 + 0): the packet
		insn(0x61, 8, 1, 4, 0), // r8 = *(u32 *)(r1 + 4): its end
		insn(0xbf, 2, 6, 0, 0),
		insn(0x07, 2, 0, 0, 64),
		insn(0xbd, 2, 8, 2, 0), // if r2 <= r8
		insn(0xb7, 0, 0, 0, 2), // XDP_PASS
		exit,
		insn(0x61, 7, 6, 0, 0),
		insn(0x63, 10, 7, key, 0), // *(u32 *)(r10 - 4) = r7
		insn(0xbf, 2, 10, 0, 0),
		insn(0x07, 2, 0, 0, key),
		insn(0x18, 1, 1, 0, uint64(timedMap)), 0,
		helper(1),              // map_lookup_elem
		insn(0x15, 0, 0, 2, 0), // if r0 == 0
		insn(0x79, 1, 0, 0, 0), // r1 = *(u64 *)(r0 + 0)
		insn(0x0f, 7, 1, 0, 0),
	}}
	for i := uint64(0); len(p.Instructions) < count-2; i++ {
		p.Instructions = append(p.Instructions,
			insn(0x61, 1, 6, i%15*4, 0),     // r1 = *(u32 *)(r6 + …)
			insn(0x27, 1, 0, 0, 0x9e3779b1), // r1 *= …
			insn(0xaf, 7, 1, 0, 0),          // r7 ^= r1
			insn(0x71, 2, 6, i%60, 0),       // r2 = *(u8 *)(r6 + …)
			insn(0x0f, 7, 2, 0, 0),          // r7 += r2
			insn(0xbf, 3, 7, 0, 0),          // r3 = r7
			insn(0x77, 3, 0, 0, 7),          // r3 >>= 7
			insn(0x57, 3, 0, 0, 0xff),       // r3 &= 0xff
			insn(0x0f, 7, 3, 0, 0),          // r7 += r3
			insn(0x63, 6, 7, i%15*4, 0),     // *(u32 *)(r6 + …) = r7
			insn(0x45, 7, 0, 2, 4),          // if r7 & 4
			insn(0x07, 7, 0, 0, 3),          // r7 += 3
			insn(0x27, 7, 0, 0, 5),          // r7 *= 5
			insn(0x67, 7, 0, 0, 1),          // r7 <<= 1
		)
		switch i % 4 {
		case 1:
			p.Instructions = append(p.Instructions, helper(5), insn(0x0f, 7, 0, 0, 0)) // ktime_get_ns
		case 3:
			p.Instructions = append(p.Instructions, helper(7), insn(0xaf, 7, 0, 0, 0)) // get_prandom_u32
		}
	}
	p.Instructions = append(p.Instructions, insn(0xb7, 0, 0, 0, 2), exit)
	return p
}
