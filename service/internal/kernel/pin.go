// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bpfObject is what BPF_OBJ_PIN and BPF_OBJ_GET read of union bpf_attr.
type bpfObject struct {
	path         uint64
	fd, flags    uint32
	directory, _ int32
}

// Flags of OpenPinned, those of BPF_OBJ_GET: what a map's descriptor is good for.
// Neither is both.
const (
	PinReadOnly  = unix.BPF_F_RDONLY
	PinWriteOnly = unix.BPF_F_WRONLY
)

// ErrNotPinned means that nothing is pinned at a path.
var ErrNotPinned = errors.New("it is not pinned any more")

// OpenPinned opens what is pinned at a path in a BPF file system, a map with the
// given flags, a program without. The file is the caller's to close.
func OpenPinned(path string, flags uint32) (*os.File, error) {
	fd, err := pinned(unix.BPF_OBJ_GET, -1, path, 0, flags)
	if err == unix.ENOENT {
		return nil, ErrNotPinned
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open the pin %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), "bpf"), nil
}

// Pin pins a map, a program or a link at a path in a BPF file system.
func Pin(path string, fd int) error {
	if _, err := pinned(unix.BPF_OBJ_PIN, -1, path, fd, 0); err != nil {
		return fmt.Errorf("cannot pin %s: %w", path, err)
	}
	return nil
}

// pathFD is BPF_F_PATH_FD (Linux 6.5).
const pathFD = 1 << 14

// pinned makes one of the two calls; a directory of -1 is the working directory.
func pinned(command, directory int, path string, fd int, flags uint32) (int, error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	attr := bpfObject{path: uint64(uintptr(unsafe.Pointer(name))), fd: uint32(fd), flags: flags}
	if directory >= 0 {
		attr.flags |= pathFD
		attr.directory = int32(directory)
	}
	result, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(name)
	if errno != 0 {
		return -1, errno
	}
	return int(result), nil
}

// mapElement is what BPF_MAP_UPDATE_ELEM reads of union bpf_attr.
type mapElement struct {
	fd, _             uint32
	key, value, flags uint64
}

// noExist is BPF_NOEXIST.
const noExist = 1

// AddSocket puts a packet socket into an XSKMAP, or returns ErrQueueTaken if
// another one is there.
func AddSocket(xskmap *os.File, queue uint32, socket *os.File) error {
	value := uint32(socket.Fd())
	attr := mapElement{
		fd: uint32(xskmap.Fd()), flags: noExist,
		key: uint64(uintptr(unsafe.Pointer(&queue))), value: uint64(uintptr(unsafe.Pointer(&value))),
	}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_UPDATE_ELEM, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(&queue)
	runtime.KeepAlive(&value)
	switch errno {
	case 0:
		return nil
	case unix.E2BIG:
		return ErrQueueUnknown
	case unix.EEXIST:
		return ErrQueueTaken
	}
	return fmt.Errorf("cannot add a packet socket: %w", errno)
}

// Pins is a BPF file system of the initial user namespace that isn't mounted
// anywhere yet. It is root's: whoever it is mounted for can open what is pinned
// there as the pins' modes say, and change nothing, not even as root of a user
// namespace. It goes with Close unless it is attached before.
type Pins struct {
	mount, directory int
	// ID is the mount's number, unique until the next boot (Linux 6.8,
	// STATX_MNT_ID_UNIQUE).
	ID uint64
}

// NewPins makes one, empty. The caller closes it.
func NewPins() (_ *Pins, err error) {
	p := &Pins{mount: -1, directory: -1}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	context, err := unix.Fsopen("bpf", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot open a BPF file system: %w", err)
	}
	defer unix.Close(context)
	if err := unix.FsconfigSetString(context, "mode", "0755"); err != nil {
		return nil, fmt.Errorf("cannot set the mode of a BPF file system: %w", err)
	}
	if err := unix.FsconfigCreate(context); err != nil {
		return nil, fmt.Errorf("cannot create a BPF file system: %w", err)
	}
	p.mount, err = unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot mount a BPF file system: %w", err)
	}
	if p.directory, err = unix.Openat(p.mount, ".", unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("cannot open a BPF file system: %w", err)
	}
	var stat unix.Statx_t
	if err := unix.Statx(p.mount, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID_UNIQUE, &stat); err != nil {
		return nil, fmt.Errorf("cannot stat a BPF file system: %w", err)
	}
	p.ID = stat.Mnt_id
	return p, nil
}

// Close gives the file system up.
func (p *Pins) Close() {
	for _, fd := range []int{p.directory, p.mount} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// Mkdir makes a directory at its root.
func (p *Pins) Mkdir(name string) error {
	err := unix.Mkdirat(p.directory, name, 0o755)
	if err == nil {
		err = unix.Fchmodat(p.directory, name, 0o755, 0) // whatever the umask is
	}
	if err != nil {
		return fmt.Errorf("cannot make the directory %s: %w", name, err)
	}
	return nil
}

// Pin pins a map or a program (Linux 6.5). mode says what others than root may
// open it for: 0444 is to read a map.
func (p *Pins) Pin(path string, file *os.File, mode uint32) error {
	_, err := pinned(unix.BPF_OBJ_PIN, p.directory, path, int(file.Fd()), 0)
	if err == nil {
		err = unix.Fchmodat(p.directory, path, mode, 0)
	}
	if err != nil {
		return fmt.Errorf("cannot pin %s: %w", path, err)
	}
	return nil
}

// Attach mounts the file system, for reading, at a path in the namespaces' mount
// namespace, as Filesystem.Attach does, and once at most.
func (p *Pins) Attach(n *Namespaces, owner uint32, at string) error {
	if err := ValidPath(at); err != nil {
		return err
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(p.mount, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("cannot make a mount read-only: %w", err)
	}
	c, err := newHelper(n, owner)
	if err != nil {
		return err
	}
	defer c.kill()
	if _, _, err = c.do(false, c.enter(owner)...); err != nil {
		return fmt.Errorf("cannot enter the target: %w", err)
	}
	mount, err := c.give(p.mount)
	if err != nil {
		return fmt.Errorf("cannot give a mount to the helper process: %w", err)
	}
	return c.mountAt(mount, "/", at)
}

// IsBPFFilesystem says whether a path lies on a BPF file system.
func IsBPFFilesystem(path string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs) == nil && fs.Type == unix.BPF_FS_MAGIC
}

// RenamePin gives a directory of pins another name, which nothing may have yet.
func RenamePin(from, to string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("cannot publish %s: %w", to, err)
	}
	return nil
}

// CgroupRoot returns where the unified hierarchy of control groups is mounted.
func CgroupRoot() (string, error) {
	for _, path := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var fs unix.Statfs_t
		if unix.Statfs(path, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
			return path, nil
		}
	}
	return "", errors.New("the unified hierarchy of control groups is not mounted")
}

// OnlineCPUs returns the numbers of the processors that run.
func OnlineCPUs() ([]int, error) {
	const file = "/sys/devices/system/cpu/online"
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var cpus []int
	for part := range strings.SplitSeq(strings.TrimSpace(string(data)), ",") {
		first, last, ok := strings.Cut(part, "-")
		if !ok {
			last = first
		}
		from, err := strconv.Atoi(first)
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", file, err)
		}
		to, err := strconv.Atoi(last)
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", file, err)
		}
		for cpu := from; cpu <= to; cpu++ {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// OpenSampling opens an event that happens so many times a second on a processor
// while it isn't idle, whichever process runs (perf_event_open(2); it needs
// CAP_PERFMON). The file is the caller's to close.
func OpenSampling(cpu int, hertz uint64) (*os.File, error) {
	attr := unix.PerfEventAttr{
		Type:   unix.PERF_TYPE_SOFTWARE,
		Size:   uint32(unsafe.Sizeof(unix.PerfEventAttr{})),
		Config: unix.PERF_COUNT_SW_CPU_CLOCK,
		Sample: hertz,
		Bits:   unix.PerfBitFreq,
	}
	fd, err := unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot sample processor %d: %w", cpu, err)
	}
	return os.NewFile(uintptr(fd), "perf"), nil
}
