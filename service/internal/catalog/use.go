// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// maxUsers is how many processes objects are kept for, all objects together, and
// maxUsersOfOwner those of them that one user asked for.
const (
	maxUsers        = 4096
	maxUsersOfOwner = 1024
)

// ErrTooManyUsers means that no object can be kept for one more process.
var ErrTooManyUsers = errors.New("published objects are kept for too many processes already")

// user is a process that an object is kept for, and owner what the limits of the
// user who asked count by.
type user struct {
	key     uint64
	entry   *entry
	process *kernel.Process
	owner   uint32
}

// use keeps an object for a process. The caller has the entry's lock.
func (c *Catalog) use(e *entry, process *kernel.Process, owner uint32) error {
	if e.object.Keep == forever {
		return nil
	}
	for _, u := range e.users {
		if u.process.Inode == process.Inode {
			return nil
		}
	}
	if err := c.watch(e, process, owner); err != nil {
		return err
	}
	// Before anything is handed out, so that the next daemon knows of it.
	if err := c.writeDown(e); err != nil {
		return fmt.Errorf("cannot write down an object's user: %w", err)
	}
	return nil
}

// watch adds a user, and sees to its end.
func (c *Catalog) watch(e *entry, process *kernel.Process, owner uint32) error {
	clone, err := process.Clone()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.users) >= maxUsers || c.owners[owner] >= maxUsersOfOwner || c.closed {
		_ = clone.Close()
		return ErrTooManyUsers
	}
	c.lastUser++
	u := &user{c.lastUser, e, clone, owner}
	if err := c.watcher.Watch(u.key, clone); err != nil {
		_ = clone.Close()
		return err
	}
	c.users[u.key], e.users[u.key] = u, u
	c.owners[owner]++
	e.stopExpiry()
	return nil
}

func (e *entry) stopExpiry() {
	if e.expiry != nil {
		e.expiry.Stop()
		e.expiry = nil
	}
}

// exited is told by the watcher that a user's process has.
func (c *Catalog) exited(key uint64) {
	c.mu.Lock()
	u := c.users[key]
	c.mu.Unlock()
	if u == nil {
		return
	}
	// Loading may take long, and the others' ends shouldn't wait for it.
	go func() {
		e := u.entry
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.users[key] == nil {
			return
		}
		c.drop(u)
		if err := c.writeDown(e); err != nil {
			slog.Warn("cannot write down an object's users", "object", e.name, "error", err)
		}
		c.expire(e)
	}()
}

// drop forgets a user. The caller has the entry's lock.
func (c *Catalog) drop(u *user) {
	c.watcher.Forget(u.process)
	_ = u.process.Close()
	delete(u.entry.users, u.key)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.users, u.key)
	if c.owners[u.owner]--; c.owners[u.owner] <= 0 {
		delete(c.owners, u.owner)
	}
}

// expire sees to the end of an object that nobody uses.
func (c *Catalog) expire(e *entry) {
	if e.object == nil || e.loaded == "" || e.object.Keep == forever || len(e.users) > 0 || e.expiry != nil {
		return
	}
	if e.object.Keep == 0 {
		c.unload(e)
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(e.object.Keep, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.expiry == timer {
			e.expiry = nil
			c.unload(e)
		}
	})
	e.expiry = timer
}

// remember finds the users of an object that was loaded before this daemon was
// started, and begins to watch them.
func (c *Catalog) remember(e *entry) {
	if e.object.Keep == forever {
		return
	}
	data, err := os.ReadFile(c.stateFile(e))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		slog.Warn("cannot read an object's users", "object", e.name, "error", err)
	}
	for line := range strings.Lines(string(data)) {
		var pid int
		var inode uint64
		var owner uint32
		if _, err := fmt.Sscanf(line, "%d %d %d", &pid, &inode, &owner); err != nil {
			continue
		}
		process, err := kernel.FindProcess(pid, inode)
		if err != nil {
			continue
		}
		if err := c.use(e, process, owner); err != nil {
			slog.Warn("cannot keep an object for a process", "object", e.name, "error", err)
		}
		_ = process.Close()
	}
	c.expire(e)
}

// forget ends the watch over all users of an object.
func (c *Catalog) forget(e *entry) {
	for _, u := range e.users {
		c.drop(u)
	}
	e.stopExpiry()
	_ = os.Remove(c.stateFile(e)) // where there is none, there is none
}

func (c *Catalog) stateFile(e *entry) string { return filepath.Join(c.state, e.name) }

// writeDown writes the users of an object into its file, which is there as a
// whole or not at all.
func (c *Catalog) writeDown(e *entry) error {
	var text strings.Builder
	for _, u := range e.users {
		fmt.Fprintf(&text, "%d %d %d\n", u.process.PID, u.process.Inode, u.owner)
	}
	file := c.stateFile(e)
	// No object's name begins so.
	next := filepath.Join(c.state, "."+e.name)
	if err := os.WriteFile(next, []byte(text.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(next, file)
}
