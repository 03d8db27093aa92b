// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"strings"

	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
)

const (
	grantInterface = busName + ".Grant"
	grantPrefix    = rootPath + "/grant/"
)

func grantPath(g grant.Grant) dbus.ObjectPath { return dbus.ObjectPath(grantPrefix + g.ID.String()) }

// grantID returns the id in a grant's path.
func (r *request) grantID() string { return strings.TrimPrefix(r.message.Path, grantPrefix) }

func (f *Front) grantHandlers() map[string]handler {
	return map[string]handler{
		"Renew": func(ctx context.Context, r *request) ([]any, error) {
			if err := r.decodeOptions(nil); err != nil {
				return nil, err
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			g, err := f.Broker.RenewGrant(ctx, c, r.grantID())
			if err != nil {
				return nil, err
			}
			return []any{uint64(g.Expires)}, nil
		},

		"Revoke": func(ctx context.Context, r *request) ([]any, error) {
			var kill bool
			if err := r.decodeOptions(map[string]any{"kill": &kill}); err != nil {
				return nil, err
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			notReached, err := f.Broker.RevokeGrant(ctx, c, r.grantID(), kill)
			if err != nil {
				return nil, err
			}
			return []any{list(notReached)}, nil
		},
	}
}

// live is the State of a grant that has not ended.
const live = "live"

// grantOf is a grant on the bus.
func grantOf(g grant.Grant) published {
	return published{grantPath(g), grantInterface, variants(map[string]any{
		"Profile":      g.Profile,
		"Tier":         g.Tier,
		"OwnerUID":     g.Owner,
		"Unit":         g.Unit,
		"Target":       g.Target,
		"Process":      uint32(g.PID),
		"Path":         g.Path,
		"Created":      uint64(g.Created),
		"Expires":      uint64(g.Expires),
		"State":        live,
		"Capabilities": list(g.Capabilities),
		"NotEnforced":  list(g.NotEnforced),
	})}
}
