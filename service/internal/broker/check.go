// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
)

// Finding says whether something works here for the caller.
type Finding struct {
	Subject string
	// State is yes, no, or ask (somebody has to authenticate).
	State string
	// Reason is what was found, Remedy what would change it.
	Reason, Remedy string
}

// Check looks at the kernel, the guard, and each profile for the caller,
// without asking anybody for a password.
func (b *Broker) Check(ctx context.Context, c Caller) []Finding {
	findings := []Finding{
		verdict("BPF tokens", kernel.ProbeTokens(), "this kernel has them"),
		b.checkGuard(),
	}
	for _, o := range b.ListProfiles() {
		findings = append(findings, b.checkProfile(ctx, c, o))
	}
	for _, err := range b.profiles.Load().Errors() {
		findings = append(findings, verdict("profile files", err, ""))
	}
	return findings
}

func (b *Broker) checkProfile(ctx context.Context, c Caller, o Offer) Finding {
	subject := "profile " + o.Name
	if o.Refusal != nil {
		return verdict(subject, o.Refusal, "")
	}
	unit, err := peer.UnitOf(c.Process)
	if err != nil {
		return verdict(subject, err, "")
	}
	// As for a target of the caller's own, where the caller is.
	err = b.authority.Check(ctx, c.subject(),
		tokenAction(o.Tier, false), b.tokenDetailsOf(o.Profile, c.UID, unit, unit), false)
	if errors.Is(err, authority.ErrChallenge) {
		return Finding{Subject: subject, State: "ask", Reason: fmt.Sprintf("tier %s, after authentication", o.Tier), Remedy: "the administrator can allow it by a polkit rule"}
	}
	return verdict(subject, err, fmt.Sprintf("tier %s", o.Tier))
}

func verdict(subject string, err error, good string) Finding {
	if err == nil {
		return Finding{Subject: subject, State: "yes", Reason: good}
	}
	e := Refuse(err)
	return Finding{Subject: subject, State: "no", Reason: e.Reason, Remedy: e.Remedy}
}
