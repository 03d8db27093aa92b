// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"fmt"

	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// Offer is a profile as it would be granted now.
type Offer struct {
	*profile.Profile
	Tier profile.Tier
	// NotEnforced is what the profile limits and nothing would hold.
	NotEnforced []string
	// Refusal is nil if the profile can be granted.
	Refusal *Error
}

// ListProfiles returns the profiles by name.
func (b *Broker) ListProfiles() []Offer {
	var offers []Offer
	for _, p := range b.profiles.Load().All() {
		offers = append(offers, b.offer(p))
	}
	return offers
}

// DescribeProfile returns one profile.
func (b *Broker) DescribeProfile(name string) (Offer, error) {
	p, err := b.profiles.Load().Get(name)
	if err != nil {
		return Offer{}, Refuse(fmt.Errorf("cannot describe %.64q: %w", name, err))
	}
	return b.offer(p), nil
}

func (b *Broker) offer(p *profile.Profile) Offer {
	o := Offer{Profile: p, Tier: p.Tier(b.guarded()), NotEnforced: b.notEnforced(p)}
	if _, err := b.offered(p.Name); err != nil {
		o.Refusal = Refuse(err)
	}
	return o
}
