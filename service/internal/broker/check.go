// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
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

// Check looks at the kernel, the guard, and each profile and object for the caller,
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
	for _, o := range b.ListObjects() {
		findings = append(findings, b.checkObject(ctx, c, o))
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

// checkObject looks for a part of an object that the caller can open.
func (b *Broker) checkObject(ctx context.Context, c Caller, o Object) Finding {
	subject := "object " + o.Name
	if o.Refusal != nil {
		return verdict(subject, o.Refusal, "")
	}
	d, err := b.objects.Describe(o.Name)
	if err != nil {
		return verdict(subject, refuseObject(err), "")
	}
	var parts []part
	for _, m := range d.Maps {
		for _, access := range m.Access {
			parts = append(parts, part{d.Name, m.Name, "", access})
		}
	}
	for _, p := range d.Programs {
		parts = append(parts, part{d.Name, "", p.Name, catalog.ReadWrite})
	}
	if len(parts) == 0 {
		return verdict(subject, nil, fmt.Sprintf("%s; it publishes nothing", d.State))
	}
	var ask *part
	for _, p := range parts {
		err = b.authorizeObject(ctx, c, p, false)
		switch {
		case err == nil:
			return verdict(subject, nil, fmt.Sprintf("%s; you can open %s (%s)", d.State, p.mapName+p.program, p.access))
		case errors.Is(err, authority.ErrChallenge):
			ask = &p
		case !refused(err):
			return verdict(subject, err, "")
		}
	}
	if ask != nil {
		return Finding{Subject: subject, State: "ask", Reason: fmt.Sprintf("%s; you can open %s (%s) after authentication", d.State, ask.mapName+ask.program, ask.access),
			Remedy: "the administrator can allow it by a polkit rule"}
	}
	return verdict(subject, err, "")
}

func verdict(subject string, err error, good string) Finding {
	if err == nil {
		return Finding{Subject: subject, State: "yes", Reason: good}
	}
	e := Refuse(err)
	return Finding{Subject: subject, State: "no", Reason: e.Reason, Remedy: e.Remedy}
}
