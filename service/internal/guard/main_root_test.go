// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// dir is where the tests pin the guard.
const dir = "/sys/fs/bpf/guard"

func TestMain(m *testing.M) {
	if os.Getenv("BPFBROKER_TEST_TARGET") == "" {
		if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0700"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	testtarget.Main(m, ops, func() error { return kernel.StartHelpers(func() { panic("no helpers any more") }) })
}

// ops are what a hostile process does with its token.
var ops = map[string]testtarget.Op{
	// token MOUNT: takes a token and keeps it, in the place of another.
	"token": func(_ []string, files []*os.File) (string, []*os.File, error) {
		f, err := kernel.CreateToken(files[0])
		if err != nil {
			return "", nil, err
		}
		if held.token != nil {
			_ = held.token.Close()
		}
		held.token = f
		return "", nil, nil
	},
	// hold FILE...: keeps them as programs.
	"hold": func(_ []string, files []*os.File) (string, []*os.File, error) {
		for _, f := range files {
			held.programs = append(held.programs, dup(int(f.Fd())))
		}
		return "", nil, nil
	},
	// map TYPE ENTRIES: makes one and keeps it.
	"map": func(args []string, _ []*os.File) (string, []*os.File, error) {
		fd, err := createMap(number(args[0]), number(args[1]))
		if err == nil {
			held.maps = append(held.maps, fd)
		}
		return "", nil, err
	},
	// load JSON: loads a program and keeps it.
	"load": func(args []string, _ []*os.File) (string, []*os.File, error) {
		var p program
		if err := json.Unmarshal([]byte(args[0]), &p); err != nil {
			return "", nil, err
		}
		fd, err := load(p)
		if err == nil {
			held.programs = append(held.programs, fd)
		}
		return "", nil, err
	},
	// give: answers with the last program.
	"give": func([]string, []*os.File) (string, []*os.File, error) {
		return "", []*os.File{os.NewFile(uintptr(dup(last())), "program")}, nil
	},
	// givetoken: answers with the token.
	"givetoken": func([]string, []*os.File) (string, []*os.File, error) {
		return "", []*os.File{os.NewFile(uintptr(dup(int(held.token.Fd()))), "token")}, nil
	},
	// taketoken TOKEN: keeps it.
	"taketoken": func(_ []string, files []*os.File) (string, []*os.File, error) {
		held.token = os.NewFile(uintptr(dup(int(files[0].Fd()))), "token")
		return "", nil, nil
	},
	// programs: answers how many it has.
	"programs": func([]string, []*os.File) (string, []*os.File, error) {
		return strconv.Itoa(len(held.programs)), nil, nil
	},
	// become UID: for good.
	"become": func(args []string, _ []*os.File) (string, []*os.File, error) {
		id := int(number(args[0]))
		if err := syscall.Setresgid(id, id, id); err != nil {
			return "", nil, err
		}
		return "", nil, syscall.Setresuid(id, id, id)
	},
	// link TARGET ATTACHTYPE, raw NAME, attach TARGET ATTACHTYPE, run: with the last program.
	"link": func(args []string, files []*os.File) (string, []*os.File, error) {
		target := targetOf(args, files)
		fd, err := createLink(uint32(last()), target, number(args[1]))
		if err == nil {
			held.links = append(held.links, fd)
		}
		return "", nil, err
	},
	"raw": func(args []string, _ []*os.File) (string, []*os.File, error) {
		fd, err := openRaw(uint32(last()), args[0])
		if err == nil {
			held.links = append(held.links, fd)
		}
		return "", nil, err
	},
	"attach": func(args []string, files []*os.File) (string, []*os.File, error) {
		target := targetOf(args, files)
		attr := struct{ target, program, kind, flags, replace uint32 }{target, uint32(last()), number(args[1]), 0, 0}
		_, err := call(8, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
		return "", nil, err
	},
	// attempts N: tries as often to attach nothing to the root control group, and
	// answers how often that was refused.
	"attempts": func(args []string, _ []*os.File) (string, []*os.File, error) {
		attr := struct{ target, program, kind, flags, replace uint32 }{kind: attachEgress}
		refused := 0
		for range number(args[0]) {
			if _, err := call(8, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err == unix.EPERM {
				refused++
			}
		}
		return strconv.Itoa(refused), nil, nil
	},
	// ioctl EVENT: gives the last program to a perf event.
	"ioctl": func(_ []string, files []*os.File) (string, []*os.File, error) {
		return "", nil, unix.IoctlSetInt(int(files[0].Fd()), unix.PERF_EVENT_IOC_SET_BPF, last())
	},
	"detach": func(args []string, files []*os.File) (string, []*os.File, error) {
		target := targetOf(args, files)
		attr := struct{ target, program, kind, flags, replace uint32 }{target, uint32(last()), number(args[1]), 0, 0}
		_, err := call(9, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
		return "", nil, err
	},
	"run": func([]string, []*os.File) (string, []*os.File, error) { return "", nil, testRun(uint32(last()), 64) },
	// pin PATH and get PATH, of the last program
	"pin": func(args []string, _ []*os.File) (string, []*os.File, error) {
		return "", nil, pin(last(), unix.AT_FDCWD, args[0])
	},
	"get": func(args []string, _ []*os.File) (string, []*os.File, error) {
		fd, err := get(unix.AT_FDCWD, args[0], 0)
		if err == nil {
			held.programs = append(held.programs, fd)
		}
		return "", nil, err
	},
	// reopen FLAGS MAP MOUNT: pins a map, opens the pin and removes it.
	"reopen": func(args []string, files []*os.File) (string, []*os.File, error) {
		dir, err := unix.Openat(int(files[1].Fd()), ".", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", nil, fmt.Errorf("cannot open: %v", err)
		}
		defer unix.Close(dir)
		if err := pin(int(files[0].Fd()), dir, "map"); err != nil {
			return "", nil, fmt.Errorf("cannot pin: %v", err)
		}
		defer func() { _ = unix.Unlinkat(dir, "map", 0) }()
		fd, err := get(dir, "map", number(args[0]))
		if err == nil {
			_ = unix.Close(fd)
		}
		return "", nil, err
	},
	// drop: closes all but the token. dropall: that, too.
	"drop": func([]string, []*os.File) (string, []*os.File, error) { held.drop(); return "", nil, nil },
	"dropall": func([]string, []*os.File) (string, []*os.File, error) {
		held.drop()
		_ = held.token.Close()
		held.token = nil
		return "", nil, nil
	},
	// update PROGRAM: puts the last program in the place of the last link's.
	"update": func([]string, []*os.File) (string, []*os.File, error) {
		attr := struct{ link, program, flags, old uint32 }{link: uint32(held.links[len(held.links)-1]), program: uint32(last())}
		_, err := call(29, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
		return "", nil, err
	},
	// updatealone: the same, by a thread that shares its descriptors with no other.
	// With a file that is the link.
	"updatealone": func(_ []string, files []*os.File) (string, []*os.File, error) {
		attr := struct{ link, program, flags, old uint32 }{program: uint32(last())}
		if len(files) > 0 {
			attr.link = uint32(files[0].Fd())
		} else {
			attr.link = uint32(held.links[len(held.links)-1])
		}
		ended := make(chan error)
		go func() {
			runtime.LockOSThread() // which ends with it
			err := unix.Unshare(unix.CLONE_FILES)
			if err == nil {
				_, err = call(29, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
			}
			ended <- err
		}()
		return "", nil, <-ended
	},
	// hammer: loads the program again and again until cease, which answers how
	// often that worked.
	"hammer": func(args []string, _ []*os.File) (string, []*os.File, error) {
		var p program
		if err := json.Unmarshal([]byte(args[0]), &p); err != nil {
			return "", nil, err
		}
		hammering.stop.Store(false)
		hammering.wait.Go(func() {
			for !hammering.stop.Load() {
				hammering.tries++
				if fd, err := load(p); err == nil {
					hammering.loaded++
					_ = unix.Close(fd)
				}
				time.Sleep(time.Millisecond) // the machine has one processor
			}
		})
		return "", nil, nil
	},
	"cease": func([]string, []*os.File) (string, []*os.File, error) {
		hammering.stop.Store(true)
		hammering.wait.Wait()
		if hammering.tries < 10 {
			return "", nil, errors.New("too few tries")
		}
		return strconv.Itoa(hammering.loaded), nil, nil
	},
	// guard: is a daemon that opens the guard.
	"guard": func([]string, []*os.File) (string, []*os.File, error) {
		_, err := Open(dir)
		return "", nil, err
	},
}

var hammering struct {
	stop          atomic.Bool
	wait          sync.WaitGroup
	tries, loaded int
}

// held is what a hostile process has.
var held holdings

type holdings struct {
	token                 *os.File
	maps, programs, links []int
}

func (h *holdings) drop() {
	for _, fds := range [][]int{h.maps, h.programs, h.links} {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
	h.maps, h.programs, h.links = nil, nil, nil
}

type program struct {
	Type, Attach uint32
	Instructions []uint64
	BTF          uint32
	Flags        uint32
	// Types and Target are descriptors: of typed's types, if the program is one
	// of those functions, and of the program that it is for.
	Types, Target uint32
}

// targetOf is the file that came along, or the first argument.
func targetOf(args []string, files []*os.File) uint32 {
	if len(files) > 0 {
		return uint32(files[0].Fd())
	}
	return number(args[0])
}

func number(s string) uint32 {
	n, err := strconv.ParseUint(s, 0, 32)
	if err != nil {
		panic(err)
	}
	return uint32(n)
}

func dup(fd int) int {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		panic(err)
	}
	return n
}

func last() int { return held.programs[len(held.programs)-1] }

func call(command uintptr, attr unsafe.Pointer, size uintptr) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

func tokenFD() (fd, flag uint32) {
	if held.token == nil {
		return 0, 0
	}
	return uint32(held.token.Fd()), 1 << 16
}

func createMap(kind, entries uint32) (int, error) {
	attr := struct {
		kind, key, value, entries, flags uint32
		_                                [14]uint32
		token                            uint32
	}{kind: kind, key: 4, value: 8, entries: entries}
	if kind == mapRingbuf {
		attr.key, attr.value = 0, 0
	}
	if kind == mapDevmap || kind == mapDevmapHash {
		attr.value = 4
	}
	attr.token, attr.flags = tokenFD()
	return call(0, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

func load(p program) (int, error) {
	license := [...]byte{'G', 'P', 'L', 0}
	attr := struct {
		kind, count           uint32
		instructions, license *byte
		_                     [5]uint32
		flags                 uint32
		name                  [16]byte
		_                     uint32
		attachType            uint32
		types                 uint32
		functionSize          uint32
		functions             *[2]uint32
		functionCount         uint32
		_                     [4]uint32
		attachBTF             uint32
		target                uint32
		_                     [7]uint32
		token                 uint32
		_                     uint32
	}{
		kind: p.Type, count: uint32(len(p.Instructions)), instructions: (*byte)(unsafe.Pointer(&p.Instructions[0])), license: &license[0],
		attachType: p.Attach, types: p.Types, attachBTF: p.BTF, target: p.Target,
	}
	if p.Types != 0 {
		attr.functionSize, attr.functions, attr.functionCount = 8, &[2]uint32{0, typedFunction}, 1
	}
	copy(attr.name[:], "hostile")
	attr.token, attr.flags = tokenFD()
	attr.flags |= p.Flags
	fd, err := call(5, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	for err == unix.EAGAIN { // a signal came, the runtime's for one
		fd, err = call(5, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	}
	runtime.KeepAlive(p) // the kernel's pointer isn't the collector's
	return fd, err
}

func createLink(program, target, attachType uint32) (int, error) {
	attr := struct {
		program, target, attachType, flags uint32
		_                                  [12]uint32
	}{program: program, target: target, attachType: attachType}
	if attachType == attachNetfilter {
		attr.target = 0
	}
	return call(28, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

func openRaw(program uint32, name string) (int, error) {
	attr := struct {
		name    *byte
		program uint32
		_       uint32
		cookie  uint64
	}{program: program}
	if name != "" {
		attr.name, _ = unix.BytePtrFromString(name)
	}
	return call(17, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

// testRun runs a program, with a packet if that has a size.
func testRun(program uint32, size int) error {
	attr := struct {
		program, result, in, out uint32
		data, _                  *byte
		repeat                   uint32
		_                        [11]uint32
	}{program: program, in: uint32(size)}
	if size != 0 {
		attr.data, attr.repeat = &make([]byte, size)[0], 1
	}
	_, err := call(10, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}

// pathAttr is what OBJ_PIN and OBJ_GET read of union bpf_attr.
type pathAttr struct {
	path          *byte
	object, flags uint32
	dir           int32
	_             uint32
}

const flagPathFD = 1 << 14

func pin(object, dir int, path string) error {
	attr := pathAttr{object: uint32(object), flags: flagPathFD, dir: int32(dir)}
	attr.path, _ = unix.BytePtrFromString(path)
	_, err := call(6, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}

func get(dir int, path string, flags uint32) (int, error) {
	attr := pathAttr{flags: flagPathFD | flags, dir: int32(dir)}
	attr.path, _ = unix.BytePtrFromString(path)
	return call(7, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}
