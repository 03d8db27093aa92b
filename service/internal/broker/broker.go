// SPDX-License-Identifier: Apache-2.0

// Package broker holds the use cases. Each goes the same way, in this order:
// peer, profile, target, authority, all of it again, kernel, ledger, answer;
// and where a step fails, what the steps before it did is undone.
package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/journal"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// Authority decides. *authority.Polkit is the only one outside of tests.
type Authority interface {
	Check(ctx context.Context, subject authority.Subject, action authority.Action, details map[string]string, interactive bool) error
}

// Broker is the core that every front calls.
type Broker struct {
	authority Authority
	ledger    *grant.Ledger
	refusals  refusalLog
	watchers  watchers
	monitors  monitors
	history   history
	profiles  atomic.Pointer[profile.Set]
	guard     *guarding
	objects   *catalog.Catalog
}

// New opens the ledger in dir and returns a broker that offers the profiles. The
// caller closes it. The broker takes over the guard, or nil, and says why there is
// none.
func New(a Authority, profiles *profile.Set, dir string, g *guard.Guard, noGuard error) (*Broker, error) {
	b := &Broker{authority: a, guard: newGuarding(g, noGuard), objects: &catalog.Catalog{}}
	var err error
	if b.ledger, err = grant.Open(dir, b.undo, b.ended); err != nil {
		return nil, err
	}
	for _, g := range b.ledger.List(func(*grant.Grant) bool { return true }) {
		b.history.made(*g)
	}
	b.watchGuard()
	b.SetProfiles(profiles)
	return b, nil
}

// SetProfiles offers other profiles from now on, logs what is wrong with them, and
// ends the grants that have more than they give. Those are hidden when it returns,
// and undone afterwards.
func (b *Broker) SetProfiles(profiles *profile.Set) {
	for _, err := range profiles.Errors() {
		slog.Warn("cannot offer a profile", "error", err)
	}
	b.profiles.Store(profiles)
	b.narrow(profiles)
}

// Busy says whether there is something to watch: grants have leases and
// processes, and some objects have users or interfaces.
func (b *Broker) Busy() bool { return b.Grants() > 0 || b.objects.Busy() }

// Grants returns the number of grants there are.
func (b *Broker) Grants() int { return b.ledger.Len() }

// Close stops the broker. The grants stay.
func (b *Broker) Close() {
	b.ledger.Close()
	b.guard.close()
	b.watchers.close()
}

// Caller is who makes a request, and how.
type Caller struct {
	*peer.Peer
	// Interactive says that the user may be asked for a password.
	Interactive bool
	// BusName is the caller's unique name on the bus, "" on the socket.
	BusName string
}

func (c Caller) subject() authority.Subject {
	return authority.Subject{PidFD: c.Process.FD(), UID: c.UID, Account: c.Key(), BusName: c.BusName}
}

// unitName is the caller's unit for the journal, "" if it has none or has gone.
func (c Caller) unitName() string {
	unit, _ := peer.UnitOf(c.Process)
	return unit.Name()
}

// undo stops a grant's tokens and unmounts what was mounted in the target.
func (b *Broker) undo(g grant.Grant, namespaces *kernel.Namespaces) error {
	err := b.unbind(g)
	switch {
	case g.Path == "":
		return err
	case namespaces == nil:
		return errors.Join(err, fmt.Errorf("cannot unmount %s, if other processes have it: the grant's process ended while the daemon was stopped", g.Path))
	}
	return errors.Join(err, kernel.Detach(namespaces, g.Target, g.Mount, g.Path))
}

// ended writes into the journal that a grant is over; who revokes one writes
// that down with a name.
func (b *Broker) ended(g grant.Grant, reason grant.Reason, err error) {
	b.history.end(g.ID)
	b.watchers.tell(func(w Watcher) { w.Ended(g, reason) })
	event := grantEvent(KindEnded, g)
	event.Reason = string(reason)
	b.monitors.tell(event)
	if reason == grant.Revoked {
		return
	}
	attrs := grantAttrs(g)
	if err != nil {
		attrs = append(attrs, slog.String(journal.KeyReason, err.Error()))
	}
	endings[reason].Log(context.Background(), attrs...)
}

var endings = map[grant.Reason]journal.Event{
	grant.Expired:  journal.GrantExpired,
	grant.Exited:   journal.GrantProcessEnded,
	grant.Narrowed: journal.GrantNarrowed,
	grant.Undone:   journal.GrantUndone,
}

func grantAttrs(g grant.Grant) []slog.Attr {
	return []slog.Attr{
		slog.String(journal.KeyGrant, g.ID.String()),
		slog.String(journal.KeyProfile, g.Profile),
		slog.String(journal.KeyTier, g.Tier),
		slog.Uint64(journal.KeyOwner, uint64(g.Owner)),
		slog.Uint64(journal.KeyTarget, uint64(g.Target)),
		slog.Int(journal.KeyProcess, g.PID),
		slog.String(journal.KeyUnit, g.Unit),
	}
}
