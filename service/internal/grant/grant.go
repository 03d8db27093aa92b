// SPDX-License-Identifier: Apache-2.0

// Package grant keeps the ledger: what was granted, to whom, until when. The
// ledger is in memory and, a file a grant, in a directory that outlives the
// daemon but not the machine's uptime.
package grant

import (
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
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
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// ID names a grant. It is random and never used again.
type ID uint64

// String returns the ID as 16 hexadecimal digits.
func (id ID) String() string {
	return hex.EncodeToString(binary.BigEndian.AppendUint64(nil, uint64(id)))
}

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
	// Namespace is the number of the target's user namespace.
	Namespace uint64 `json:"namespace"`
	// Path is where the BPF file system is mounted in the target, and Mount
	// the mount's number; "" and 0 if the peer got it detached.
	Path  string `json:"path,omitempty"`
	Mount uint64 `json:"mount,omitempty"`
	// Created and Expires are for people, in microseconds since 1970; Expires
	// is 0 without a lease. The lease itself runs to Deadline.
	Created  int64           `json:"created"`
	Expires  int64           `json:"expires,omitempty"`
	Deadline kernel.BootTime `json:"deadline,omitempty"`
	// Began is when the lease began.
	Began kernel.BootTime `json:"began"`
	// Rights are what the profile gave. They aren't changed, and many grants
	// may share them.
	Rights *profile.Rights `json:"rights"`
	// Capabilities are those that the profile's programs and maps need.
	Capabilities []string `json:"capabilities"`
	// Guarded says that the guard enforces it.
	Guarded bool `json:"guarded,omitempty"`
	// NotEnforced is what the profile limits and nothing holds.
	NotEnforced []string `json:"notEnforced"`
}

// SetLease gives a grant its times, from now. No lease is 0.
func (g *Grant) SetLease(lease time.Duration) {
	now := time.Now()
	g.Created = now.UnixMicro()
	g.Began = kernel.Now()
	g.Expires, g.Deadline = 0, 0
	if lease > 0 {
		g.Expires = now.Add(lease).UnixMicro()
		g.Deadline = g.Began + kernel.BootTime(lease)
	}
}

// Lease is the length of the lease, 0 without one.
func (g *Grant) Lease() time.Duration {
	if g.Deadline == 0 {
		return 0
	}
	return time.Duration(g.Deadline - g.Began)
}

// Reason is why a grant ended.
type Reason string

// The ways a grant ends.
const (
	Expired Reason = "expired"
	Revoked Reason = "revoked"
	Exited  Reason = "exited"
	// Narrowed is a grant that had more than its profile gives now.
	Narrowed Reason = "narrowed"
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

// Undo takes back what a grant gave, as far as that can be done. The namespaces
// are those that it was made in, and nil if the grant has no path or if they
// can't be found again.
type Undo func(Grant, *kernel.Namespaces) error

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
	ordered []*entry // the oldest first
	perUser map[uint32]int
	alarm   kernel.BootTime
	// doomed are the grants that wait for their end, by their owners. Each owner
	// here has a goroutine.
	doomed map[uint32][]doomed
	closed bool
}

// entry is a grant and what is held of its target: the process, as long as there
// is one, and the namespaces if something is mounted there.
type entry struct {
	*Grant     // which isn't changed, but replaced
	process    *kernel.Process
	namespaces *kernel.Namespaces
	live       bool // neither pending nor ending
}

func (e *entry) close() {
	if e.process != nil {
		_ = e.process.Close()
	}
	if e.namespaces != nil {
		e.namespaces.Close()
	}
}

type doomed struct {
	*entry
	reason Reason
}

// pending is what the name of a row has behind its id until the grant is
// complete.
const pending = ".pending"

// renewing is what the name of a row has behind its id while it is written anew;
// until that is done, the old one counts.
const renewing = ".renewing"

// Open reads the ledger in dir, an existing directory that only root can write
// to. Grants whose process has exited, whose lease is over, or that were never
// completed are hidden when it returns, and ended afterwards: a user's file system
// may be slow, and nobody must be able to hold up the start.
func Open(dir string, undo Undo, ended Ended) (*Ledger, error) {
	l := &Ledger{dir: dir, undo: undo, ended: ended, entries: map[ID]*entry{}, perUser: map[uint32]int{}, doomed: map[uint32][]doomed{}}
	var err error
	if l.watcher, err = kernel.NewWatcher(l.exited, l.expire); err != nil {
		return nil, err
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		l.watcher.Close()
		return nil, fmt.Errorf("cannot read the ledger: %w", err)
	}
	rights := map[string]*profile.Rights{}
	for _, file := range files {
		if strings.HasSuffix(file.Name(), renewing) {
			_ = os.Remove(filepath.Join(dir, file.Name()))
			continue
		}
		if err := l.load(file.Name(), rights); err != nil {
			slog.Error("dropping a row of the ledger", "row", file.Name(), "error", err)
			_ = os.Remove(filepath.Join(dir, file.Name()))
		}
	}
	l.expire()
	return l, nil
}

// load takes up one row. Rights that another row had already are shared with it.
// An error means that nobody can make sense of the row.
func (l *Ledger) load(name string, rights map[string]*profile.Rights) error {
	data, err := os.ReadFile(filepath.Join(l.dir, name))
	if err != nil {
		return err
	}
	e := &entry{Grant: new(Grant)}
	var raw struct {
		Rights json.RawMessage `json:"rights"`
	}
	if err := errors.Join(json.Unmarshal(data, e.Grant), json.Unmarshal(data, &raw)); err != nil {
		return err
	}
	if strings.TrimSuffix(name, pending) != e.ID.String() {
		return errors.New("the row has another grant's name")
	}
	if e.Rights == nil {
		return errors.New("the row has no rights")
	}
	if same := rights[string(raw.Rights)]; same != nil {
		e.Rights = same
	}
	rights[string(raw.Rights)] = e.Rights
	if err := e.findTarget(); err != nil && !errors.Is(err, kernel.ErrProcessGone) {
		e.close()
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(e)
	switch {
	case e.process == nil:
		l.doom(e, Exited)
	case strings.HasSuffix(name, pending) || l.enliven(e) != nil:
		l.doom(e, Undone)
	}
	return nil
}

// add needs mu.
func (l *Ledger) add(e *entry) {
	l.entries[e.ID] = e
	l.perUser[e.Owner]++
	place, _ := slices.BinarySearchFunc(l.ordered, e, older)
	l.ordered = slices.Insert(l.ordered, place, e)
}

func older(a, b *entry) int {
	return cmp.Or(cmp.Compare(a.Created, b.Created), cmp.Compare(a.ID, b.ID))
}

// findTarget takes hold of the target again after a restart. A process that has
// exited meanwhile leads nowhere any more, even if its namespaces live on.
func (e *entry) findTarget() (err error) {
	if e.process, err = kernel.FindProcess(e.PID, e.Inode); err != nil || e.Path == "" {
		return err
	}
	e.namespaces, err = e.process.Namespaces()
	return err
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
// takes a hold of its own on the process and, for a grant with a path, on the
// namespaces, so that what is mounted can be found when the process has exited.
func (l *Ledger) Begin(g *Grant, process *kernel.Process, namespaces *kernel.Namespaces) error {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	g.ID = ID(binary.NativeEndian.Uint64(id[:]))
	data, err := json.Marshal(g)
	if err != nil {
		return err
	}
	e := &entry{Grant: new(*g)}
	e.process, err = process.Clone()
	if err == nil && g.Path != "" {
		e.namespaces, err = namespaces.Clone()
	}
	l.mu.Lock()
	if err == nil {
		err = l.room(g.Owner)
	}
	if err != nil {
		l.mu.Unlock()
		e.close()
		return err
	}
	l.add(e)
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
	defer l.mu.Unlock()
	return l.enliven(l.entries[id])
}

// Abort undoes a grant that Begin wrote down and Commit did not make live.
func (l *Ledger) Abort(id ID) {
	l.mu.Lock()
	e := l.entries[id]
	l.mu.Unlock()
	_ = l.undo(*e.Grant, e.namespaces)
	l.drop(e)
}

// enliven lets a grant be seen and end. It needs mu.
func (l *Ledger) enliven(e *entry) error {
	if err := l.watcher.Watch(uint64(e.ID), e.process); err != nil {
		return err
	}
	if err := l.setAlarm(e.Deadline); err != nil {
		return err
	}
	e.live = true
	return nil
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
		return *e.Grant, nil
	}
	return Grant{}, ErrNotFound
}

// List returns the live grants that want says yes to, the oldest first. Nobody
// changes them.
func (l *Ledger) List(want func(*Grant) bool) []*Grant {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []*Grant
	for _, e := range l.ordered {
		if e.live && want(e.Grant) {
			found = append(found, e.Grant)
		}
	}
	return found
}

// Has says whether there is a grant, live or about to be or to end.
func (l *Ledger) Has(id ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.entries[id] != nil
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
	return l.change(id, func(g *Grant) {
		created := g.Created
		g.SetLease(lease)
		g.Created = created
	})
}

// Shorten gives a live grant, which has a longer lease or none, this one from
// when its lease began. It returns it as it is then, or ErrNotFound. If that lease
// is over already, the grant ends at once.
func (l *Ledger) Shorten(id ID, lease time.Duration) (Grant, error) {
	return l.change(id, func(g *Grant) {
		g.Deadline = g.Began + kernel.BootTime(lease)
		g.Expires = time.Now().Add(time.Duration(g.Deadline - kernel.Now())).UnixMicro()
	})
}

// change changes a live grant in its row and then in memory.
func (l *Ledger) change(id ID, how func(*Grant)) (Grant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entries[id]
	if e == nil || !e.live {
		return Grant{}, ErrNotFound
	}
	changed := *e.Grant
	how(&changed)
	data, err := json.Marshal(changed)
	if err != nil {
		return Grant{}, err
	}
	if err := os.WriteFile(l.row(id)+renewing, data, 0o600); err != nil {
		return Grant{}, fmt.Errorf("cannot write the grant down: %w", err)
	}
	if err := os.Rename(l.row(id)+renewing, l.row(id)); err != nil {
		return Grant{}, fmt.Errorf("cannot write the grant down: %w", err)
	}
	e.Grant = &changed
	return changed, l.setAlarm(e.Deadline)
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

// EndLater ends a grant in the background, if it is live. Nobody sees it any more
// when EndLater returns.
func (l *Ledger) EndLater(id ID, reason Reason) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.entries[id]; e != nil && e.live {
		l.doom(e, reason)
	}
}

// doom hides a grant and lets it end in the background: apart from those of other
// owners, because a user's file system may be slow; and after those of its own,
// because a user may have many. It needs mu.
func (l *Ledger) doom(e *entry, reason Reason) {
	e.live = false
	before, busy := l.doomed[e.Owner]
	l.doomed[e.Owner] = append(before, doomed{e, reason})
	if !busy && !l.closed {
		l.ending.Go(func() { l.execute(e.Owner) })
	}
}

// execute ends a user's grants that wait for it. When the ledger is closed, those
// that are left stay written down.
func (l *Ledger) execute(owner uint32) {
	for {
		l.mu.Lock()
		queue := l.doomed[owner]
		if len(queue) == 0 || l.closed {
			delete(l.doomed, owner)
			l.mu.Unlock()
			return
		}
		l.doomed[owner] = queue[1:]
		l.mu.Unlock()
		_ = l.finish(queue[0].entry, queue[0].reason)
	}
}

func (l *Ledger) finish(e *entry, reason Reason) error {
	err := l.undo(*e.Grant, e.namespaces)
	l.drop(e)
	l.ended(*e.Grant, reason, err)
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
	if place, ok := slices.BinarySearchFunc(l.ordered, e, older); ok {
		l.ordered = slices.Delete(l.ordered, place, place+1)
	}
	if l.perUser[e.Owner]--; l.perUser[e.Owner] == 0 {
		delete(l.perUser, e.Owner)
	}
	l.mu.Unlock()
	if e.process != nil {
		l.watcher.Forget(e.process)
	}
	e.close()
}

func (l *Ledger) row(id ID) string { return filepath.Join(l.dir, id.String()) }

// exited is called by the watcher, which it must not hold up.
func (l *Ledger) exited(key uint64) { l.EndLater(ID(key), Exited) }

// expire ends the grants whose lease is over and sets the alarm for the next.
func (l *Ledger) expire() {
	now := kernel.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.alarm = 0
	for _, e := range l.entries {
		switch {
		case !e.live || e.Deadline == 0:
		case e.Deadline <= now:
			l.doom(e, Expired)
		case l.alarm == 0 || e.Deadline < l.alarm:
			l.alarm = e.Deadline
		}
	}
	if err := l.watcher.SetAlarm(l.alarm); err != nil {
		slog.Error("cannot wait for the end of leases", "error", err)
	}
}

// Close stops watching, after the ends that are under way. The grants, and those
// that still wait for their end, stay written down for the next Open.
func (l *Ledger) Close() {
	l.watcher.Close()
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.ending.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		e.close()
	}
}
