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

func grantProperties(g grant.Grant) map[string]dbus.Variant {
	return variants(map[string]any{
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
	})
}

// grantSignal is a signal about a grant.
type grantSignal struct {
	path          dbus.ObjectPath
	iface, member string
	values        []any
}

// signal tells the grant's owner, on those connections that asked for it. On the
// system bus a broadcast would be for everybody.
func (f *Front) signal(g grant.Grant, signals func(grant.Grant) []grantSignal) {
	s := f.session.Load()
	if s == nil {
		return
	}
	for _, name := range s.subscribersOf(g.Owner) {
		for _, signal := range signals(g) {
			// Who doesn't get it has left, or the bus has.
			_ = s.conn.Signal(name, signal.path, signal.iface, signal.member, signal.values...)
		}
	}
}

func madeSignals(g grant.Grant) []grantSignal {
	return []grantSignal{{rootPath, objectManagerInterface, "InterfacesAdded",
		[]any{grantPath(g), map[string]map[string]dbus.Variant{grantInterface: grantProperties(g)}}}}
}

func leasedSignals(g grant.Grant) []grantSignal {
	return []grantSignal{changed(g, "Expires", uint64(g.Expires))}
}

func endedSignals(reason grant.Reason) func(grant.Grant) []grantSignal {
	return func(g grant.Grant) []grantSignal {
		return []grantSignal{
			changed(g, "State", string(reason)),
			{rootPath, objectManagerInterface, "InterfacesRemoved", []any{grantPath(g), []string{grantInterface}}},
		}
	}
}

func changed(g grant.Grant, property string, value any) grantSignal {
	return grantSignal{grantPath(g), propertiesInterface, "PropertiesChanged",
		[]any{grantInterface, variants(map[string]any{property: value}), []string{}}}
}
