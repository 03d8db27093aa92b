// SPDX-License-Identifier: Apache-2.0

// Package grant keeps the ledger: what was granted, to whom, until when. The
// ledger is in memory and, a file a grant, in a directory that outlives the
// daemon but not the machine's uptime.
package grant

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// ID names a grant. It is random and never used again.
type ID uint64

// String returns the ID as 16 hexadecimal digits.
func (id ID) String() string { return fmt.Sprintf("%016x", uint64(id)) }

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 16, 64)
	if err != nil || len(text) != 16 || ID(n).String() != string(text) {
		return fmt.Errorf("cannot take %.32q for a grant's id", text)
	}
	*id = ID(n)
	return nil
}

// Grant is one live right.
type Grant struct {
	ID      ID     `json:"id"`
	Profile string `json:"profile"`
	Tier    string `json:"tier"`
	// Owner is the uid of the peer that asked for it.
	Owner uint32 `json:"owner"`
	// Target is the uid that owns the target's user namespace.
	Target uint32 `json:"target"`
	// Unit is the systemd unit of the process, "" if it has none.
	Unit string `json:"unit,omitempty"`
	// PID and Inode are those of the process that it was made for
	// (kernel.Process); it ends with that process.
	PID   int    `json:"process"`
	Inode uint64 `json:"inode"`
	// Path is where the BPF file system is mounted in the target, and Mount
	// the mount's number; "" and 0 if the peer got it detached.
	Path  string `json:"path,omitempty"`
	Mount uint64 `json:"mount,omitempty"`
	// Created and Expires are for people, in microseconds since 1970; Expires
	// is 0 without a lease. The lease itself runs to Deadline.
	Created  int64           `json:"created"`
	Expires  int64           `json:"expires,omitempty"`
	Deadline kernel.BootTime `json:"deadline,omitempty"`
	// Capabilities are those that the profile's programs and maps need.
	Capabilities []string `json:"capabilities"`
	// NotEnforced is what the profile limits and nothing holds.
	NotEnforced []string `json:"notEnforced"`
}

// SetLease gives a grant its times, from now. No lease is 0.
func (g *Grant) SetLease(lease time.Duration) {
	now := time.Now()
	g.Created = now.UnixMicro()
	g.Expires, g.Deadline = 0, 0
	if lease > 0 {
		g.Expires = now.Add(lease).UnixMicro()
		g.Deadline = kernel.Now() + kernel.BootTime(lease)
	}
}

// Reason is why a grant ended.
type Reason string

// The ways a grant ends.
const (
	Expired Reason = "expired"
	Revoked Reason = "revoked"
	Exited  Reason = "exited"
	// Undone is a grant whose making was cut short.
	Undone Reason = "undone"
)

var (
	// ErrNotFound means that no live grant has the id.
	ErrNotFound = errors.New("no such grant")
	// ErrQuotaUser and ErrQuotaTotal mean that there are too many grants.
	ErrQuotaUser  = fmt.Errorf("cannot have more than %d grants at once", MaxPerUser)
	ErrQuotaTotal = fmt.Errorf("cannot have more than %d grants of all users at once", MaxTotal)
)

// The limits on live grants.
const (
	MaxPerUser = 2048
	MaxTotal   = 16384
)

// Undo takes back what a grant gave, as far as that can be done. The process
// may have exited.
type Undo func(Grant, *kernel.Process) error

// Ended hears of each grant that ended, and of what could not be undone.
type Ended func(Grant, Reason, error)

// Ledger holds the live grants.
type Ledger struct {
	dir     string
	undo    Undo
	ended   Ended
	watcher *kernel.Watcher
	ending  sync.WaitGroup

	mu      sync.Mutex
	entries map[ID]*entry
	perUser map[uint32]int
	alarm   kernel.BootTime
}

type entry struct {
	Grant
	process *kernel.Process
	live    bool // neither pending nor ending
}

// pending is what the name of a row has behind its id until the grant is
// complete.
const pending = ".pending"

// renewing is what the name of a row has behind its id while it is written anew;
// until that is done, the old one counts.
const renewing = ".renewing"

// Open reads the ledger in dir, an existing directory that only root can write
// to. Grants whose process has exited are ended before it returns. Those whose
// lease is over, and those that were never completed, are undone afterwards: a
// user's file system may be slow, and nobody must be able to hold up the start.
func Open(dir string, undo Undo, ended Ended) (*Ledger, error) {
	l := &Ledger{dir: dir, undo: undo, ended: ended, entries: map[ID]*entry{}, perUser: map[uint32]int{}}
	var err error
	if l.watcher, err = kernel.NewWatcher(l.exited, l.expire); err != nil {
		return nil, err
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		l.watcher.Close()
		return nil, fmt.Errorf("cannot read the ledger: %w", err)
	}
	for _, file := range files {
		if strings.HasSuffix(file.Name(), renewing) {
			_ = os.Remove(filepath.Join(dir, file.Name()))
			continue
		}
		if err := l.load(file.Name()); err != nil {
			slog.Error("dropping a row of the ledger", "row", file.Name(), "error", err)
			_ = os.Remove(filepath.Join(dir, file.Name()))
		}
	}
	l.expire()
	return l, nil
}

// load takes up one row. An error means that nobody can make sense of it.
func (l *Ledger) load(name string) error {
	data, err := os.ReadFile(filepath.Join(l.dir, name))
	if err != nil {
		return err
	}
	e := &entry{}
	if err := json.Unmarshal(data, &e.Grant); err != nil {
		return err
	}
	if strings.TrimSuffix(name, pending) != e.ID.String() {
		return errors.New("the row has another grant's name")
	}
	e.process, err = kernel.FindProcess(e.PID, e.Inode)
	if err != nil && !errors.Is(err, kernel.ErrProcessGone) {
		return err
	}
	l.mu.Lock()
	l.entries[e.ID] = e
	l.perUser[e.Owner]++
	l.mu.Unlock()
	switch {
	case e.process == nil:
		l.finish(e, Exited)
	case strings.HasSuffix(name, pending):
		l.ending.Go(func() { _ = l.finish(e, Undone) })
	default:
		if err := l.enliven(e); err != nil {
			l.ending.Go(func() { _ = l.finish(e, Undone) })
		}
	}
	return nil
}

// Room returns ErrQuotaUser or ErrQuotaTotal if the user could not have one
// more grant now.
func (l *Ledger) Room(owner uint32) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.room(owner)
}

func (l *Ledger) room(owner uint32) error {
	switch {
	case l.perUser[owner] >= MaxPerUser:
		return ErrQuotaUser
	case len(l.entries) >= MaxTotal:
		return ErrQuotaTotal
	}
	return nil
}

// Begin writes a grant down before it is handed out, and gives it its ID. If
// the daemon dies before Commit, the next one undoes the grant. The ledger
// takes a hold of its own on the process.
func (l *Ledger) Begin(g *Grant, process *kernel.Process) error {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	g.ID = ID(binary.NativeEndian.Uint64(id[:]))
	data, err := json.Marshal(g)
	if err != nil {
		return err
	}
	own, err := process.Clone()
	if err != nil {
		return err
	}
	l.mu.Lock()
	if err := l.room(g.Owner); err != nil {
		l.mu.Unlock()
		_ = own.Close()
		return err
	}
	e := &entry{Grant: *g, process: own}
	l.entries[g.ID] = e
	l.perUser[g.Owner]++
	l.mu.Unlock()
	if err := os.WriteFile(l.row(g.ID)+pending, data, 0o600); err != nil {
		l.drop(e)
		return fmt.Errorf("cannot write the grant down: %w", err)
	}
	return nil
}

// Commit makes a grant live that Begin wrote down.
func (l *Ledger) Commit(id ID) error {
	if err := os.Rename(l.row(id)+pending, l.row(id)); err != nil {
		return fmt.Errorf("cannot write the grant down: %w", err)
	}
	l.mu.Lock()
	e := l.entries[id]
	l.mu.Unlock()
	return l.enliven(e)
}

// Abort undoes a grant that Begin wrote down and Commit did not make live.
func (l *Ledger) Abort(id ID) {
	l.mu.Lock()
	e := l.entries[id]
	l.mu.Unlock()
	_ = l.undo(e.Grant, e.process)
	l.drop(e)
}

// enliven lets a grant be seen and end.
func (l *Ledger) enliven(e *entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.watcher.Watch(uint64(e.ID), e.process); err != nil {
		return err
	}
	e.live = true
	return l.setAlarm(e.Deadline)
}

// setAlarm sees to it that there is an alarm at a deadline or before.
func (l *Ledger) setAlarm(deadline kernel.BootTime) error {
	if deadline == 0 || l.alarm != 0 && l.alarm <= deadline {
		return nil
	}
	l.alarm = deadline
	return l.watcher.SetAlarm(l.alarm)
}

// Get returns a live grant, or ErrNotFound.
func (l *Ledger) Get(id ID) (Grant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.entries[id]; e != nil && e.live {
		return e.Grant, nil
	}
	return Grant{}, ErrNotFound
}

// List returns the live grants that want says yes to, the oldest first.
func (l *Ledger) List(want func(Grant) bool) []Grant {
	l.mu.Lock()
	grants := []Grant{}
	for _, e := range l.entries {
		if e.live && want(e.Grant) {
			grants = append(grants, e.Grant)
		}
	}
	l.mu.Unlock()
	slices.SortFunc(grants, func(a, b Grant) int {
		if a.Created != b.Created {
			return int(a.Created - b.Created)
		}
		return strings.Compare(a.ID.String(), b.ID.String())
	})
	return grants
}

// Len returns the number of grants, live or about to be.
func (l *Ledger) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.entries)
}

// Renew gives a live grant a new lease, from now, and returns it as it is then,
// or ErrNotFound.
func (l *Ledger) Renew(id ID, lease time.Duration) (Grant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entries[id]
	if e == nil || !e.live {
		return Grant{}, ErrNotFound
	}
	renewed := e.Grant
	renewed.SetLease(lease)
	renewed.Created = e.Created
	data, err := json.Marshal(renewed)
	if err != nil {
		return Grant{}, err
	}
	if err := os.WriteFile(l.row(id)+renewing, data, 0o600); err != nil {
		return Grant{}, fmt.Errorf("cannot write the grant down: %w", err)
	}
	if err := os.Rename(l.row(id)+renewing, l.row(id)); err != nil {
		return Grant{}, fmt.Errorf("cannot write the grant down: %w", err)
	}
	e.Grant = renewed
	return renewed, l.setAlarm(e.Deadline)
}

// End ends a live grant: what it gave is taken back, then its row goes. It
// returns ErrNotFound, or what could not be taken back.
func (l *Ledger) End(id ID, reason Reason) error {
	e := l.claim(id)
	if e == nil {
		return ErrNotFound
	}
	return l.finish(e, reason)
}

// claim hides a live grant, so that it ends only once.
func (l *Ledger) claim(id ID) *entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entries[id]
	if e == nil || !e.live {
		return nil
	}
	e.live = false
	return e
}

func (l *Ledger) finish(e *entry, reason Reason) error {
	var err error
	if reason != Exited {
		err = l.undo(e.Grant, e.process)
	}
	l.drop(e)
	l.ended(e.Grant, reason, err)
	return err
}

// drop forgets a grant and deletes its row.
func (l *Ledger) drop(e *entry) {
	for _, name := range []string{l.row(e.ID), l.row(e.ID) + pending, l.row(e.ID) + renewing} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			slog.Error("cannot delete a row of the ledger", "row", name, "error", err)
		}
	}
	l.mu.Lock()
	delete(l.entries, e.ID)
	if l.perUser[e.Owner]--; l.perUser[e.Owner] == 0 {
		delete(l.perUser, e.Owner)
	}
	l.mu.Unlock()
	if e.process != nil {
		l.watcher.Forget(e.process)
		_ = e.process.Close()
	}
}

func (l *Ledger) row(id ID) string { return filepath.Join(l.dir, id.String()) }

// exited is called by the watcher, which it must not hold up.
func (l *Ledger) exited(key uint64) {
	if e := l.claim(ID(key)); e != nil {
		l.ending.Go(func() { _ = l.finish(e, Exited) })
	}
}

// expire ends the grants whose lease is over and sets the alarm for the next.
func (l *Ledger) expire() {
	now := kernel.Now()
	over := map[uint32][]*entry{}
	l.mu.Lock()
	l.alarm = 0
	for _, e := range l.entries {
		switch {
		case !e.live || e.Deadline == 0:
		case e.Deadline <= now:
			e.live = false
			over[e.Owner] = append(over[e.Owner], e)
		case l.alarm == 0 || e.Deadline < l.alarm:
			l.alarm = e.Deadline
		}
	}
	if err := l.watcher.SetAlarm(l.alarm); err != nil {
		slog.Error("cannot wait for the end of leases", "error", err)
	}
	l.mu.Unlock()
	// Apart from each other, because a user's file system may be slow; and one
	// after the other, because a user may have many.
	for _, entries := range over {
		l.ending.Go(func() {
			for _, e := range entries {
				_ = l.finish(e, Expired)
			}
		})
	}
}

// Close stops watching, after the ends that are under way. The grants stay
// written down for the next Open.
func (l *Ledger) Close() {
	l.watcher.Close()
	l.ending.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if e.process != nil {
			_ = e.process.Close()
		}
	}
}
