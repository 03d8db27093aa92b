// SPDX-License-Identifier: Apache-2.0

//go:build kernels

package kernels

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// kernel returns the kernel that the tests of the guest itself use.
func kernel(t *testing.T) *machines.Image {
	t.Helper()
	image, err := machines.Kernel(t.Context(), "6.12")
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func TestKernel(t *testing.T) {
	t.Parallel()
	image := kernel(t)
	if !strings.HasPrefix(image.Release, "6.12.") {
		t.Errorf("got Linux %s, want 6.12", image.Release)
	}
	if _, err := os.Stat(filepath.Join(image.Modules, "kernel")); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(image, kernel(t), cmpopts.IgnoreUnexported(machines.Image{})); diff != "" {
		t.Error(diff)
	}
	if image, err := machines.Kernel(t.Context(), "2.6"); err == nil {
		t.Errorf("got %+v, want an error", image)
	}
}

func TestGuest(t *testing.T) {
	t.Parallel()
	image := kernel(t)
	// Every byte, and more of them than a buffer on the way has room for.
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i)
	}
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, data, 0o604); err != nil {
		t.Fatal(err)
	}
	const script = `uname -r; id -u; stat -c %a /some/where; echo "$1" "$WORD"
awk '$2 != "/" { print $2, $3 }' /proc/mounts; ls /sys/class/net; cat /proc/modules
cat; nonexistent; sleep 1000 & cat /some/where >&2
kill -USR1 $$`
	output, code, err := machines.RunInKernel(t.Context(), image, map[string]string{"/some/where": file},
		[]string{"sh", "-c", script, "script", `it's $HOME\"`}, []string{"WORD=a  b'"})
	if err != nil {
		t.Fatal(err)
	}
	if code != 128+10 {
		t.Errorf("got exit code %d, want that of SIGUSR1", code)
	}
	want := image.Release + "\n0\n604\nit's $HOME\\\" a  b'\n" +
		"/proc proc\n/sys sysfs\n/dev devtmpfs\n/sys/fs/cgroup cgroup2\n/tmp tmpfs\n/run tmpfs\nlo\n" +
		"script: line 2: nonexistent: not found\n"
	text, rest := output[:min(len(want), len(output))], output[min(len(want), len(output)):]
	if diff := cmp.Diff(want, string(text)); diff != "" {
		t.Error(diff)
	}
	if !bytes.Equal(rest, data) {
		t.Errorf("got %d other bytes than the %d of the file", len(rest), len(data))
	}
}

func TestGuestFails(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		script string
		files  map[string]string
		time   time.Duration
		want   string // in the error
		output string
	}{
		"panic":           {script: "echo before; sleep 1; echo c >/proc/sysrq-trigger", want: "sysrq triggered crash", output: "before\n"},
		"switched off":    {script: "echo before; sleep 1; poweroff -f", want: "stopped before the command had ended", output: "before\n"},
		"time is up":      {script: "echo before; sleep 1000", time: 15 * time.Second, want: context.DeadlineExceeded.Error(), output: "before\n"},
		"too much output": {script: "cat /dev/zero", want: "it writes too much"},
		"relative path":   {files: map[string]string{"relative": "/etc/passwd"}, want: "not an absolute, clean path"},
		"missing file":    {files: map[string]string{"/file": "/nonexistent"}, want: "no such file or directory"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			if test.time != 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, test.time)
				defer cancel()
			}
			output, _, err := machines.RunInKernel(ctx, kernel(t), test.files, []string{"sh", "-c", test.script}, nil)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want one with %q", err, test.want)
			}
			if test.output != "" && string(output) != test.output {
				t.Errorf("got output %q, want %q; %v", output, test.output, err)
			}
		})
	}
}
