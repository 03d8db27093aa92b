// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/journal"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// narrow compares each live grant with its profile as it is now. One that has
// more, or that the guard has lost, ends, and a lease that is longer than the profile's is cut. Where the
// profile's files have an error nobody knows what the administrator wants: a
// mistake in a file should end nobody's work, so these grants stay as they are,
// can't be renewed, and the journal says so.
func (b *Broker) narrow(profiles *profile.Set) {
	kept := map[string]int{}
	lost := b.lostByGuard()
	for _, g := range b.ledger.List(func(*grant.Grant) bool { return true }) {
		p, err := profiles.Get(g.Profile)
		switch {
		case lost(*g):
			slog.Warn("the guard has lost a grant: somebody has unloaded it", journal.KeyGrant, g.ID.String())
			b.ledger.EndLater(g.ID, grant.Narrowed)
		case errors.Is(err, profile.ErrNotFound) || err == nil && exceeds(*g, p):
			b.ledger.EndLater(g.ID, grant.Narrowed)
		case err != nil:
			kept[g.Profile]++
		case p.Lease != 0 && (g.Deadline == 0 || g.Lease() > p.Lease):
			b.shorten(*g, p)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(kept)) {
		_, err := profiles.Get(name)
		journal.GrantsKept.Log(context.Background(),
			slog.String(journal.KeyProfile, name),
			slog.Int(journal.KeyGrants, kept[name]),
			slog.String(journal.KeyReason, err.Error()))
	}
}

func (b *Broker) shorten(g grant.Grant, p *profile.Profile) {
	shortened, err := b.ledger.Shorten(g.ID, p.Lease)
	switch {
	case err == nil:
		b.rebind(shortened, p)
		b.leased(shortened)
	case !errors.Is(err, grant.ErrNotFound): // it has ended
		slog.Error("cannot shorten a lease", journal.KeyGrant, g.ID.String(), "error", err)
	}
}

// exceeds says whether a grant has more than its profile gives now. A grant of
// whose profile something isn't held has more than one that requires the guard.
func exceeds(g grant.Grant, p *profile.Profile) bool {
	return !g.Rights.Within(p.Rights()) || p.NeedsGuard() && len(g.NotEnforced) > 0
}

// stillIn returns an error if a grant exceeds its profile, which has to be asked
// for anew then.
func stillIn(g grant.Grant, p *profile.Profile) error {
	if !exceeds(g, p) {
		return nil
	}
	return &Error{
		Name:   "GrantNarrowed",
		Reason: fmt.Sprintf("cannot renew %s: it has more than %s gives now", g.ID, p.Name),
		Layer:  "profile",
		Remedy: "ask for a new grant",
	}
}
