// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"math/bits"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// Everything that the running kernel can be asked for has its name here.
func TestNamesAgainstKernel(t *testing.T) {
	t.Parallel()
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		enum string
		ours *enum
	}{
		{"bpf_cmd", &commands}, {"bpf_map_type", &mapTypes}, {"bpf_prog_type", &programs}, {"bpf_attach_type", &attachments},
	} {
		var e *btf.Enum
		if err := kernel.TypeByName(test.enum, &e); err != nil {
			t.Fatal(err)
		}
		first := map[uint64]bool{}
		for _, v := range e.Values {
			name, ok := strings.CutPrefix(v.Name, test.ours.prefix)
			// The end of the enum, no value, and flags beside the values.
			if name = strings.ToLower(name); !ok || name == "unspec" || v.Value >= 64 {
				continue
			}
			if i, ok := test.ours.index(name); !ok || uint64(i) != v.Value {
				t.Errorf("%s is %d, here it is %d", v.Name, v.Value, i)
			} else if !first[v.Value] && test.ours.names[i] != name && test.ours.aliases[name] == "" {
				t.Errorf("the kernel shows %s, here it is %s", name, test.ours.names[i])
			}
			first[v.Value] = true
		}
	}
	var e *btf.Enum
	if err := kernel.TypeByName("bpf_func_id", &e); err != nil {
		t.Fatal(err)
	}
	for _, v := range e.Values {
		name, ok := strings.CutPrefix(v.Name, "BPF_FUNC_")
		if ok && v.Value > 0 && (v.Value > uint64(len(helpers)) || helpers[v.Value-1] != name) {
			t.Errorf("no helper %s, %d", name, v.Value)
		}
	}
}

// The library's words for the same numbers differ in their capitals and
// underscores, and where it has its own.
func TestNamesAgainstLibrary(t *testing.T) {
	t.Parallel()
	own := map[string]string{
		"ProgramArray": "progarray", "PerCPUHash": "percpuhash", "LRUCPUHash": "lrupercpuhash", "StructOpsMap": "structops",
		"CGroupStorage": "cgroupstoragedeprecated", "PerCPUCGroupStorage": "percpucgroupstoragedeprecated",
		"CgroupStorage": "cgrpstorage", "Extension": "ext", "None": "cgroupinetingress",
	}
	check := func(e *enum, i int, theirs string) {
		if strings.Contains(theirs, "(") {
			return // newer than the library
		}
		word, ok := own[theirs]
		if !ok {
			word = strings.ToLower(theirs)
		}
		if strings.ReplaceAll(e.names[i], "_", "") != word {
			t.Errorf("%d is %s in the library, here it is %s", i, theirs, e.names[i])
		}
	}
	for i := 1; i < len(mapTypes.names); i++ {
		check(&mapTypes, i, ebpf.MapType(i).String())
	}
	for i := 1; i < len(programs.names); i++ {
		check(&programs, i, ebpf.ProgramType(i).String())
	}
	for i := range attachments.names {
		check(&attachments, i, ebpf.AttachType(i).String())
	}
	for i, name := range helpers {
		theirs := strings.ToLower(strings.TrimPrefix(asm.BuiltinFunc(i+1).String(), "Fn"))
		if strings.ReplaceAll(name, "_", "") != theirs {
			t.Errorf("helper %d is %s in the library, here it is %s", i+1, theirs, name)
		}
	}
	if next := asm.BuiltinFunc(len(helpers) + 1).String(); !strings.Contains(next, "(") {
		t.Errorf("the library has a helper more: %s", next)
	}
}

func TestSpellings(t *testing.T) {
	t.Parallel()
	for _, e := range []*enum{&commands, &mapTypes, &programs, &attachments} {
		if len(e.names) > 64 {
			t.Fatalf("%s: more values than bits", e.prefix)
		}
		names := slices.Clone(e.names)
		for alias := range e.aliases {
			names = append(names, alias)
		}
		for _, name := range names {
			if name == "" || e.never[name] != "" {
				continue
			}
			bit, _ := e.index(name)
			upper := e.prefix + strings.ToUpper(name)
			for _, word := range []string{name, upper, systemdName(upper)} {
				m, err := e.parse(word)
				if err != nil || m != 1<<bit {
					t.Errorf("%s: %#x, %v, want bit %d", word, m, err, bit)
				}
			}
		}
		all, err := e.parse("any")
		if err != nil || all != e.mask(strings.Join(e.list(all), " ")) {
			t.Errorf("any: %#x, %v", all, err)
		}
	}
	if attachments.all().Has(slices.Index(attachments.names, "lsm_cgroup")) {
		t.Error("any delegates lsm_cgroup")
	}
	if got := bits.OnesCount64(uint64(programs.all())); got != len(programTypes)-1 {
		t.Errorf("any is %d program types", got)
	}
}

// systemdName is systemd's rule: the words of an enumerator, each capitalized
// but for the first.
func systemdName(enumerator string) string {
	words := strings.Split(strings.ToLower(enumerator), "_")
	for i, w := range words[1:] {
		words[i+1] = string(unicode.ToUpper(rune(w[0]))) + w[1:]
	}
	return "BPF" + strings.Join(words[1:], "")
}

func TestGroups(t *testing.T) {
	t.Parallel()
	for name, g := range groups {
		for e, names := range map[*enum]string{&mapTypes: g.maps, &programs: g.programs, &attachments: g.attachments} {
			got, err := e.parse("@" + name)
			if want := len(strings.Fields(names)); err != nil || bits.OnesCount64(uint64(got)) != want {
				t.Errorf("@%s: %v, %v, want %d names", name, e.list(got), err, want)
			}
			if got&^e.all() != 0 {
				t.Errorf("@%s has what is never delegated", name)
			}
		}
	}
}
