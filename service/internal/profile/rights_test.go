// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestWithin(t *testing.T) {
	t.Parallel()
	// The first has no more than the second, which has more.
	for name, pair := range map[string][2]string{
		"a command":                  {"[Delegate]\nCommands=map_create", "[Delegate]\nCommands=map_create prog_load"},
		"a map":                      {"[Delegate]\nMaps=hash", "[Delegate]\nMaps=hash array"},
		"a program":                  {"[Delegate]\nPrograms=xdp", "[Delegate]\nPrograms=xdp kprobe"},
		"an attach type":             {"[Delegate]\nAttachments=xdp", "[Delegate]\nAttachments=xdp tcx_ingress"},
		"a capability":               {"[Guard]\nCapabilities=CAP_BPF", "[Guard]\nCapabilities=CAP_BPF CAP_PERFMON"},
		"all capabilities":           {"[Guard]\nCapabilities=CAP_BPF", ""},
		"a helper":                   {"[Guard]\nHelpers=redirect", "[Guard]\nHelpers=redirect override_return"},
		"a helper not denied":        {"[Guard]\nHelpers=~redirect ~override_return", "[Guard]\nHelpers=~redirect"},
		"all helpers":                {"[Guard]\nHelpers=~redirect", ""},
		"some helpers of all":        {"[Guard]\nHelpers=redirect", ""},
		"some of those not denied":   {"[Guard]\nHelpers=redirect", "[Guard]\nHelpers=~override_return"},
		"a kfunc":                    {"[Guard]\nKfuncs=a", "[Guard]\nKfuncs=a b"},
		"a program at once":          {"[Guard]\nMaxPrograms=1", "[Guard]\nMaxPrograms=2"},
		"any number of programs":     {"[Guard]\nMaxPrograms=1", ""},
		"a map at once":              {"[Guard]\nMaxMaps=1", "[Guard]\nMaxMaps=2"},
		"any number of maps":         {"[Guard]\nMaxMaps=1", ""},
		"memory":                     {"[Guard]\nMaxMapBytes=1", "[Guard]\nMaxMapBytes=2"},
		"any amount of memory":       {"[Guard]\nMaxMapBytes=1", ""},
		"interfaces":                 {"", "[Attach]\nInterfaces=own"},
		"all interfaces":             {"[Attach]\nInterfaces=own", "[Attach]\nInterfaces=any"},
		"cgroups":                    {"[Attach]\nCgroups=own", "[Attach]\nCgroups=any"},
		"processes":                  {"[Attach]\nProcesses=own", "[Attach]\nProcesses=any"},
		"everything":                 {"", "[Delegate]\nCommands=any\nMaps=any\nPrograms=any\nAttachments=any\n[Attach]\nInterfaces=any\nCgroups=any\nProcesses=any"},
		"what was all, as a command": {"[Guard]\nHelpers=redirect\nMaxMaps=1", "[Delegate]\nCommands=map_create"},
	} {
		less, more := parsed(t, pair[0]).Rights(), parsed(t, pair[1]).Rights()
		if !less.Within(more) {
			t.Errorf("%s: less isn't within more", name)
		}
		if more.Within(less) {
			t.Errorf("%s: more is within less", name)
		}
		if !less.Within(less) || !more.Within(more) {
			t.Errorf("%s: not within itself", name)
		}
	}
	// Of these neither is known to be within the other.
	for _, pair := range [][2]string{
		{"[Guard]\nHelpers=redirect", "[Guard]\nHelpers=override_return"},
		{"[Guard]\nHelpers=~redirect", "[Guard]\nHelpers=~override_return"},
		{"[Guard]\nHelpers=redirect", "[Guard]\nHelpers=~redirect"},
		{"[Delegate]\nMaps=hash", "[Delegate]\nMaps=array"},
		{"[Delegate]\nMaps=hash", "[Attach]\nCgroups=own"},
	} {
		a, b := parsed(t, pair[0]).Rights(), parsed(t, pair[1]).Rights()
		if a.Within(b) || b.Within(a) {
			t.Errorf("%q", pair)
		}
	}
}

// Rights have every field of a profile but those that say how it is offered,
// and come back from the ledger as they were.
func TestRights(t *testing.T) {
	t.Parallel()
	offered := map[string]bool{"Name": true, "Description": true, "Lease": true, "Guard": true, "Files": true}
	rights := reflect.TypeFor[Rights]()
	for field := range reflect.TypeFor[Profile]().Fields() {
		if _, ok := rights.FieldByName(field.Name); ok == offered[field.Name] {
			t.Errorf("%s is in the rights: %v", field.Name, ok)
		}
	}
	p := parsed(t, "[Delegate]\nCommands=any\nMaps=any\nPrograms=any\nAttachments=any\n[Guard]\nCapabilities=CAP_BPF\n"+
		"Helpers=~redirect\nKfuncs=a\nMaxPrograms=1\nMaxMaps=2\nMaxMapBytes=3\n[Attach]\nInterfaces=own\nCgroups=any\nProcesses=own")
	value := reflect.ValueOf(*p.Rights())
	for field, v := range value.Fields() {
		if v.IsZero() {
			t.Errorf("%s isn't filled in", field.Name)
		}
	}
	data, err := json.Marshal(p.Rights())
	if err != nil {
		t.Fatal(err)
	}
	var again Rights
	if err := json.Unmarshal(data, &again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(p.Rights(), &again); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
