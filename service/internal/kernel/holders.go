// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The lines of /proc/PID/fdinfo that tell a BPF object's id.
const (
	LinkID    = "link_id"
	ProgramID = "prog_id" // also of a link, whose program it is
)

// Holders finds the processes, but the broker's own, that have descriptors of BPF
// objects: by the ids of what is LinkID or ProgramID. It looks at every
// descriptor that there is, until the context ends. Needs CAP_SYS_PTRACE, and a
// /proc with all processes.
func Holders(ctx context.Context, what string, ids map[uint32]bool) (map[uint32][]int, error) {
	pids, err := processes()
	if err != nil {
		return nil, err
	}
	found := map[uint32][]int{}
	for _, pid := range pids {
		if ctx.Err() != nil {
			return found, fmt.Errorf("cannot find the holders: %w", ctx.Err())
		}
		if pid == os.Getpid() {
			continue
		}
		for id := range heldBy(pid, what, ids) {
			found[id] = append(found[id], pid)
		}
	}
	return found, nil
}

// heldBy returns which of the objects a process has, and its threads that don't
// share their descriptors with it.
func heldBy(pid int, what string, ids map[uint32]bool) map[uint32]bool {
	held := map[uint32]bool{}
	tasks := fmt.Sprintf("/proc/%d/task/", pid)
	threads, _ := os.ReadDir(tasks) // none, if it has gone
	for _, thread := range threads {
		dir := tasks + thread.Name() + "/fdinfo/"
		descriptors, _ := os.ReadDir(dir)
		for _, d := range descriptors {
			text, _ := os.ReadFile(dir + d.Name())
			for line := range strings.Lines(string(text)) {
				name, value, _ := strings.Cut(line, ":")
				id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32)
				if name == what && err == nil && ids[uint32(id)] {
					held[uint32(id)] = true
				}
			}
		}
	}
	return held
}

// KillHolders ends the processes of a user that have descriptors of a BPF object,
// as Holders finds them, and returns how many it has ended. The others stay: who
// gives a service of root's a descriptor must not have it ended. Needs CAP_KILL, too.
func KillHolders(ctx context.Context, what string, id, uid uint32) (killed int, err error) {
	ids := map[uint32]bool{id: true}
	found, err := Holders(ctx, what, ids)
	for _, pid := range found[id] {
		fd, oneErr := unix.PidfdOpen(pid, 0)
		if oneErr != nil {
			continue // it has gone
		}
		// The pid may have come round.
		if belongsTo(fd, pid, uid) && heldBy(pid, what, ids)[id] {
			if oneErr = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); oneErr == nil {
				killed++
			} else if oneErr != unix.ESRCH {
				err = errors.Join(err, fmt.Errorf("cannot end process %d: %w", pid, oneErr))
			}
		}
		_ = unix.Close(fd)
	}
	return killed, err
}

// belongsTo says whether a user may end a process: it has no uid but the user's
// (kill(2)), or is in a user namespace of the user's.
func belongsTo(pidfd, pid int, uid uint32) bool {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)) // none, if it has gone
	for line := range strings.Lines(string(status)) {
		if ids, ok := strings.CutPrefix(line, "Uid:"); ok {
			other := func(id string) bool { return id != strconv.FormatUint(uint64(uid), 10) }
			if !slices.ContainsFunc(strings.Fields(ids), other) {
				return true
			}
		}
	}
	namespace, err := unix.IoctlRetInt(pidfd, pidfdGetUserNamespace)
	if err != nil {
		return false
	}
	own, err := above(namespace, func(fd int, _ identity) bool {
		owner, err := unix.IoctlGetUint32(fd, unix.NS_GET_OWNER_UID)
		return err == nil && owner == uid
	})
	if err != nil || own == nil {
		return false
	}
	own.Close()
	return true
}
