// SPDX-License-Identifier: Apache-2.0

package container

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEdit(t *testing.T) {
	t.Parallel()
	const ours = `{"args":["bpfbroker","hook","createRuntime","-p","network"],"path":"/usr/bin/bpfbroker"}`
	for name, test := range map[string]struct{ in, want string }{
		"annotation": {
			`{"annotations":{"org.bpfbroker.profile":"network"},"process":{"env":["A=b"],"capabilities":{"bounding":["CAP_BPF","CAP_KILL"]}}}`,
			`{"annotations":{"org.bpfbroker.profile":"network","run.oci.hooks.stderr":"/err"},
			"process":{"env":["A=b","LIBBPF_BPF_TOKEN_PATH=/sys/fs/bpf"],"capabilities":{
			"bounding":["CAP_BPF","CAP_KILL","CAP_NET_ADMIN"],"effective":["CAP_BPF","CAP_NET_ADMIN"],"permitted":["CAP_BPF","CAP_NET_ADMIN"],
			"inheritable":["CAP_BPF","CAP_NET_ADMIN"],"ambient":["CAP_BPF","CAP_NET_ADMIN"]}},
			"hooks":{"createRuntime":[` + ours + `]},"linux":{}}`,
		},
		"device": {
			`{"hooks":{"createRuntime":[{"path":"/x"},` + ours + `]},"process":{"env":["LIBBPF_BPF_TOKEN_PATH=/sys/fs/bpf"],"capabilities":null},
			"linux":{"big":18446744073709551615,"seccomp":{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
			{"names":["bpf"],"action":"SCMP_ACT_ERRNO"},{"names":["a","bpf","b"],"action":"SCMP_ACT_ERRNO","errnoRet":1},{"names":["c"],"action":"SCMP_ACT_ALLOW"}]}}}`,
			`{"hooks":{"createRuntime":[{"path":"/x"},` + ours + `]},"process":{"env":["LIBBPF_BPF_TOKEN_PATH=/sys/fs/bpf"],"capabilities":{
			"bounding":["CAP_BPF","CAP_NET_ADMIN"],"effective":["CAP_BPF","CAP_NET_ADMIN"],"permitted":["CAP_BPF","CAP_NET_ADMIN"],
			"inheritable":["CAP_BPF","CAP_NET_ADMIN"],"ambient":["CAP_BPF","CAP_NET_ADMIN"]}},
			"linux":{"big":18446744073709551615,"seccomp":{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
			{"names":["a","b"],"action":"SCMP_ACT_ERRNO","errnoRet":1},{"names":["c"],"action":"SCMP_ACT_ALLOW"},{"names":["bpf"],"action":"SCMP_ACT_ALLOW"}]}},
			"annotations":{"run.oci.hooks.stderr":"/err"}}`,
		},
	} {
		c, err := ParseConfiguration([]byte(test.in))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"network"}, c.Profiles); diff != "" {
			t.Errorf("%s: profiles (-want +got):\n%s", name, diff)
		}
		got, err := c.Edit("/usr/bin/bpfbroker", []string{"CAP_BPF", "CAP_NET_ADMIN"}, "/err")
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(value(t, test.want), value(t, string(got))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		// Doing it again changes nothing.
		again, err := ParseConfiguration(got)
		if err != nil {
			t.Fatal(err)
		}
		if got, err = again.Edit("/usr/bin/bpfbroker", []string{"CAP_BPF", "CAP_NET_ADMIN"}, "/err"); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(value(t, test.want), value(t, string(got))); diff != "" {
			t.Errorf("%s, again (-want +got):\n%s", name, diff)
		}
	}
}

func value(t *testing.T, text string) (v any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestNothingToDo(t *testing.T) {
	t.Parallel()
	for _, config := range []string{
		`{}`, `{"annotations":{"a":"b"}}`, `{"annotations":{"org.bpfbroker.profile":""}}`,
		`{"hooks":{"createRuntime":[{"path":"/x","args":["x","hook","precreate"]},{"args":["x","hook","createRuntime","-p"]},{}]}}`,
	} {
		c, err := ParseConfiguration([]byte(config))
		if err != nil || len(c.Profiles) != 0 {
			t.Errorf("%s: got %v, %v", config, c, err)
		}
	}
}

func TestBadConfiguration(t *testing.T) {
	t.Parallel()
	for _, config := range []string{
		"", "[]", "7", `{"annotations":7}`, `{"hooks":[]}`, strings.Repeat("[", 1<<20), strings.Repeat("x", 1<<20), `{"annotations":{}} {}`,
	} {
		if _, err := ParseConfiguration([]byte(config)); err == nil {
			t.Errorf("%.40q is read", config)
		}
	}
	for _, members := range []string{
		`"process":7`, `"process":{"env":{}}`, `"process":{"capabilities":[]}`, `"process":{"capabilities":{"ambient":"x"}}`,
		`"linux":[]`, `"linux":{"seccomp":7}`, `"linux":{"seccomp":{"syscalls":{}}}`, `"linux":{"seccomp":{"syscalls":[7]}}`,
		`"linux":{"seccomp":{"syscalls":[{"names":"bpf"}]}}`,
	} {
		c, err := ParseConfiguration([]byte(`{"annotations":{"org.bpfbroker.profile":"network"},` + members + "}"))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.Edit("/x", []string{"CAP_BPF"}, ""); err == nil {
			t.Errorf("%s becomes %s", members, got)
		}
	}
}

func TestParseState(t *testing.T) {
	t.Parallel()
	bundle := t.TempDir()
	write := func(config string) {
		if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte(config), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(bundle, "rootfs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("rootfs", filepath.Join(bundle, "link")); err != nil {
		t.Fatal(err)
	}
	good := `{"ociVersion":"1.0","id":"x","pid":7,"bundle":"` + bundle + `","status":"created"}`
	for _, root := range []string{"rootfs", "link", bundle + "/rootfs", bundle + "/link"} {
		write(`{"root":{"path":"` + root + `"}}`)
		got, err := ParseState([]byte(good))
		if err != nil {
			t.Errorf("%s: %v", root, err)
			continue
		}
		if diff := cmp.Diff(&State{PID: 7, Root: bundle + "/rootfs"}, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", root, diff)
		}
	}
	for name, state := range map[string]string{
		"nothing":         "",
		"garbage":         strings.Repeat("\x00\xff", 1<<19),
		"no process":      `{"bundle":"` + bundle + `"}`,
		"process 0":       `{"pid":0,"bundle":"` + bundle + `"}`,
		"process -1":      `{"pid":-1,"bundle":"` + bundle + `"}`,
		"a large process": `{"pid":99999999999999999999,"bundle":"` + bundle + `"}`,
		"no bundle":       `{"pid":7}`,
		"relative bundle": `{"pid":7,"bundle":"x"}`,
		"no such bundle":  `{"pid":7,"bundle":"/nonexistent"}`,
	} {
		if _, err := ParseState([]byte(state)); err == nil {
			t.Errorf("%s is read", name)
		}
	}
	for _, config := range []string{"", "[]", `{"root":{"path":"nonexistent"}}`} {
		write(config)
		if _, err := ParseState([]byte(good)); err == nil {
			t.Errorf("configuration %q is read", config)
		}
	}
}

func TestReadAll(t *testing.T) {
	t.Parallel()
	data, err := ReadAll(strings.NewReader(strings.Repeat("x", maxInput)))
	if err != nil || len(data) != maxInput {
		t.Errorf("got %d bytes, %v", len(data), err)
	}
	if _, err := ReadAll(strings.NewReader(strings.Repeat("x", maxInput+1))); err == nil {
		t.Error("too much is read")
	}
}

func TestWriteSpecification(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "cdi")
	path := filepath.Join(dir, "bpfbroker.org-profile.json")
	write := func(profiles ...string) {
		if err := WriteSpecification(path, "/usr/bin/bpfbroker", profiles); err != nil {
			t.Fatal(err)
		}
	}
	write()
	write("basic", "7", "a-b_c", "ends-", "ends_", "_begins", "", "a b", "a/b", "a\n", "ä")
	const device = `{"name":"NAME","containerEdits":{"env":["LIBBPF_BPF_TOKEN_PATH=/sys/fs/bpf"],"hooks":[
		{"hookName":"createRuntime","path":"/usr/bin/bpfbroker","args":["bpfbroker","hook","createRuntime","-p","NAME"]}]}}`
	want := `{"cdiVersion":"0.5.0","kind":"bpfbroker.org/profile","devices":[` + strings.ReplaceAll(device, "NAME", "basic") + "," +
		strings.ReplaceAll(device, "NAME", "7") + "," + strings.ReplaceAll(device, "NAME", "a-b_c") + "]}"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(value(t, want), value(t, string(data))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("there are %v, %v", entries, err)
	}

	// What can't be written leaves nothing.
	if err := WriteSpecification(dir, "/usr/bin/bpfbroker", []string{"basic"}); err == nil {
		t.Error("a directory is written over")
	}
	if entries, err := os.ReadDir(filepath.Dir(dir)); err != nil || len(entries) != 1 {
		t.Errorf("there are %v, %v", entries, err)
	}
	write() // a specification without devices isn't one
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("there are %v, %v", entries, err)
	}
}
