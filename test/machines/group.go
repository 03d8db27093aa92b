// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// groupRoot is where a machine's thread sees the hierarchy of cgroup v2.
const groupRoot = "/sys/fs/cgroup"

// groupPrefix begins the names of the control groups made here.
const groupPrefix = "bpfbroker-"

// systemdRuns reports whether the host's init is systemd, as sd_booted(3) does.
func systemdRuns() bool {
	info, err := os.Lstat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// mountGroups mounts the hierarchy of cgroup v2 at groupRoot, in the calling thread's mount namespace.
func mountGroups() error {
	for _, dir := range []string{groupRoot, filepath.Join(groupRoot, "unified")} {
		var info unix.Statfs_t
		if unix.Statfs(dir, &info) != nil || info.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		// A new mount would change the mount options of the host's.
		if err := unix.Mount(dir, groupRoot, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cannot mount %s at %s: %w", dir, groupRoot, err)
		}
		return nil
	}
	if err := unix.Mount("cgroup2", groupRoot, "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("cannot mount cgroup2 at %s: %w", groupRoot, err)
	}
	return nil
}

// group is a machine's control group.
type group struct {
	dir *os.File // also holds the lock that says that the group is in use
}

// makeGroup makes a control group beside those of other machines, for the calling thread's view of groupRoot, and removes
// those that killed processes have left. The lock in cache keeps others from taking a new group for a left one.
func makeGroup(ctx context.Context, cache, name string) (*group, error) {
	lock, err := lockFile(ctx, filepath.Join(cache, "groups.lock"))
	if err != nil {
		return nil, err
	}
	defer lock.Close()

	own, err := ownGroup()
	if err != nil {
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(own, groupPrefix+"*"))
	if err != nil {
		return nil, err
	}
	for _, path := range left {
		if g, err := openGroup(path, unix.LOCK_EX); err == nil {
			g.remove()
		}
	}
	path := filepath.Join(own, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("cannot make a control group: %w", err)
	}
	return openGroup(path, unix.LOCK_SH)
}

// ownGroup returns the directory of the process's own control group.
func ownGroup() (string, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	path, err := unifiedGroup(data)
	return filepath.Join(groupRoot, path), err
}

// unifiedGroup returns the path of the cgroup v2 group from the content of a /proc/PID/cgroup.
func unifiedGroup(data []byte) (string, error) {
	for line := range strings.Lines(string(data)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(path, "\n"), nil
		}
	}
	return "", errors.New("the process is in no group of cgroup v2")
}

// openGroup opens the group at path and locks it in the way that is given, or fails if that's impossible at once.
func openGroup(path string, how int) (*group, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), how|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("cannot lock %s: %w", path, err)
	}
	return &group{dir}, nil
}

// remove kills what is left in the group and removes it, with the groups below. It does its best: what it leaves, the next
// machine's makeGroup removes.
func (g *group) remove() {
	defer g.dir.Close()
	// cgroup.kill: Linux 5.14.
	_ = os.WriteFile(filepath.Join(g.dir.Name(), "cgroup.kill"), []byte("1"), 0)
	for range 100 {
		var groups []string
		_ = filepath.WalkDir(g.dir.Name(), func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				groups = append(groups, path)
			}
			return nil
		})
		var err error
		for i := len(groups) - 1; i >= 0; i-- {
			err = errors.Join(err, unix.Rmdir(groups[i]))
		}
		if err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond) // killed processes leave their group a moment later
	}
}
