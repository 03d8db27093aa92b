// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// InNetwork calls what in the network namespace with a number, the inode of
// /proc/PID/ns/net. ErrProcessGone means that no process is in it any more,
// which it ends with unless something else holds it. It needs CAP_SYS_PTRACE,
// and CAP_SYS_ADMIN in the initial user namespace.
func InNetwork(number uint32, what func() error) error {
	target, err := findNetwork(number)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	runtime.LockOSThread()
	own, err := openNetwork("thread-self", 0)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer unix.Close(own)
	if err := unix.Setns(target, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("cannot enter network namespace %d: %w", number, err)
	}
	err = what()
	if back := unix.Setns(own, unix.CLONE_NEWNET); back != nil {
		// The thread stays locked, and ends with its goroutine.
		return fmt.Errorf("cannot leave network namespace %d: %w", number, back)
	}
	runtime.UnlockOSThread()
	return err
}

// openNetwork opens the network namespace of a process, if it is the one with
// the number, or any if that is 0.
func openNetwork(process string, number uint32) (int, error) {
	fd, err := unix.Open("/proc/"+process+"/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("cannot open the network namespace of process %s: %w", process, err)
	}
	var stat unix.Stat_t
	if err = unix.Fstat(fd, &stat); err == nil && number != 0 && stat.Ino != uint64(number) {
		err = ErrProcessGone
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func findNetwork(number uint32) (int, error) {
	pids, err := processes()
	if err != nil {
		return -1, err
	}
	for _, pid := range pids {
		if fd, err := openNetwork(strconv.Itoa(pid), number); err == nil {
			return fd, nil
		}
	}
	return -1, ErrProcessGone
}
