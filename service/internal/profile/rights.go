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

// Withheld is what a setting doesn't give.
type Withheld struct {
	// Layer is what refuses it: "token mask" or "namespace capability".
	Layer string
	// Setting is the profile's, as in "[Delegate] Maps=".
	Setting string
	// Names are what it would take to have it.
	Names []string
}

// Withheld is what could be delegated and isn't, of commands those that look at a
// token. capabilities are what the holders have.
func (r *Rights) Withheld(capabilities []string) []Withheld {
	const mask, capability = "token mask", "namespace capability"
	var lacking []string
	for _, c := range []string{capBPF, capNetAdmin, capPerfmon, capSysAdmin} {
		if !slices.Contains(capabilities, c) {
			lacking = append(lacking, c)
		}
	}
	all := []Withheld{
		{mask, "[Delegate] Commands=", CommandNames(commands.mask("map_create prog_load btf_load") &^ r.Commands)},
		{mask, "[Delegate] Maps=", MapNames(mapTypes.all() &^ r.Maps)},
		{mask, "[Delegate] Programs=", ProgramNames(programs.all() &^ r.Programs)},
		{mask, "[Delegate] Attachments=", AttachmentNames(attachments.all() &^ r.Attachments)},
		{capability, "[Guard] Capabilities=", lacking},
	}
	return slices.DeleteFunc(all, func(w Withheld) bool { return len(w.Names) == 0 })
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
