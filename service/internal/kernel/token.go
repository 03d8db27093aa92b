// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Delegation is what a BPF file system delegates: bit n of a mask stands for
// the n-th value of the kernel's enum (bpf_cmd, bpf_map_type, bpf_prog_type,
// bpf_attach_type).
type Delegation struct {
	Commands, Maps, Programs, Attachments uint64
}

// Errors of a path inside a target.
var (
	// ErrPathInvalid: not absolute, not normalized, or too long.
	ErrPathInvalid      = errors.New("not an absolute, normalized path")
	ErrPathNotFound     = errors.New("no such directory in the target")
	ErrPathIsLink       = errors.New("a symbolic link is in the path")
	ErrPathNotDirectory = errors.New("not a directory in the target")
	ErrPathDenied       = errors.New("the target's root may not mount there")
)

// ErrTokenMismatch means that the kernel delegates something else than was
// asked for, without having said so.
var ErrTokenMismatch = errors.New("the kernel delegates something else than was asked for")

// ErrOwnerNotMapped means that the target has no id for its own owner, and no
// root either, so that there is nobody whose the file system's root directory
// could be.
var ErrOwnerNotMapped = errors.New("the user namespace maps neither the uid that owns it nor a root")

// Filesystem is a BPF file system that was made in a target and isn't mounted
// anywhere yet. It goes with Close unless it is taken or attached before.
type Filesystem struct {
	c     *child
	mount uintptr // the child's number of the detached mount
	// ID is the mount's number, unique until the next boot (Linux 6.8,
	// STATX_MNT_ID_UNIQUE).
	ID uint64
}

// tokenCreateAttr is what BPF_TOKEN_CREATE reads of union bpf_attr.
type tokenCreateAttr struct{ flags, bpffs uint32 }

const bpfTokenCreate = 36 // enum bpf_cmd, Linux 6.9

// Delegate makes a BPF file system that belongs to the namespaces' user
// namespace and delegates d there (Linux 6.9). Its root directory belongs to
// owner, the uid that owns the user namespace, and to nobody else, so that
// tools can pin what they load. Where the user namespace has no id for owner, as
// in a container with ids of its own, it belongs to the root there.
//
// Before that a token is made of it in the target, and what the token allows
// is compared with d: ErrTokenMismatch. Needs CAP_SYS_ADMIN, CAP_SETUID and
// CAP_SETGID in the initial user namespace. The caller closes the file system.
func Delegate(n *Namespaces, d Delegation, owner uint32) (_ *Filesystem, err error) {
	c, err := newHelper(n, owner)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.kill()
		}
	}()
	context, err := c.openFilesystem(owner)
	if err != nil {
		return nil, err
	}
	created := c.lastResult()
	if err = configure(context, d); err == nil {
		err = c.create(context, created, owner)
	}
	_ = unix.Close(context)
	if err != nil {
		return nil, err
	}
	mount, err := c.checkToken(created, d)
	if err != nil {
		return nil, err
	}
	return &Filesystem{c: c, mount: mount, ID: c.statx.Mnt_id}, nil
}

// Close ends the helper process that holds the file system.
func (f *Filesystem) Close() { f.c.kill() }

// Take returns the detached mount, an O_PATH descriptor and the caller's to
// close.
func (f *Filesystem) Take() (*os.File, error) {
	fd, _, err := f.c.do(true, call{number: unix.SYS_DUP, args: [6]uintptr{f.mount}})
	if err != nil {
		return nil, fmt.Errorf("cannot take the mount from the target: %w", err)
	}
	return os.NewFile(uintptr(fd), "bpf"), nil
}

// Attach mounts the file system at a path below the directory root in the
// namespaces' mount namespace. Both are opened with their owner's rights, and no
// link is followed.
func (f *Filesystem) Attach(root, at string) error {
	if err := errors.Join(ValidPath(root), ValidPath(at)); err != nil {
		return err
	}
	return f.c.mountAt(f.mount, root, at)
}

// mountAt mounts the child's detached mount at a path below root.
func (c *child) mountAt(mount uintptr, root, at string) error {
	if err := c.joinGroup(); err != nil {
		return err
	}
	nothing := uintptr(unsafe.Pointer(&c.empty))
	_, failed, err := c.do(false, append(c.openPath(root, at),
		call{number: unix.SYS_MOVE_MOUNT, args: [6]uintptr{mount, nothing, 0, nothing, unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH}, from: 2, to: 2},
	)...)
	if err != nil && failed < 2 {
		return pathError(err)
	}
	if err != nil {
		return fmt.Errorf("cannot mount at %s in the target: %w", at, err)
	}
	return nil
}

// ValidPath returns ErrPathInvalid unless Attach could take the path.
func ValidPath(at string) error {
	if len(at) >= unix.PathMax || !path.IsAbs(at) || path.Clean(at) != at || strings.ContainsRune(at, 0) {
		return ErrPathInvalid
	}
	return nil
}

// ErrNotMounted means that something else, or nothing, is mounted at a path.
var ErrNotMounted = errors.New("it is not mounted there any more")

// Detach unmounts the BPF file system with the given number from a path in
// the namespaces' mount namespace, or returns ErrNotMounted.
func Detach(n *Namespaces, owner uint32, id uint64, at string) error {
	c, err := newHelper(n, owner)
	if err != nil {
		return err
	}
	defer c.kill()
	if _, _, err = c.do(false, c.enter(owner)...); err != nil {
		return fmt.Errorf("cannot enter the target: %w", err)
	}
	if err := c.joinGroup(); err != nil {
		return err
	}
	if _, failed, err := c.do(false, append(c.openPath("/", at), c.statFrom(2))...); err != nil {
		if failed < 2 {
			err = pathError(err)
		}
		return fmt.Errorf("cannot unmount %s in the target: %w", at, err)
	}
	if c.statx.Mnt_id != id {
		return ErrNotMounted
	}
	_, _, err = c.do(false,
		call{number: unix.SYS_FCHDIR, args: [6]uintptr{c.calls[1].result}},
		call{number: unix.SYS_UMOUNT2, args: [6]uintptr{c.setName("."), unix.MNT_DETACH}},
	)
	if err != nil {
		return fmt.Errorf("cannot unmount %s in the target: %w", at, err)
	}
	return nil
}

// nobody is the gid of the child on its way, where no group should help it.
const nobody = 65534

// enter is the batch that brings the child into the namespaces, as their
// owner: who owns a user namespace may enter it and then has every capability
// there (user_namespaces(7)), and needs none outside. Nobody may trace the
// child on its way; each change of credentials makes a process dumpable again
// where fs.suid_dumpable says so, and clears its parent-death signal.
func (c *child) enter(owner uint32) []call {
	undumpable := call{number: unix.SYS_PRCTL, args: [6]uintptr{unix.PR_SET_DUMPABLE, 0}}
	uid := uintptr(owner)
	return []call{
		{number: unix.SYS_SETGROUPS},
		{number: unix.SYS_SETRESGID, args: [6]uintptr{nobody, nobody, nobody}},
		{number: unix.SYS_SETRESUID, args: [6]uintptr{uid, uid, uid}},
		undumpable,
		{number: unix.SYS_SETNS, args: [6]uintptr{uintptr(c.user), unix.CLONE_NEWUSER}},
		undumpable,
		deathSignal(unix.SIGKILL),
		{number: unix.SYS_SETNS, args: [6]uintptr{uintptr(c.mount), unix.CLONE_NEWNS}},
	}
}

// joinGroup gives the child, in the target, the gid of the target's root: a FUSE
// of the target's, as containers have for their root directory, answers nobody
// whose ids it can't name (EOVERFLOW, fs/fuse/dev.c). The target's root could do
// the same. Where there is no such gid, the child stays what it is.
func (c *child) joinGroup() error {
	_, failed, err := c.do(false,
		call{number: unix.SYS_SETRESGID},
		call{number: unix.SYS_PRCTL, args: [6]uintptr{unix.PR_SET_DUMPABLE, 0}},
		deathSignal(unix.SIGKILL),
	)
	if err != nil && (failed > 0 || err != unix.EINVAL) {
		return fmt.Errorf("cannot join the target's group: %w", err)
	}
	return nil
}

// openFilesystem enters the namespaces and opens a file system context there,
// which fixes the user namespace of the superblock. The context is the
// caller's to close; the child keeps its own.
func (c *child) openFilesystem(owner uint32) (int, error) {
	entry := c.enter(owner)
	fd, failed, err := c.do(true, append(entry,
		call{number: unix.SYS_FSOPEN, args: [6]uintptr{c.setName("bpf"), unix.FSOPEN_CLOEXEC}})...)
	switch {
	case err == nil:
		return fd, nil
	case failed == len(entry) && (err == unix.ENODEV || err == unix.ENOSYS):
		return -1, fmt.Errorf("cannot open a BPF file system: %w", ErrNotSupported)
	case failed == len(entry):
		return -1, fmt.Errorf("cannot open a BPF file system in the target: %w", err)
	}
	return -1, fmt.Errorf("cannot enter the target: %w", err)
}

// configure sets the options that are the same everywhere. Masks go as one
// number each: in a list, a number overwrites what stands before it
// (kernel/bpf/inode.c).
func configure(context int, d Delegation) error {
	for _, option := range []struct{ key, value string }{
		{"delegate_cmds", mask(d.Commands)},
		{"delegate_maps", mask(d.Maps)},
		{"delegate_progs", mask(d.Programs)},
		{"delegate_attachs", mask(d.Attachments)},
		{"mode", "0700"},
	} {
		if err := unix.FsconfigSetString(context, option.key, option.value); err != nil {
			return fmt.Errorf("cannot set the BPF file system's option %s: %w", option.key, err)
		}
	}
	return nil
}

// create gives the file system its owner and creates the superblock. inChild is
// the child's number of the context.
func (c *child) create(context int, inChild uintptr, owner uint32) error {
	err := unix.FsconfigSetString(context, "uid", strconv.FormatUint(uint64(owner), 10))
	if err == unix.EINVAL {
		// In there the numbers mean the root of the target. The group is for the
		// child's capabilities, which don't count for one that has no number.
		clear(c.root[:])
		c.root[0] = '0'
		set := call{number: unix.SYS_FSCONFIG, args: [6]uintptr{
			inChild, unix.FSCONFIG_SET_STRING, c.setName("uid"), uintptr(unsafe.Pointer(&c.root))}}
		clear(c.path[:])
		copy(c.path[:], "gid")
		group := set
		group.args[2] = uintptr(unsafe.Pointer(&c.path))
		_, _, err = c.do(false, set, group)
	}
	if err == unix.EINVAL {
		return ErrOwnerNotMapped
	}
	if err != nil {
		return fmt.Errorf("cannot set the BPF file system's option uid: %w", err)
	}
	if err := unix.FsconfigCreate(context); err != nil {
		return fmt.Errorf("cannot create a BPF file system: %w", err)
	}
	return nil
}

func mask(m uint64) string { return fmt.Sprintf("%#x", m) }

// checkToken mounts the child's file system context, makes a token of it and
// compares what it allows. It returns the mount's descriptor in the child.
func (c *child) checkToken(context uintptr, d Delegation) (mount uintptr, err error) {
	c.attr = tokenCreateAttr{}
	fd, failed, err := c.do(true,
		call{number: unix.SYS_FSMOUNT, args: [6]uintptr{context, unix.FSMOUNT_CLOEXEC}},
		call{number: unix.SYS_OPENAT, args: [6]uintptr{0, c.setName("."), unix.O_DIRECTORY | unix.O_CLOEXEC},
			from: 1, to: 0, store: unsafe.Offsetof(c.page.attr) + unsafe.Offsetof(c.page.attr.bpffs)},
		c.statFrom(1),
		call{number: unix.SYS_BPF, args: [6]uintptr{bpfTokenCreate, uintptr(unsafe.Pointer(&c.attr)), unsafe.Sizeof(c.attr)}},
	)
	switch {
	case err == nil:
	case failed == 3 && err == unix.EINVAL:
		return 0, fmt.Errorf("cannot create a BPF token: %w", ErrNotSupported)
	case failed == 3:
		return 0, fmt.Errorf("cannot create a BPF token in the target: %w", err)
	default:
		return 0, fmt.Errorf("cannot mount a BPF file system in the target: %w", err)
	}
	mount = c.calls[0].result
	got, err := TokenDelegation(fd)
	_ = unix.Close(fd)
	if err != nil {
		return 0, err
	}
	if !agrees(got.Commands, d.Commands) || !agrees(got.Maps, d.Maps) || !agrees(got.Programs, d.Programs) || !agrees(got.Attachments, d.Attachments) {
		return 0, ErrTokenMismatch
	}
	return mount, nil
}

// agrees says whether a mask that TokenDelegation read can be the one that was
// asked for. The kernel doesn't tell a mask with every type that it knows from
// one with all bits; the first kernel with tokens knew more than 32 of each.
func agrees(got, asked uint64) bool {
	const oldest = 1<<33 - 1
	return got == asked || got == allTypes && asked&oldest == oldest
}

// openPath opens a directory, and with the second call a path below it, which
// are valid for ValidPath.
func (c *child) openPath(root, at string) []call {
	clear(c.root[:])
	copy(c.root[:], root)
	clear(c.path[:])
	copy(c.path[:], cmp.Or(at[1:], "."))
	c.how = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	how := uintptr(unsafe.Pointer(&c.how))
	return []call{
		{number: unix.SYS_OPENAT2, args: [6]uintptr{^uintptr(0), uintptr(unsafe.Pointer(&c.root)), how, unsafe.Sizeof(c.how)}},
		{number: unix.SYS_OPENAT2, args: [6]uintptr{0, uintptr(unsafe.Pointer(&c.path)), how, unsafe.Sizeof(c.how)}, from: 1, to: 0},
	}
}

// statFrom asks for the unique number of the mount that the result of the
// batch's call from-1 lies on.
func (c *child) statFrom(from uintptr) call {
	return call{number: unix.SYS_STATX, from: from, to: 0, args: [6]uintptr{
		0, uintptr(unsafe.Pointer(&c.empty)), unix.AT_EMPTY_PATH | unix.AT_STATX_DONT_SYNC,
		unix.STATX_MNT_ID_UNIQUE, uintptr(unsafe.Pointer(&c.statx))}}
}

func (c *child) setName(name string) uintptr {
	clear(c.name[:])
	copy(c.name[:], name)
	return uintptr(unsafe.Pointer(&c.name))
}

// lastResult is what the last call of the last batch returned.
func (c *child) lastResult() uintptr { return c.calls[c.count-1].result }

func pathError(err error) error {
	switch err {
	case unix.ENOENT:
		return ErrPathNotFound
	case unix.ENAMETOOLONG:
		return ErrPathInvalid
	case unix.ELOOP:
		return ErrPathIsLink
	case unix.ENOTDIR:
		return ErrPathNotDirectory
	case unix.EACCES, unix.EPERM, unix.EOVERFLOW:
		// EOVERFLOW: FUSE in a user namespace that has no id for the helper's.
		return ErrPathDenied
	}
	return err
}

// CreateToken makes a BPF token of a file system that belongs to the caller's
// own user namespace, where the caller needs CAP_BPF (Linux 6.9). mount may be
// an O_PATH descriptor of a detached mount; it stays the caller's, and so does
// the token.
func CreateToken(mount *os.File) (*os.File, error) {
	directory, err := unix.Openat(int(mount.Fd()), ".", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the BPF file system: %w", err)
	}
	defer unix.Close(directory)
	attr := tokenCreateAttr{bpffs: uint32(directory)}
	fd, err := createToken(&attr)
	if err != nil {
		return nil, fmt.Errorf("cannot create a BPF token: %w", err)
	}
	return os.NewFile(uintptr(fd), "token"), nil
}

func createToken(attr *tokenCreateAttr) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, bpfTokenCreate, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// allTypes is what a mask with every type that the kernel knows is read as.
const allTypes = ^uint64(0)

// TokenDelegation returns what a token allows, as fdinfo shows it on every
// kernel that has tokens (kernel/bpf/token.c).
func TokenDelegation(token int) (Delegation, error) {
	var d Delegation
	texts, err := fdinfo(token, "allowed_cmds:", "allowed_maps:", "allowed_progs:", "allowed_attachs:")
	if err != nil {
		return d, fmt.Errorf("cannot read a token's rights: %w", err)
	}
	for i, mask := range []*uint64{&d.Commands, &d.Maps, &d.Programs, &d.Attachments} {
		if texts[i] == "any" {
			*mask = allTypes
		} else if *mask, err = strconv.ParseUint(texts[i], 0, 64); err != nil {
			return d, fmt.Errorf("cannot read a token's rights: %w", err)
		}
	}
	return d, nil
}
