// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
)

// read reads object files, by name, as an administrator's.
func read(t *testing.T, files map[string]string) *Set {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Load(config.Dirs{Etc: dir, Owner: uint32(os.Getuid())})
}

func TestParseEverything(t *testing.T) {
	t.Parallel()
	set := read(t, map[string]string{"a.object": `[Object]
Description=What it is
File=/usr/lib/a.bpf.o
Load=first-use
Keep=5min
MaxMapBytes=8M
[Data]
limit=10
name=some text
gone=1
gone=
[Map hits]
Access=read-only read-write
MaxEntries=128
[Map global]
From=.bss
Access=read-only
[Map events]
Access=consume
Record=event
[Program count]
From=on_packet
Publish=yes
Attach=eth0
Attach=eth1 wg0
[Program quiet]
Attach=none
[Program auto]
Attach=a/b
Attach=
`, "a.object.d/10.conf": "[Map hits]\nMaxEntries=256\n[Program quiet]\nPublish=no\n", "b.object": "[Object]\nFile=/b\nLoad=boot\n"})
	if errs := set.Errors(); errs != nil {
		t.Fatal(errs)
	}
	got, err := set.Get("a")
	if err != nil {
		t.Fatal(err)
	}
	want := &Object{
		Name: "a", Description: "What it is", File: "/usr/lib/a.bpf.o", Keep: 5 * time.Minute, MaxMapBytes: 8 << 20,
		Data: map[string]string{"limit": "10", "name": "some text"},
		Maps: map[string]*Map{
			"hits":   {From: "hits", Access: []Access{ReadOnly, ReadWrite}, MaxEntries: 256},
			"global": {From: ".bss", Access: []Access{ReadOnly}},
			"events": {From: "events", Access: []Access{Consume}, Record: "event"},
		},
		Programs: map[string]*Program{
			"count": {From: "on_packet", Publish: true, Attach: []string{"eth0", "eth1", "wg0"}},
			"quiet": {From: "quiet", Attach: []string{}},
			"auto":  {From: "auto"},
		},
		Files: got.Files,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if len(got.Files) != 2 || got.LoadText() != "first-use" || got.KeepText() != "5min" {
		t.Errorf("%v, %s, %s", got.Files, got.LoadText(), got.KeepText())
	}
	b, err := set.Get("b")
	if err != nil || !b.AtBoot || b.LoadText() != "boot" || b.KeepText() != "always" || b.MaxMapBytes != maxMapBytes {
		t.Errorf("%+v, %v", b, err)
	}
}

func TestParseErrors(t *testing.T) {
	t.Parallel()
	const object = "[Object]\nFile=/a\n"
	many := func(format string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	for _, test := range []struct{ text, want string }{
		{"[Object]\nDescription=d\n", ": it has no File="},
		{"[Object]\nFile=a.o\n", `:2: File=: "a.o" is not an absolute, normalized path`},
		{"[Object]\nFile=/a/../b\n", `:2: File=: "/a/../b" is not an absolute, normalized path`},
		{object + "Load=later\n", `:3: Load=: "later" is neither boot nor first-use`},
		{object + "Keep=never\n", `:3: Keep=: "never" is no time span`},
		{object + "Keep=1ms\n", `:3: Keep=: shorter than a second; while-used is the shortest`},
		{object + "Load=boot\nKeep=5min\n", `: what is loaded at boot stays: Load=boot needs Keep=always`},
		{object + "MaxMapBytes=0\n", `:3: MaxMapBytes=: "0" is no size: bytes, or with K, M, G or T`},
		{object + "Lease=1h\n", `:3: unknown key "Lease" in section [Object]`},
		{object + "[Map]\n", `:3: unknown section "[Map]"`},
		{object + "[Map a b]\n", `:3: unknown section "[Map a b]"`},
		{object + "[Map ../x]\n", `:3: unknown section "[Map ../x]"`},
		{object + "[Map -x]\n", `:3: unknown section "[Map -x]"`},
		{object + "[Map +x]\n", `:3: unknown section "[Map +x]"`},
		{object + "[Map  x]\n", `:3: unknown section "[Map  x]"`},
		{object + "[Maps x]\n", `:3: unknown section "[Maps x]"`},
		{object + "[Map " + strings.Repeat("x", 65) + "]\n", `:3: unknown section "[Map xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"`},
		{object + "[Map m]\nAccess=execute\n", `:4: Access=: "execute" is none of read-only, read-write, write-only, consume and receive`},
		{object + "[Map m]\nMaxEntries=1\n", `: [Map m] has no Access=`},
		{object + "[Map m]\nAccess=read-only\nMaxEntries=0\n", `:5: MaxEntries=: "0" is no number from 1 to 4294967295`},
		{object + "[Map m]\nAccess=read-only\nMaxEntries=4294967296\n", `:5: MaxEntries=: "4294967296" is no number from 1 to 4294967295`},
		{object + "[Map m]\nFrom=a/b\n", `:4: From=: "a/b" is no name in an ELF file`},
		{object + "[Map a]\nFrom=m\nAccess=read-only\n[Map m]\nAccess=read-only\n", `: [Map a] and [Map m] are the same map`},
		{object + "[Program a]\nFrom=m\n[Program m]\nPublish=no\n", `: [Program a] and [Program m] are the same program`},
		{object + "[Map m]\nAccess=read-only\n[Program m]\nPublish=yes\n", `: [Map m] and [Program m] are published under the same name`},
		{object + "[Program p]\nPublish=maybe\n", `:4: Publish=: "maybe" is neither yes nor no`},
		{object + "[Program p]\nAttach=" + strings.Repeat("e ", maxTargets+1) + "\n", `:4: Attach=: more than 64 targets`},
		{object + "[Data]\na-b=1\n", `:4: unknown key "a-b" in section [Data]`},
		{object + "[Data]\n" + many("v%d=1\n", maxData+1), `:260: v256=: more than 256 variables`},
		{object + many("[Map m%d]\nAccess=read-only\n", maxSections+1), `:132: Access=: more than 64 sections of its kind`},
	} {
		set := read(t, map[string]string{"bad.object": test.text, "fine.object": object})
		_, err := set.Get("bad")
		if err == nil || !strings.HasSuffix(err.Error(), "bad.object"+test.want) {
			t.Errorf("%.100q\ngot  %v\nwant %s", test.text, err, test.want)
		}
		if _, err := set.Get("fine"); err != nil {
			t.Errorf("the other one: %v", err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", "[Object]\nFile=/a\n", "[Map m]\nAccess=read-only,consume\n", "[Program p]\nAttach=none\nAttach=eth0\nPublish=yes\n",
		"[Data]\nx=1\n.y=\\\n2\n", "[Object]\nKeep=1h 30min\nLoad=boot\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		o := format.New("o")
		for _, e := range format.Parse(o, config.Source{Path: "f"}, data) {
			if strings.ContainsFunc(e.Error(), unicode.IsControl) {
				t.Errorf("control character in %q", e)
			}
		}
		for name := range o.Maps {
			if strings.ContainsAny(name, "/. "+stage+version) {
				t.Errorf("a map is named %q", name)
			}
		}
	})
}
