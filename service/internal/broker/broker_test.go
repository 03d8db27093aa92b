// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/delegate"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

func TestRefuse(t *testing.T) {
	for _, test := range []struct {
		err         error
		name, layer string
	}{
		{delegate.ErrInitial, "NamespaceInitial", "target"},
		{delegate.ErrNested, "NamespaceNested", "target"},
		{delegate.ErrMountNotOwned, "MountNamespaceNotOwned", "target"},
		{delegate.ErrMoved, "ProcessGone", "target"},
		{kernel.ErrOwnerNotMapped, "OwnerNotMapped", "target"},
		{kernel.ErrProcessGone, "ProcessGone", "target"},
		{kernel.ErrNotPidFD, "NotAPidFD", "request"},
		{kernel.ErrPathInvalid, "PathInvalid", "request"},
		{kernel.ErrPathNotFound, "PathNotFound", "target"},
		{kernel.ErrPathIsLink, "PathIsLink", "target"},
		{kernel.ErrPathNotDirectory, "PathNotDirectory", "target"},
		{kernel.ErrPathDenied, "PathDenied", "target"},
		{kernel.ErrTargetHangs, "TargetHangs", "target"},
		{kernel.ErrHelperKilled, "Busy", "target"},
		{kernel.ErrTooManyHelpers, "Busy", "limit"},
		{kernel.ErrTokenMismatch, "NotDelegatable", "kernel"},
		{kernel.ErrNotSupported, "KernelNotSupported", "kernel"},
		{grant.ErrQuotaUser, "QuotaExceeded", "limit"},
		{grant.ErrQuotaTotal, "QuotaExceeded", "limit"},
		{grant.ErrNotFound, "NoSuchGrant", "request"},
		{profile.ErrNotFound, "NoSuchProfile", "profile"},
		{catalog.ErrNoSuchObject, "NoSuchObject", "object"},
		{catalog.ErrNoSuchMap, "NoSuchMap", "object"},
		{catalog.ErrNoSuchProgram, "NoSuchProgram", "object"},
		{catalog.ErrNoSuchLink, "NoSuchLink", "object"},
		{catalog.ErrNotOffered, "AccessNotOffered", "object"},
		{kernel.ErrQueueTaken, "QueueTaken", "object"},
		{catalog.ErrNotAttached, "NoSuchQueue", "object"},
		{kernel.ErrQueueUnknown, "NoSuchQueue", "request"},
		{catalog.ErrTooManyUsers, "QuotaExceeded", "limit"},
		{&config.FileError{}, "InvalidProfile", "profile"},
		{authority.ErrDenied, "NotAuthorized", "polkit"},
		{authority.ErrChallenge, "InteractionRequired", "polkit"},
		{authority.ErrDismissed, "NotAuthorized", "polkit"},
		{authority.ErrUnavailable, "AuthorityUnavailable", "polkit"},
		{context.DeadlineExceeded, "AuthorizationTimeout", "polkit"},
		{context.Canceled, "Canceled", "request"},
		{errors.New("disk on fire"), "Internal", "kernel"},
		{&Error{Name: "Busy", Layer: "profile"}, "Busy", "profile"},
	} {
		for _, err := range []error{test.err, fmt.Errorf("cannot do it: %w", test.err)} {
			got := Refuse(err)
			if got.Name != test.name || got.Layer != test.layer {
				t.Errorf("%v: got %+v", err, got)
			}
			if again := Refuse(got); again != got {
				t.Errorf("%v: refused twice it is %+v", err, again)
			}
		}
	}
}

// The details and actions of the table are the authority's own, and each
// action is there for its tier.
func TestAccessTable(t *testing.T) {
	t.Parallel()
	for tier, want := range map[profile.Tier][2]authority.Action{
		profile.Basic:     {authority.TokenBasic, authority.TokenBasicOthers},
		profile.Network:   {authority.TokenNetwork, authority.TokenNetworkOthers},
		profile.Tracing:   {authority.TokenTracing, authority.TokenTracingOthers},
		profile.Unlimited: {authority.TokenUnlimited, authority.TokenUnlimitedOthers},
	} {
		if own, others := tokenAction(tier, false), tokenAction(tier, true); own != want[0] || others != want[1] {
			t.Errorf("%s: %s, others' %s", tier, own, others)
		}
	}
	for name, access := range Methods {
		files := 0
		if name == "MountToken" || name == "MountObjects" {
			files = 1
		}
		if access.Files != files {
			t.Errorf("%s takes %d files", name, access.Files)
		}
		if len(access.Details) > 0 && len(access.Actions) == 0 {
			t.Errorf("%s has details for nobody", name)
		}
	}
}
