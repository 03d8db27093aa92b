// SPDX-License-Identifier: Apache-2.0

//go:build root

package kernel

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func init() {
	ops["bpf"] = tryBPF
	ops["trace"] = traceOther
	ops["shoot"] = shoot
	ops["cease"] = cease
	ops["broker"] = delegateForever
	ops["orphan"] = orphan
}

// bpfResults are what calls answer, by a name.
type bpfResults map[string]syscall.Errno

// tryBPF makes calls with the token of a mount, and without.
func tryBPF(_ []string, files []*os.File) (string, []*os.File, error) {
	results := bpfResults{}
	note := func(name string, fd int, err error) {
		var errno syscall.Errno
		errors.As(err, &errno)
		results[name] = errno
		if err == nil && fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	root, err := unix.Openat(int(files[0].Fd()), ".", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	note("open", -1, err)
	if err == nil {
		defer unix.Close(root)
		token, err := CreateToken(files[0])
		note("token", -1, err)
		if err == nil {
			defer token.Close()
			fd := int(token.Fd())
			hash, err := createMap(mapLRUHash, fd)
			note("map", -1, err)
			if err == nil {
				note("pin", -1, pinAt(hash, root, "pinned"))
				note("unpin", -1, unix.Unlinkat(root, "pinned", 0))
				note("pin elsewhere", -1, pinAt(hash, unix.AT_FDCWD, "/mnt/pinned"))
				_ = unix.Close(hash)
			}
			other, err := createMap(mapArray, fd)
			note("map of another type", other, err)
			program, err := loadProgram(programSocketFilter, 0, fd)
			note("program", program, err)
			program, err = loadProgram(programKprobe, 0, fd)
			note("program of another type", program, err)
			program, err = loadProgram(programSocketFilter, 1, fd)
			note("program of another attach type", program, err)
		}
	}
	hash, err := createMap(mapLRUHash, 0)
	note("map without token", hash, err)
	program, err := loadProgram(programKprobe, 0, 0)
	note("program without token", program, err)
	data, err := json.Marshal(results)
	return string(data), nil, err
}

// Values of the enums of include/uapi/linux/bpf.h.
const (
	commandMapCreate    = 0
	commandProgLoad     = 5
	commandObjPin       = 6
	mapArray            = 2
	mapLRUHash          = 9
	programSocketFilter = 1
	programKprobe       = 2
	flagTokenFD         = 1 << 16
	flagPathFD          = 1 << 14
)

func bpf(command uintptr, attr unsafe.Pointer, size uintptr) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

func createMap(kind uint32, token int) (int, error) {
	attr := struct {
		kind, key, value, entries, flags uint32
		_                                [14]uint32
		token                            int32
	}{kind: kind, key: 4, value: 4, entries: 1}
	if token != 0 {
		attr.flags, attr.token = flagTokenFD, int32(token)
	}
	return bpf(commandMapCreate, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

func loadProgram(kind, attachType uint32, token int) (int, error) {
	instructions := [...]uint64{0xb7, 0x95} // r0 = 0; exit
	license := [...]byte{'G', 'P', 'L', 0}
	attr := struct {
		kind, count           uint32
		instructions, license *byte
		_                     [5]uint32
		flags                 uint32
		_                     [5]uint32
		attachType            uint32
		_                     [18]uint32
		token                 int32
		_                     uint32
	}{kind: kind, count: 2, instructions: (*byte)(unsafe.Pointer(&instructions)), license: &license[0], attachType: attachType}
	if token != 0 {
		attr.flags, attr.token = flagTokenFD, int32(token)
	}
	fd, err := bpf(commandProgLoad, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(&instructions) // the kernel's pointer isn't the collector's
	return fd, err
}

func pinAt(object, dir int, name string) error {
	path, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	attr := struct {
		path                 *byte
		object, flags, dirFD uint32
		_                    uint32
	}{path: path, object: uint32(object), flags: flagPathFD, dirFD: uint32(dir)}
	_, err = bpf(commandObjPin, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}

// traceOther tries to get at another process, and tells in which ways it could.
func traceOther(args []string, _ []*os.File) (string, []*os.File, error) {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return "", nil, err
	}
	var could []string
	try := func(name string, err error) {
		if err == nil {
			could = append(could, name)
		}
	}
	try("ptrace", unix.PtraceSeize(pid))
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return "", nil, err
	}
	defer unix.Close(pidfd)
	for fd := range 64 {
		_, err := unix.PidfdGetfd(pidfd, fd, 0)
		try("pidfd_getfd "+strconv.Itoa(fd), err)
	}
	for _, name := range []string{"mem", "environ", "maps"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
		try(name, err)
		f.Close()
	}
	for _, name := range []string{"exe", "cwd", "root", "ns/user", "ns/mnt"} {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/%s", pid, name))
		try(name, err)
	}
	for fd := range 64 {
		_, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
		try("fd "+strconv.Itoa(fd), err)
	}
	remote := []unix.RemoteIovec{{Base: 0x400000, Len: 8}}
	local := make([]byte, 8)
	_, err = unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &local[0], Len: 8}}, remote, 0)
	if err != unix.EFAULT {
		try("process_vm_readv", err)
	}
	data, err := json.Marshal(could)
	return string(data), nil, err
}

var shooting atomic.Pointer[chan int]

// shoot sends a signal to every new child of a process, until cease. PARENT
// SIGNAL
func shoot(args []string, _ []*os.File) (string, []*os.File, error) {
	signal, err := strconv.Atoi(args[1])
	if err != nil {
		return "", nil, err
	}
	hits := make(chan int)
	go func() {
		n := 0
		for {
			entries, _ := filepath.Glob("/proc/[0-9]*")
			for _, entry := range entries {
				pid, _ := strconv.Atoi(filepath.Base(entry))
				if pid <= os.Getpid() {
					continue
				}
				stat, _ := os.ReadFile(entry + "/stat")
				_, fields, _ := strings.Cut(string(stat), ") ")
				if parent := strings.Fields(fields + " ? ?")[1]; parent == args[0] && unix.Kill(pid, syscall.Signal(signal)) == nil {
					n++
				}
			}
			select {
			case hits <- n:
				return
			case <-time.After(100 * time.Microsecond):
				// On a single processor that never rests, no grace period of RCU's ends
				// for seconds (7.2), and whoever closes a detached mount or unmounts
				// waits for one: synchronize_rcu_expedited in namespace_unlock.
			}
		}
	}()
	shooting.Store(&hits)
	return "", nil, nil
}

// cease answers with the number of hits.
func cease([]string, []*os.File) (string, []*os.File, error) {
	return strconv.Itoa(<-*shooting.Load()), nil, nil
}

// orphan is what becomes of a broker without the process that helpers are copies
// of: it says so, and can't delegate anything.
func orphan(_ []string, files []*os.File) (string, []*os.File, error) {
	died := make(chan struct{})
	if err := StartHelpers(func() { close(died) }); err != nil {
		return "", nil, err
	}
	fd, err := unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return "", nil, err
	}
	p, err := NewProcess(os.NewFile(uintptr(fd), "pidfd"))
	if err != nil {
		return "", nil, err
	}
	n, err := p.Namespaces()
	if err != nil {
		return "", nil, err
	}
	f, err := Delegate(n, someRights, testtarget.Alice)
	if err != nil {
		return "", nil, err
	}
	if err := unix.Kill(mother.c.pid, unix.SIGKILL); err != nil {
		return "", nil, err
	}
	<-died
	if _, err := Delegate(n, someRights, testtarget.Alice); err == nil {
		return "delegated", nil, nil
	}
	// A helper that is there goes on.
	defer f.Close()
	file, err := f.Take()
	if err != nil {
		return "", nil, err
	}
	return "", nil, file.Close()
}

// delegateForever makes file systems in the target of a pidfd and unmounts
// them, as a broker does, until it is killed.
func delegateForever(_ []string, files []*os.File) (string, []*os.File, error) {
	if err := startHelpers(); err != nil {
		return "", nil, err
	}
	fd, err := unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return "", nil, err
	}
	p, err := NewProcess(os.NewFile(uintptr(fd), "pidfd"))
	if err != nil {
		return "", nil, err
	}
	n, err := p.Namespaces()
	if err != nil {
		return "", nil, err
	}
	for range 4 {
		go func() {
			for {
				f, err := Delegate(n, someRights, testtarget.Alice)
				if err != nil {
					panic(err)
				}
				f.Close()
			}
		}()
	}
	return "", nil, nil
}
