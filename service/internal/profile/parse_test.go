// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
)

// parsed reads one text as an administrator's file.
func parsed(t *testing.T, text string) *Profile {
	t.Helper()
	p := &Profile{}
	for _, err := range format.Parse(p, config.Source{Path: "f"}, []byte(text)) {
		t.Error(err)
	}
	p.finish()
	return p
}

func TestParseEverything(t *testing.T) {
	t.Parallel()
	got := parsed(t, "\ufeff"+`# a comment \
; another
[Profile]
Description = Über  alles
Lease=1h 30min
Guard=required

[Delegate]
Commands=map_create BPF_PROG_LOAD,BPFBtfLoad prog_run
Maps=hash,BPFMapTypeArray   \
  # a comment between \
  BPF_MAP_TYPE_LRU_HASH \

Programs=xdp
Attachments=BPFXdp BPFCgroupInet4Bind
[Guard]
Capabilities=CAP_BPF CAP_NET_ADMIN CAP_BPF
Helpers=~bpf_redirect ~loop
Kfuncs=bpf_task_acquire	bpf_task_release
MaxPrograms=1
MaxMaps=2147483647
MaxMapBytes=64M
[Attach]
Interfaces=own
Cgroups=any
Processes=
[Profile]`)
	want := &Profile{
		Description:  "Über  alles",
		Lease:        90 * time.Minute,
		Guard:        GuardRequired,
		Commands:     1<<0 | 1<<5 | 1<<18 | 1<<10,
		Maps:         1<<1 | 1<<2 | 1<<9,
		Programs:     1 << 6,
		Attachments:  1<<37 | 1<<8 | 1<<0,
		Capabilities: []string{"CAP_BPF", "CAP_NET_ADMIN"},
		Helpers:      Names{Deny: true, List: []string{"redirect", "loop"}},
		Kfuncs:       Names{List: []string{"bpf_task_acquire", "bpf_task_release"}},
		MaxPrograms:  1,
		MaxMaps:      1<<31 - 1,
		MaxMapBytes:  64 << 20,
		Attach:       Attach{Interfaces: ReachOwn, Cgroups: ReachAny},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	crlf := parsed(t, strings.ReplaceAll("[Delegate]\nMaps=hash \\\n array\n# x\nPrograms=xdp\n", "\n", "\r\n"))
	if diff := cmp.Diff(&Profile{Maps: 1<<1 | 1<<2, Programs: 1 << 6, Attachments: 1}, crlf); diff != "" {
		t.Error(diff)
	}
}

func TestParseAppendAndReset(t *testing.T) {
	t.Parallel()
	set := `[Profile]
Description=x
Lease=8h
Guard=optional
[Delegate]
Commands=any
Maps=hash
Maps=array
Programs=any
Attachments=any
[Guard]
Capabilities=CAP_BPF
Capabilities=CAP_PERFMON
Helpers=loop
Helpers=redirect
Kfuncs=~a
MaxPrograms=1
MaxMaps=1
MaxMapBytes=1
[Attach]
Interfaces=own
Cgroups=own
Processes=own
`
	p := parsed(t, set)
	if got := MapNames(p.Maps); !cmp.Equal(got, []string{"hash", "array"}) {
		t.Errorf("maps %v", got)
	}
	if !cmp.Equal(p.Helpers, Names{List: []string{"loop", "redirect"}}) || len(p.Capabilities) != 2 {
		t.Errorf("%v %v", p.Helpers, p.Capabilities)
	}
	var reset strings.Builder
	for line := range strings.SplitSeq(set, "\n") {
		if key, _, ok := strings.Cut(line, "="); ok {
			line = key + "="
		}
		reset.WriteString(line + "\n")
	}
	if diff := cmp.Diff(&Profile{}, parsed(t, set+reset.String())); diff != "" {
		t.Error(diff)
	}
	// After a reset the list may turn round.
	if p := parsed(t, "[Guard]\nHelpers=loop\nHelpers=\nHelpers=~loop\n"); !p.Helpers.Deny {
		t.Error("still an allow list")
	}
}

func TestParseErrors(t *testing.T) {
	t.Parallel()
	const (
		mixed = ": a list either allows or denies, with ~ before each name"
		lsm   = "lsm_cgroup is never delegated: attaching such a program makes kernels crash (BUG on 6.16.12 and 6.18.15)"
	)
	long := strings.Repeat("hash ", 500)
	tests := []struct {
		text string
		want string // "LINE: reason"
	}{
		{"Lease=1h\n", "1: not in a section that is known"},
		{"x[Profile]\n", `1: neither a section nor KEY=VALUE: "x[Profile]"`},
		{"\n\n[Porfile]\n", `3: unknown section "[Porfile]"`},
		{"[profile]\n", `1: unknown section "[profile]"`},
		{"[Pro\\\nfile]\n", `1: unknown section "[Pro file]"`},
		{"[Profile] x\n", `1: unknown section "[Profile] x"`},
		{"[]\n", `1: unknown section "[]"`},
		{"[Profile]\nLease\n", `2: neither a section nor KEY=VALUE: "Lease"`},
		{"[Profile]\n=1h\n", `2: unknown key "" in section [Profile]`},
		{"[Profile]\nlease=1h\n", `2: unknown key "lease" in section [Profile]`},
		{"[Guard]\nLease=1h\n", `2: unknown key "Lease" in section [Guard]`},
		// A comment is not continued, so the key after it counts.
		{"[Profile]\n# x \\\nLeash=1h\n", `3: unknown key "Leash" in section [Profile]`},
		// The line of an assignment is its first.
		{"[Delegate]\n\nMaps=hash \\\n# c\n \\\n nonsense\n", `3: Maps=: unknown value "nonsense"`},
		{"[Delegate]\r\n\r\nMaps=nonsense\r\n", `3: Maps=: unknown value "nonsense"`},
		{"[Delegate]\nMaps=nonsense \\", `2: Maps=: unknown value "nonsense"`},
		{"[Delegate]\nMaps=hash \\\\\nPrograms=xdp\n", "2: ends in a backslash that continues nothing"},
		{"[Profile]\rLease=1h\n", "1: control character"},
		{"[Profile]\nDescription=\x1b[31m\n", "2: control character"},
		{"[Profile]\nDescription=\u202eabc\n", "2: Description=: not printable"},
		{"[Profile]\nDescription=" + strings.Repeat("x", 257) + "\n", "2: Description=: longer than 256 bytes"},
		{"[Delegate]\nMaps=" + long + "\n", "2: longer than 2047 bytes; write several assignments, they append"},

		{"[Profile]\nLease=soon\n", `2: Lease=: "soon" is no time span`},
		{"[Profile]\nLease=0\n", "2: Lease=: shorter than a second"},
		{"[Profile]\nLease=999ms\n", "2: Lease=: shorter than a second"},
		{"[Profile]\nLease=300y\n", `2: Lease=: "300y" is no time span`},
		{"[Profile]\nGuard=yes\n", `2: Guard=: "yes" is neither required nor optional`},

		{"[Delegate]\nCommands=map_crate\n", `2: Commands=: unknown value "map_crate"`},
		{"[Delegate]\nCommands=@basic\n", `2: Commands=: unknown group "@basic"`},
		{"[Delegate]\nMaps=@nobody\n", `2: Maps=: unknown group "@nobody"`},
		{"[Delegate]\nMaps=unspec\n", `2: Maps=: unknown value "unspec"`},
		{"[Delegate]\nMaps=hash 7 array\n", `2: Maps=: "7" is a number, names are needed`},
		{"[Delegate]\nMaps=0xffffffff\n", `2: Maps=: "0xffffffff" is a number, names are needed`},
		{"[Delegate]\nMaps=-1\n", `2: Maps=: unknown value "-1"`},
		{"[Delegate]\nMaps=~hash\n", `2: Maps=: unknown value "~hash"`},
		{"[Delegate]\nMaps=hash:array\n", `2: Maps=: unknown value "hash:array"`},
		{"[Delegate]\nMaps=Hash\n", `2: Maps=: unknown value "Hash"`},
		{"[Delegate]\nMaps=BPF_MAP_TYPE_hash\n", `2: Maps=: unknown value "BPF_MAP_TYPE_hash"`},
		{"[Delegate]\nMaps=BPFHash\n", `2: Maps=: unknown value "BPFHash"`},
		{"[Delegate]\nMaps=BPFMapTypeHASH\n", `2: Maps=: unknown value "BPFMapTypeHASH"`},
		{"[Delegate]\nMaps=BPF_MAP_TYPE_\n", `2: Maps=: unknown value "BPF_MAP_TYPE_"`},
		{"[Delegate]\nPrograms=hash\n", `2: Programs=: unknown value "hash"`},
		{"[Delegate]\nAttachments=lsm_cgroup\n", "2: Attachments=: " + lsm},
		{"[Delegate]\nAttachments=xdp BPF_LSM_CGROUP\n", "2: Attachments=: " + lsm},
		{"[Delegate]\nAttachments=BPFLsmCgroup\n", "2: Attachments=: " + lsm},

		{"[Guard]\nCapabilities=CAP_CHOWN\n",
			`2: Capabilities=: "CAP_CHOWN" is no capability that a token uses (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN)`},
		{"[Guard]\nCapabilities=~CAP_BPF\n",
			`2: Capabilities=: "~CAP_BPF" is no capability that a token uses (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN)`},
		{"[Guard]\nHelpers=frobnicate\n", `2: Helpers=: unknown helper "frobnicate"`},
		{"[Guard]\nHelpers=~\n", `2: Helpers=: unknown helper ""`},
		{"[Guard]\nHelpers=unspec\n", `2: Helpers=: unknown helper "unspec"`},
		// Only the first would be denied, by systemd's rule all would: neither is guessed.
		{"[Guard]\nHelpers=~loop redirect\n", `2: Helpers=: "redirect"` + mixed},
		{"[Guard]\nKfuncs=a\nKfuncs=~b\n", `3: Kfuncs=: "b"` + mixed},
		{"[Guard]\nKfuncs=9lives\n", `2: Kfuncs=: "9lives" is no function's name`},
		{"[Guard]\nKfuncs=a;b\n", `2: Kfuncs=: "a;b" is no function's name`},
		{"[Guard]\nKfuncs=" + strings.Repeat("a", 128) + "\n",
			`2: Kfuncs=: "` + strings.Repeat("a", 64) + `" is no function's name`},
		{"[Guard]\nMaxPrograms=many\n", `2: MaxPrograms=: "many" is no number from 1 to 2147483647`},
		{"[Guard]\nMaxPrograms=0\n", `2: MaxPrograms=: "0" is no number from 1 to 2147483647`},
		{"[Guard]\nMaxMaps=-1\n", `2: MaxMaps=: "-1" is no number from 1 to 2147483647`},
		{"[Guard]\nMaxMaps=2147483648\n", `2: MaxMaps=: "2147483648" is no number from 1 to 2147483647`},
		{"[Guard]\nMaxMapBytes=64m\n", `2: MaxMapBytes=: "64m" is no size: bytes, or with K, M, G or T`},
		{"[Guard]\nMaxMapBytes=M\n", `2: MaxMapBytes=: "M" is no size: bytes, or with K, M, G or T`},
		{"[Guard]\nMaxMapBytes=0\n", `2: MaxMapBytes=: "0" is no size: bytes, or with K, M, G or T`},
		{"[Guard]\nMaxMapBytes=16777216T\n", `2: MaxMapBytes=: "16777216T" is no size: bytes, or with K, M, G or T`},
		{"[Attach]\nInterfaces=eth0\n", `2: Interfaces=: "eth0" is neither own nor any`},
		{"[Attach]\nSockets=own\n", `2: unknown key "Sockets" in section [Attach]`},
	}
	for _, test := range tests {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			errs := format.Parse(&Profile{}, config.Source{Path: "f"}, []byte(test.text))
			if len(errs) != 1 || errs[0].Error() != "f:"+test.want {
				t.Errorf("%.200q\ngot  %v\nwant f:%s", test.text, errs, test.want)
			}
		})
	}
}

// All mistakes are told in one go, but no more than make sense.
func TestParseAllErrors(t *testing.T) {
	t.Parallel()
	errs := format.Parse(&Profile{}, config.Source{Path: "f"}, []byte("[Profile]\nA=\nLease=1h\nB=\n"))
	if len(errs) != 2 || errs[0].Line != 2 || errs[1].Line != 4 {
		t.Error(errs)
	}
	for _, text := range []string{strings.Repeat("x\n", 1000), "[Profile]\n" + strings.Repeat("A=\n", 1000)} {
		if errs := format.Parse(&Profile{}, config.Source{Path: "f"}, []byte(text)); len(errs) != config.MaxErrors {
			t.Errorf("%d errors", len(errs))
		}
	}
	var many strings.Builder
	many.WriteString("[Guard]\n")
	for i := range maxNames + 1 {
		fmt.Fprintf(&many, "Kfuncs=f%d\n", i)
	}
	errs = format.Parse(&Profile{}, config.Source{Path: "f"}, []byte(many.String()))
	if len(errs) != 1 || errs[0].Error() != "f:1026: Kfuncs=: more than 1024 names" {
		t.Error(errs)
	}
}

func TestParseSpan(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for value, want := range map[string]time.Duration{
		"1": time.Second, "90": 90 * time.Second, "1.5": 1500 * time.Millisecond, "8h": 8 * time.Hour,
		"30min": 30 * time.Minute, "1h 30min": 90 * time.Minute, "1h30min": 90 * time.Minute, "2 d 1 s": 2*day + time.Second,
		"1M": 2629800 * time.Second, "1y": 31557600 * time.Second, "1w": 7 * day, "1.5h": 90 * time.Minute, "2500ms": 2500 * time.Millisecond,
		"0.000001s": time.Microsecond, "1hour 2hours": 3 * time.Hour, "292y": 292 * 31557600 * time.Second,
	} {
		if got, err := config.ParseSpan(value); err != nil || got != want {
			t.Errorf("%q: %v, %v, want %v", value, got, err, want)
		}
	}
	for _, value := range []string{
		"h", "1 2", "1x", "-1h", "1h -1s", "1.2.3h", ".5h", "1e3", "∞", "infinity 1h", "1hh", "1H", "99999999999999999999", "293y",
		"292y 1y", "1h,2s", "+1h", "1_000s", ".", "1h .",
	} {
		if got, err := config.ParseSpan(value); err == nil {
			t.Errorf("%q: %v", value, got)
		}
	}
	if p := parsed(t, "[Profile]\nLease=8h\nLease=infinity\n"); p.Lease != 0 || p.NeedsGuard() {
		t.Errorf("infinity: %v", p.Lease)
	}
}

func TestParseSize(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]uint64{"1": 1, "4096": 4096, "1K": 1 << 10, "64M": 64 << 20, "3G": 3 << 30, "16777215T": 16777215 << 40} {
		if p := parsed(t, "[Guard]\nMaxMapBytes="+value+"\n"); p.MaxMapBytes != want {
			t.Errorf("%q: %d, want %d", value, p.MaxMapBytes, want)
		}
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		names Names
		a, b  bool
	}{
		{Names{}, true, true},
		{Names{List: []string{"a"}}, true, false},
		{Names{Deny: true, List: []string{"a"}}, false, true},
	} {
		if a, b := test.names.Allows("a"), test.names.Allows("b"); a != test.a || b != test.b {
			t.Errorf("%v: %v, %v", test.names, a, b)
		}
	}
}

func TestGuardMode(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]GuardMode{
		"":                                 GuardUnneeded,
		"[Delegate]\nPrograms=xdp\n":       GuardUnneeded,
		"[Attach]\nProcesses=any\n":        GuardUnneeded,
		"[Profile]\nGuard=required\n":      GuardRequired,
		"[Profile]\nLease=1h\n":            GuardRequired,
		"[Attach]\nInterfaces=own\n":       GuardRequired,
		"[Attach]\nCgroups=own\n":          GuardRequired,
		"[Attach]\nProcesses=own\n":        GuardRequired,
		"[Guard]\nCapabilities=CAP_BPF\n":  GuardRequired,
		"[Guard]\nHelpers=loop\n":          GuardRequired,
		"[Guard]\nKfuncs=~a\n":             GuardRequired,
		"[Guard]\nMaxPrograms=1\n":         GuardRequired,
		"[Guard]\nMaxMaps=1\n":             GuardRequired,
		"[Guard]\nMaxMapBytes=1\n":         GuardRequired,
		"[Profile]\nGuard=optional\n":      GuardOptional,
		good + "[Guard]\nMaxMapBytes=1K\n": GuardRequired,
		"[Profile]\nLease=1h\nGuard=optional\n[Guard]\nMaxMaps=1\n": GuardOptional,
	} {
		p := parsed(t, text)
		if p.Guard != want || p.NeedsGuard() != (want == GuardRequired) {
			t.Errorf("%q: %v", text, p.Guard)
		}
	}
	p := parsed(t, "[Profile]\nLease=1h\n[Guard]\nHelpers=loop\n[Attach]\nCgroups=own\nProcesses=any\n")
	want := []string{"Lease=", "[Guard] Helpers=", "[Attach] Cgroups="}
	if diff := cmp.Diff(want, p.NotEnforced()); diff != "" {
		t.Error(diff)
	}
}

func FuzzParse(f *testing.F) {
	for _, p := range shippedFiles(f) {
		f.Add(p)
	}
	for _, s := range []string{
		"", good, "[Profile]\r\nLease=1h 30min\r\n", "[Delegate]\nMaps=hash \\\n# c \\\n array\\",
		"[Guard]\nHelpers=~loop\nKfuncs=~a,b\nMaxMapBytes=64M\n", "[Attach]\nInterfaces=own\n\\\\\n", "\ufeff[Profile]\n",
		"#\\\n[Delegate]\nAttachments=any BPFLsmMac BPF_XDP @network\nPrograms=any 7", "[Profile]\nDescription=\u202e\x00\xff",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p := &Profile{}
		errs := format.Parse(p, config.Source{Path: "f"}, data)
		lines := strings.Count(string(data), "\n") + 1
		for _, e := range errs {
			if e.Line < 0 || e.Line > lines || e.Reason == "not every line was understood" {
				t.Errorf("line %d of %d: %s", e.Line, lines, e.Reason)
			}
			if strings.ContainsFunc(e.Error(), unicode.IsControl) {
				t.Errorf("control character in %q", e)
			}
		}
		if errs != nil {
			return
		}
		p.finish()
		if p.Commands&^commands.all() != 0 || p.Maps&^mapTypes.all() != 0 ||
			p.Programs&^programs.all() != 0 || p.Attachments&^attachments.all() != 0 {
			t.Errorf("rights that can't be delegated: %+v", p)
		}
		if p.Tier(true) > p.Tier(false) {
			t.Errorf("the guard makes it %v instead of %v", p.Tier(true), p.Tier(false))
		}
		if p.NeedsGuard() && p.Guard == GuardOptional || p.Lease < 0 || p.MaxMaps < 0 || p.MaxPrograms < 0 {
			t.Errorf("%+v", p)
		}
		again := &Profile{}
		if errs := format.Parse(again, config.Source{Path: "f"}, append(append([]byte{}, data...), "\n"...)); errs != nil {
			t.Errorf("not with a line's end: %v", errs)
		}
	})
}
