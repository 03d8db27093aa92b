// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/journal"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// guarding is what the broker has of the guard.
type guarding struct {
	*guard.Guard       // nil where there is none
	why          error // why there is none

	stop    context.CancelFunc
	working sync.WaitGroup
	sweep   chan struct{}    // a grant has ended
	stirred chan struct{}    // there was an event
	slips   chan guard.Event // that are to be undone

	mu sync.Mutex
	// roots are the root directories of the grants' file systems. A file system
	// stays as long as its grant, so that what is pinned there can be removed.
	roots map[grant.ID]*os.File
}

// newGuarding takes the guard over, or says why there is none.
func newGuarding(g *guard.Guard, why error) *guarding {
	return &guarding{
		Guard: g, why: why,
		sweep: make(chan struct{}, 1), stirred: make(chan struct{}, 1), slips: make(chan guard.Event, 256),
		roots: map[grant.ID]*os.File{},
	}
}

// watchGuard begins to hear of what the guard does, and to tell it of what has
// ended.
func (b *Broker) watchGuard() {
	ctx, stop := context.WithCancel(context.Background())
	b.guard.stop = stop
	if !b.guarded() {
		return
	}
	b.guard.working.Go(func() { b.sweepGuard(ctx) })
	b.guard.working.Go(func() { b.countLost(ctx) })
	b.guard.working.Go(func() { b.findSlips(ctx) })
	b.guard.working.Go(func() { b.undoSlips(ctx) })
	b.guard.working.Go(func() {
		if err := b.guard.Events(ctx, b.guardSays); err != nil {
			slog.Error("the guard's events are not in the journal", "error", err)
		}
	})
}

// close gives the guard up, which goes on enforcing.
func (g *guarding) close() {
	g.stop()
	g.working.Wait()
	if g.Guard != nil {
		g.Guard.Close()
	}
	for id := range g.roots {
		_ = g.takeRoot(id).Close()
	}
}

// takeRoot returns a grant's root directory, which is the caller's to close, or
// nil: that of a grant that an earlier daemon made can't be found again.
func (g *guarding) takeRoot(id grant.ID) *os.File {
	g.mu.Lock()
	defer g.mu.Unlock()
	root := g.roots[id]
	delete(g.roots, id)
	return root
}

// guarded says whether the guard enforces grants.
func (b *Broker) guarded() bool { return b.guard.Guard != nil }

// guardRemedy says what would change that there is no guard, as the beginning of a
// sentence.
func (b *Broker) guardRemedy() string {
	var u *guard.Unavailable
	if errors.As(b.guard.why, &u) {
		return u.Remedy + ", or "
	}
	return ""
}

func (b *Broker) checkGuard() Finding {
	if b.guarded() {
		return Finding{Subject: "guard", State: "yes", Reason: "it holds grants to their profiles"}
	}
	return Finding{
		Subject: "guard", State: "no", Reason: b.guard.why.Error(),
		Remedy: b.guardRemedy() + "have the administrator accept single profiles without it (Guard=optional)",
	}
}

// bind has the guard hold a file system's tokens to the profile, before anybody
// has the file system.
func (b *Broker) bind(g grant.Grant, p *profile.Profile, f *kernel.Filesystem) error {
	if !g.Guarded {
		return nil
	}
	root, err := f.Take()
	if err != nil {
		return err
	}
	b.guard.mu.Lock()
	b.guard.roots[g.ID] = root
	b.guard.mu.Unlock()
	return b.guard.Bind(uint64(g.ID), root, guard.Limits{Profile: p, Deadline: g.Deadline, Owner: g.Target})
}

// rebind has the guard hold a grant to what its profile says now.
func (b *Broker) rebind(g grant.Grant, p *profile.Profile) {
	if !g.Guarded || !b.guarded() {
		return
	}
	err := b.guard.Renew(uint64(g.ID), guard.Limits{Profile: p, Deadline: g.Deadline, Owner: g.Target})
	if err != nil && !errors.Is(err, guard.ErrUnknown) { // it has ended meanwhile
		slog.Error("cannot tell the guard of a lease", journal.KeyGrant, g.ID.String(), "error", err)
	}
}

// unpinTime is how long what is pinned is removed.
const unpinTime = 2 * time.Second

// unbind has the guard refuse what a grant's tokens are used for from now on, and
// removes what is pinned in its file system, where the guard then lets nobody pin
// anything.
func (b *Broker) unbind(g grant.Grant) error {
	if !g.Guarded || !b.guarded() {
		return nil
	}
	err := b.guard.Revoke(uint64(g.ID))
	if errors.Is(err, guard.ErrUnknown) {
		err = nil
	}
	if root := b.guard.takeRoot(g.ID); root != nil {
		ctx, stop := context.WithTimeout(context.Background(), unpinTime)
		err = errors.Join(err, kernel.RemovePins(ctx, root))
		stop()
		_ = root.Close()
	}
	select {
	case b.guard.sweep <- struct{}{}:
	default:
	}
	return err
}

// lostByGuard returns a function that says whether the guard has lost a grant that
// it held: somebody may have taken the guard away since it was made.
func (b *Broker) lostByGuard() func(grant.Grant) bool {
	held := map[uint64]bool{}
	if b.guarded() {
		known, err := b.guard.Grants()
		if err != nil {
			slog.Error("cannot ask the guard for its grants", "error", err)
			return func(grant.Grant) bool { return false }
		}
		for _, g := range known {
			held[g.ID] = !g.Revoked
		}
	}
	return func(g grant.Grant) bool { return g.Guarded && !held[uint64(g.ID)] }
}

// sweepTime is how long the guard's grants of which something is left are left
// alone: the kernel frees programs and tokens some time after their last holder.
const sweepTime = 10 * time.Second

// sweepGuard detaches what the grants that have ended left attached, and has the
// guard forget them once nothing of them is left. It revokes those that the ledger
// doesn't have.
func (b *Broker) sweepGuard(ctx context.Context) {
	for {
		left, err := b.sweepOnce(ctx)
		if err != nil {
			slog.Error("cannot clear the guard of ended grants", "error", err)
		}
		var again <-chan time.Time
		if left > 0 {
			again = time.After(sweepTime)
		}
		select {
		case <-ctx.Done():
			return
		case <-b.guard.sweep:
		case <-again:
		}
	}
}

func (b *Broker) sweepOnce(ctx context.Context) (left int, err error) {
	known, err := b.guard.Grants()
	if err != nil {
		return 0, err
	}
	var ended []uint64
	for _, g := range known {
		if g.Revoked || !b.ledger.Has(grant.ID(g.ID)) {
			ended = append(ended, g.ID)
		}
	}
	if len(ended) == 0 {
		return 0, nil
	}
	ids, err := b.guard.Release(ended...)
	if err != nil || len(ids) == 0 {
		return len(ids), err
	}
	// Nothing is attached by them any more. What was about to be, when they ended,
	// is found the next time.
	ctx, stop := context.WithTimeout(ctx, detachTime)
	defer stop()
	_, err = b.guard.Detach(ctx, ids...)
	return len(ids), err
}

// guardSays tells of what the guard saw: the journal, those who monitor, and later
// those who ask why.
func (b *Broker) guardSays(g guard.Event) {
	select {
	case b.guard.stirred <- struct{}{}:
	default:
	}
	e := b.guardEvent(g)
	b.monitors.tell(e)
	attrs := []slog.Attr{
		slog.String(journal.KeyGrant, e.Grant.String()),
		slog.Uint64(journal.KeyTarget, uint64(g.Owner)),
		slog.Int(journal.KeyProcess, e.PID),
		slog.Uint64(journal.KeyUID, uint64(e.UID)),
		slog.String(journal.KeyCommand, e.Command),
	}
	if e.Program != "" {
		attrs = append(attrs, slog.String(journal.KeyProgram, e.Program))
	}
	if e.Kind == KindLoaded {
		journal.ProgramLoaded.Log(context.Background(), append(attrs, slog.String(journal.KeyTag, e.Tag))...)
		return
	}
	if g.Reason == guard.Slip || g.Reason == guard.SlippedLink {
		b.undoLater(g)
	}
	b.history.deny(b.guardDenial(g, e))
	journal.GuardDenied.Log(context.Background(), append(attrs, slog.String(journal.KeyReason, e.Reason), slog.String(journal.KeySetting, e.Setting))...)
}

// lostTime is how long after an event the guard is asked for those that it lost.
const lostTime = time.Second

// countLost tells of events that the guard had no room for: of those before the
// daemon began, and then after others, for that happens to none but those who cause
// many.
func (b *Broker) countLost(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(lostTime):
		}
		lost, err := b.guard.Lost()
		if err != nil {
			slog.Error("cannot count the events that the guard lost", "error", err)
		}
		for owner, n := range lost {
			journal.EventsLost.Log(ctx, slog.Uint64(journal.KeyTarget, uint64(owner)), slog.Int(journal.KeyLost, n))
			b.monitors.tell(Event{Time: time.Now(), Kind: KindLost, Owner: owner, Lost: n, Reason: "the guard saw too many of this user's"})
		}
		select {
		case <-ctx.Done():
			return
		case <-b.guard.stirred:
		}
	}
}

// slipTime is how often the guard looks for links that slipped past it.
const slipTime = 3 * time.Second

// findSlips has the guard look for them while there are grants, and tells of each
// once.
func (b *Broker) findSlips(ctx context.Context) {
	var told map[uint64]bool
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(slipTime):
		}
		if b.Grants() == 0 {
			continue
		}
		slips, err := b.guard.Slips()
		if err != nil {
			slog.Error("cannot look for what grants attached beyond their reach", "error", err)
			continue
		}
		still := map[uint64]bool{}
		for _, slip := range slips {
			still[slip.Detail] = true
			if told[slip.Detail] {
				b.undoLater(slip)
			} else {
				b.guardSays(slip)
			}
		}
		told = still
	}
}

func (b *Broker) undoLater(slip guard.Event) {
	select {
	case b.guard.slips <- slip:
	default: // of a link, the next look finds it again
		slog.Error("cannot undo what a grant attached: too much of that is going on", journal.KeyGrant, grant.ID(slip.Grant).String())
	}
}

// undoSlips detaches what slipped past the guard, one by one.
func (b *Broker) undoSlips(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-b.guard.slips:
			if err := undoSlip(ctx, e); err != nil {
				slog.Error("cannot undo what a grant attached", journal.KeyGrant, grant.ID(e.Grant).String(), "error", err)
			}
		}
	}
}

// undoSlip detaches what an event is about. If it is a link that can't be
// detached, those of its holders end that are the grant's user's: that the guard
// killed the process doesn't end those who share its descriptors.
func undoSlip(ctx context.Context, e guard.Event) error {
	ctx, stop := context.WithTimeout(ctx, detachTime)
	defer stop()
	err := e.Undo(ctx)
	if err == nil || e.Reason != guard.SlippedLink {
		return err
	}
	killed, killErr := kernel.KillHolders(ctx, kernel.LinkID, uint32(e.Detail), e.Owner)
	if killed > 0 {
		err = nil
	}
	return errors.Join(err, killErr)
}
