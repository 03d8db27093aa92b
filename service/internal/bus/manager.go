// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"fmt"
	"os"

	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/bus/wire"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

const managerInterface = busName + ".Manager"

// maxPID is the highest process id that Linux gives (PID_MAX_LIMIT of
// include/linux/threads.h).
const maxPID = 1 << 22

type handler = func(context.Context, *request) ([]any, error)

func (f *Front) managerHandlers() map[string]handler {
	b := f.Broker
	return map[string]handler{
		"AcquireToken": func(ctx context.Context, r *request) ([]any, error) {
			var profileName string
			if err := r.decodeOptions(nil, &profileName); err != nil {
				return nil, err
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			g, mount, err := b.AcquireToken(ctx, c, profileName)
			if mount != nil {
				r.files = []*os.File{mount}
			}
			values, err := r.handOut(g, err)
			if err != nil {
				return nil, err
			}
			return append(values, dbus.UnixFD(mount.Fd())), nil
		},

		"MountToken": func(ctx context.Context, r *request) ([]any, error) {
			var profileName, path string
			var pid uint32
			root := "/"
			if err := r.decodeOptions(map[string]any{"root": &root}, &profileName, &pid, &path); err != nil {
				return nil, err
			}
			if pid == 0 || pid > maxPID {
				return nil, failure("InvalidArgs", "cannot take %d for a process id", pid)
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			process, err := f.OpenProcess(int(pid))
			if err != nil {
				return nil, fmt.Errorf("cannot take the process: %w", err)
			}
			defer process.Close()
			return r.handOut(b.MountToken(ctx, c, profileName, process, root, path))
		},

		"ListProfiles": func(_ context.Context, r *request) ([]any, error) {
			if err := r.decodeOptions(nil); err != nil {
				return nil, err
			}
			type summary struct {
				Name, Description, Tier string
				Available               bool
				Reason, Remedy          string
			}
			profiles := []summary{}
			for _, o := range b.ListProfiles() {
				s := summary{printable(o.Name), o.Description, o.Tier.String(), o.Refusal == nil, "", ""}
				if o.Refusal != nil {
					s.Reason, s.Remedy = printable(o.Refusal.Reason), o.Refusal.Remedy
				}
				profiles = append(profiles, s)
			}
			return []any{profiles}, nil
		},

		"DescribeProfile": func(_ context.Context, r *request) ([]any, error) {
			var name string
			if err := r.decodeOptions(nil, &name); err != nil {
				return nil, err
			}
			o, err := b.DescribeProfile(name)
			if err != nil {
				return nil, err
			}
			return []any{describeProfile(o)}, nil
		},

		"ListGrants": func(ctx context.Context, r *request) ([]any, error) {
			var all bool
			if err := r.decodeOptions(map[string]any{"all": &all}); err != nil {
				return nil, err
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			list, err := b.ListGrants(ctx, c, all)
			if err != nil {
				return nil, err
			}
			grants := wire.NewArray("ossusustt", 192*len(list))
			for _, g := range list {
				grants.Struct()
				grants.String(string(grantPath(*g)))
				grants.String(g.Profile)
				grants.String(g.Tier)
				grants.Uint32(g.Owner)
				grants.String(printable(g.Unit))
				grants.Uint32(uint32(g.PID))
				grants.String(printable(g.Path))
				grants.Uint64(uint64(g.Created))
				grants.Uint64(uint64(g.Expires))
			}
			return []any{grants}, nil
		},

		"GetGrant": func(ctx context.Context, r *request) ([]any, error) {
			var id string
			if err := r.decodeOptions(nil, &id); err != nil {
				return nil, err
			}
			g, err := r.getGrant(ctx, id)
			if err != nil {
				return nil, err
			}
			return []any{grantPath(g)}, nil
		},

		"ExplainGrant": func(ctx context.Context, r *request) ([]any, error) {
			var id string
			if err := r.decodeOptions(nil, &id); err != nil {
				return nil, err
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			e, err := b.ExplainGrant(ctx, c, id)
			if err != nil {
				return nil, err
			}
			denials := []map[string]dbus.Variant{}
			for _, d := range e.Denials {
				values := map[string]any{
					"Time": uint64(d.Time.UnixMicro()), "Kind": string(d.Kind), "Layer": d.Layer, "Reason": printable(d.Reason), "Count": uint32(d.Count),
				}
				for key, text := range map[string]string{"Profile": d.Profile, "Command": d.Command, "Program": d.Program, "Allow": d.Allow} {
					if text != "" {
						values[key] = printable(text)
					}
				}
				if d.Grant != 0 {
					values["Grant"] = d.Grant.String()
				}
				if d.PID != 0 {
					values["Process"] = uint32(d.PID)
				}
				denials = append(denials, variants(values))
			}
			withheld := []profile.Withheld{}
			withheld = append(withheld, e.Withheld...)
			return []any{denials, withheld}, nil
		},

		"Check": func(ctx context.Context, r *request) ([]any, error) {
			if err := r.decodeOptions(nil); err != nil {
				return nil, err
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			findings := []broker.Finding{}
			findings = append(findings, b.Check(ctx, c)...)
			return []any{findings}, nil
		},
	}
}

// getGrant finds a grant for the caller, who may have to authenticate for it.
func (r *request) getGrant(ctx context.Context, id string) (grant.Grant, error) {
	c, err := r.caller()
	if err != nil {
		return grant.Grant{}, err
	}
	return r.session.front.Broker.GetGrant(ctx, c, id)
}

func describeProfile(o broker.Offer) map[string]dbus.Variant {
	description := map[string]any{
		"Name":         o.Name,
		"Description":  o.Description,
		"Tier":         o.Tier.String(),
		"Guard":        o.Guard.String(),
		"Available":    o.Refusal == nil,
		"Commands":     list(profile.CommandNames(o.Commands)),
		"Maps":         list(profile.MapNames(o.Maps)),
		"Programs":     list(profile.ProgramNames(o.Programs)),
		"Attachments":  list(profile.AttachmentNames(o.Attachments)),
		"Capabilities": list(o.AmbientCapabilities()),
		"Limits":       list(o.Profile.NotEnforced()),
		"NotEnforced":  list(o.NotEnforced),
		"Files":        list(o.Files),
	}
	if o.Refusal != nil {
		description["Reason"], description["Remedy"] = o.Refusal.Reason, o.Refusal.Remedy
	}
	if o.Lease > 0 {
		description["LeaseSeconds"] = uint64(o.Lease.Seconds())
	}
	return variants(description)
}

func variants(values map[string]any) map[string]dbus.Variant {
	out := make(map[string]dbus.Variant, len(values))
	for key, value := range values {
		out[key] = dbus.MakeVariant(value)
	}
	return out
}

// list makes a list one that godbus can encode: not nil, and of texts that D-Bus
// has.
func list(items []string) []string {
	all := make([]string, 0, len(items))
	for _, item := range items {
		all = append(all, printable(item))
	}
	return all
}
