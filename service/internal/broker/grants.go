// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"errors"
	"fmt"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// ListGrants returns the caller's own grants, the oldest first.
func (b *Broker) ListGrants(c Caller) []grant.Grant { return b.ledger.List(c.UID) }

// RevokeGrant ends one of the caller's own grants. It returns what that could
// not reach: phrases for people.
func (b *Broker) RevokeGrant(c Caller, id string) (notReached []string, err error) {
	var wanted grant.ID
	if err := wanted.UnmarshalText([]byte(id)); err != nil {
		return nil, Refuse(fmt.Errorf("cannot revoke %.64q: %w", id, grant.ErrNotFound))
	}
	// Whose grant it is must not be learnt by trying.
	g, err := b.ledger.Get(wanted)
	if err == nil && g.Owner != c.UID {
		err = grant.ErrNotFound
	}
	if err != nil {
		return nil, Refuse(fmt.Errorf("cannot revoke %s: %w", id, err))
	}
	err = b.ledger.End(wanted, grant.Revoked)
	if errors.Is(err, grant.ErrNotFound) {
		return nil, Refuse(fmt.Errorf("cannot revoke %s: %w", id, err))
	}
	if err != nil && !errors.Is(err, kernel.ErrProcessGone) {
		notReached = append(notReached, err.Error())
	}
	if !guarded {
		notReached = append(notReached,
			"tokens that were already created, until the last process and program that hold them end",
			"programs, maps and links that were already made")
		if g.Path == "" {
			notReached = append(notReached, "the BPF file system that was handed out, until its last user ends")
		}
	}
	return notReached, nil
}
