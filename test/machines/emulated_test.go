// SPDX-License-Identifier: Apache-2.0

//go:build kernels

package machines_test

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// kernel is what the machines run.
const kernel = "7.2"

// systemTests are this kind of machine's own.
var systemTests = []systemTest{
	{"kernel", "alice", "uname -r | grep -q '^7\\.2\\.'", false},
	{"LSM programs", "root", "grep -qw bpf /sys/kernel/security/lsm", false},
	{"kprobes", "root", "echo p:machines_test do_exit >>/sys/kernel/tracing/kprobe_events && echo -:machines_test >>/sys/kernel/tracing/kprobe_events", false},
	{"modules", "root", "unshare -n sh -c 'ip link add veth0 type veth peer name veth1'", false},
}

// What a command reads and writes passes through a pipe of its own, and nobody waits for somebody else's.
func TestStreams(t *testing.T) {
	t.Parallel()
	data := strings.Repeat("0123456789abcdef", 1<<16)
	slow := shared.Command(t.Context(), "alice", "cat", "/dev/zero")
	if _, err := slow.StdoutPipe(); err != nil { // that nobody reads
		t.Fatal(err)
	}
	if err := slow.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = slow.Cancel()
		_ = slow.Wait()
	}()
	cmd := shared.Command(t.Context(), "root", "tee", "/dev/stderr")
	cmd.Stdin = strings.NewReader(data)
	var output, errors strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &errors
	if err := cmd.Run(); err != nil || output.String() != data || errors.String() != data {
		t.Errorf("%v, with %d bytes of output and %d of errors, want %d", err, output.Len(), errors.Len(), len(data))
	}
	// One pipe for both keeps their order.
	order, err := shared.Command(t.Context(), "bob", "sh", "-c", "for i in 1 2 3; do echo $i; echo $i >&2; done").CombinedOutput()
	if string(order) != "1\n1\n2\n2\n3\n3\n" || err != nil {
		t.Errorf("%q, %v", order, err)
	}
	// An input that doesn't end holds nothing up.
	endless := shared.Command(t.Context(), "bob", "true")
	if _, err := endless.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := endless.Run(); err != nil {
		t.Error(err)
	}
}

// TestNothingIsLeft isn't parallel: it counts what the whole process has.
func TestNothingIsLeft(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(t *testing.T)
	}{
		{"closed twice, commands running", func(t *testing.T) {
			m := boot(t, machines.Options{Kernel: kernel})
			cmd := m.Command(context.WithoutCancel(t.Context()), "alice", "sh", "-c", "trap '' TERM HUP; sleep infinity & wait")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(m.Close(), m.Close()); err != nil {
				t.Error(err)
			}
			if err := cmd.Wait(); err == nil {
				t.Error("the command outlived the machine")
			}
			if err := m.Command(t.Context(), "root", "true").Run(); err == nil {
				t.Error("a closed machine runs commands")
			}
		}},
		{"cancelled while booting", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
			defer cancel()
			if _, err := machines.Boot(ctx, machines.Options{Kernel: kernel}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, want %v", err, context.DeadlineExceeded)
			}
		}},
		{"panic", func(t *testing.T) {
			m := boot(t, machines.Options{Kernel: kernel})
			err := m.Command(t.Context(), "root", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100").Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) {
				t.Errorf("%v, want a command that fails", err)
			}
			awaitEnd(t, m.RootPID())
			if err := m.Close(); err == nil || !strings.Contains(err.Error(), "sysrq triggered crash") {
				t.Errorf("%v, want an error with what the console says", err)
			}
		}},
		{"killed owner", func(t *testing.T) { killOwner(t) }},
	} {
		t.Run(test.name, func(t *testing.T) { leavesNothing(t, test.end) })
	}
}

// A root that doesn't boot says why.
func TestBootFails(t *testing.T) {
	_, err := machines.Boot(t.Context(), machines.Options{Kernel: kernel, Install: func(root string) error {
		return exec.Command("ln", "-sf", "/nonexistent", filepath.Join(root, "sbin/init")).Run()
	}})
	if err == nil || !strings.Contains(err.Error(), "guest: no such file or directory") {
		t.Errorf("%v, want an error with what the console says", err)
	}
	if _, err := machines.Boot(t.Context(), machines.Options{Kernel: "2.6"}); err == nil || !strings.Contains(err.Error(), "2.6") {
		t.Errorf("%v, want an error that names the kernel", err)
	}
}
