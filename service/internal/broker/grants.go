// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// ListGrants returns the caller's own grants, or those of all users, the oldest
// first.
func (b *Broker) ListGrants(ctx context.Context, c Caller, all bool) ([]*grant.Grant, error) {
	if all {
		if err := b.authorizeManaging(ctx, c); err != nil {
			return nil, Refuse(fmt.Errorf("cannot list the grants of all users: %w", err))
		}
	}
	return b.ledger.List(func(g *grant.Grant) bool { return all || g.Owner == c.UID }), nil
}

// GetGrant returns one grant.
func (b *Broker) GetGrant(ctx context.Context, c Caller, id string) (grant.Grant, error) {
	g, err := b.manageable(ctx, c, id)
	if err != nil {
		return g, Refuse(fmt.Errorf("cannot get %.64q: %w", id, err))
	}
	return g, nil
}

// RenewGrant gives a grant the lease that its profile has now, from now. The
// authority is asked as for a new grant. What the grant allows stays as it is, so
// that the profile has to give as much now.
func (b *Broker) RenewGrant(ctx context.Context, c Caller, id string) (grant.Grant, error) {
	g, err := b.renew(ctx, c, id)
	if errors.Is(err, grant.ErrNotFound) {
		err = fmt.Errorf("cannot renew %.64q: %w", id, err)
	}
	if err != nil {
		return g, Refuse(err)
	}
	b.leased(g)
	return g, nil
}

func (b *Broker) renew(ctx context.Context, c Caller, id string) (grant.Grant, error) {
	g, err := b.manageable(ctx, c, id)
	if err != nil {
		return g, err
	}
	process, err := kernel.FindProcess(g.PID, g.Inode)
	if err != nil {
		return g, err
	}
	defer process.Close()
	a, err := b.authorizeToken(ctx, c, g.Profile, process, func(p *profile.Profile) error { return stillIn(g, p) })
	if err != nil {
		return g, err
	}
	defer a.target.Close()
	if g, err = b.ledger.Renew(g.ID, a.profile.Lease); err != nil {
		return g, err
	}
	b.rebind(g, a.profile)
	return g, nil
}

// manageable returns a live grant that is the caller's own, or anybody's if the
// authority allows that. Whether there is somebody else's grant with that id
// can't be learnt by trying: who may not manage it gets grant.ErrNotFound, and
// is asked for the same password, either way.
func (b *Broker) manageable(ctx context.Context, c Caller, id string) (grant.Grant, error) {
	var wanted grant.ID
	if err := wanted.UnmarshalText([]byte(id)); err != nil {
		return grant.Grant{}, grant.ErrNotFound
	}
	g, err := b.ledger.Get(wanted)
	if err == nil && g.Owner == c.UID {
		return g, nil
	}
	if denied := b.authorizeManaging(ctx, c); denied != nil {
		return grant.Grant{}, grant.ErrNotFound
	}
	// It may have ended while somebody looked for a password.
	return b.ledger.Get(wanted)
}

func (b *Broker) authorizeManaging(ctx context.Context, c Caller) error {
	return b.authority.Check(ctx, c.subject(), authority.ManageGrants, nil, c.Interactive)
}
