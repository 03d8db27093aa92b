// SPDX-License-Identifier: Apache-2.0

package profile

import "slices"

// Rights are what a grant gets of a profile. The fields are the profile's.
type Rights struct {
	Commands, Maps, Programs, Attachments Mask
	Capabilities                          []string
	Helpers, Kfuncs                       Names
	MaxPrograms, MaxMaps                  int
	MaxMapBytes                           uint64
	Attach                                Attach
}

// Rights returns what the profile gives. The lists are shared with the profile.
func (p *Profile) Rights() *Rights {
	return &Rights{
		Commands: p.Commands, Maps: p.Maps, Programs: p.Programs, Attachments: p.Attachments,
		Capabilities: p.Capabilities, Helpers: p.Helpers, Kfuncs: p.Kfuncs,
		MaxPrograms: p.MaxPrograms, MaxMaps: p.MaxMaps, MaxMapBytes: p.MaxMapBytes,
		Attach: p.Attach,
	}
}

// Within says whether nothing in r is more than in o. Where that can't be told
// from the names alone, as of a list that denies and one that allows, it says no.
func (r *Rights) Within(o *Rights) bool {
	return (r.Commands&^o.Commands)|(r.Maps&^o.Maps)|(r.Programs&^o.Programs)|(r.Attachments&^o.Attachments) == 0 &&
		capabilitiesWithin(r.Capabilities, o.Capabilities) &&
		r.Helpers.within(o.Helpers) && r.Kfuncs.within(o.Kfuncs) &&
		countWithin(r.MaxPrograms, o.MaxPrograms) && countWithin(r.MaxMaps, o.MaxMaps) && countWithin(r.MaxMapBytes, o.MaxMapBytes) &&
		r.Attach.Interfaces <= o.Attach.Interfaces && r.Attach.Cgroups <= o.Attach.Cgroups && r.Attach.Processes <= o.Attach.Processes
}

// capabilitiesWithin compares lists of which nil is all.
func capabilitiesWithin(have, want []string) bool {
	return want == nil || have != nil && !slices.ContainsFunc(have, func(c string) bool { return !slices.Contains(want, c) })
}

// countWithin compares bounds of which 0 is none.
func countWithin[N int | uint64](have, want N) bool { return want == 0 || have != 0 && have <= want }

func (n Names) within(o Names) bool {
	switch {
	case len(o.List) == 0:
		return true
	case len(n.List) == 0:
		return false
	case !n.Deny:
		return !slices.ContainsFunc(n.List, func(name string) bool { return !o.Allows(name) })
	}
	return o.Deny && !slices.ContainsFunc(o.List, n.Allows)
}
