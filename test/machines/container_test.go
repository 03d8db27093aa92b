// SPDX-License-Identifier: Apache-2.0

//go:build !kernels

package machines_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// kernel is what the machines run: the host's.
const kernel = ""

// systemTests are this kind of machine's own.
var systemTests = []systemTest{
	{"perf_event_open", "alice", "self perf-event-open", false},
}

func TestTwoMachines(t *testing.T) {
	t.Parallel()
	other := boot(t, machines.Options{})
	if err := other.WriteFile(t.Context(), "/etc/mine", 0o644, nil); err != nil {
		t.Fatal(err)
	}
	if err := shared.Command(t.Context(), "root", "test", "-e", "/etc/mine").Run(); err == nil {
		t.Error("one machine's file is in the other")
	}
	if err := other.Command(t.Context(), "root", "test", "-e", "/usr/bin/self").Run(); err == nil {
		t.Error("what was installed in one machine is in the other")
	}
	for _, m := range []*machines.Machine{shared, other} {
		if output, err := m.Command(t.Context(), "root", "systemctl", "is-system-running").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, output)
		}
	}
}

func TestFailedUnitFailsTheBoot(t *testing.T) {
	t.Parallel()
	const unit = "[Service]\nType=oneshot\nExecStart=sh -c 'echo reason; false'\n"
	_, err := machines.Boot(t.Context(), machines.Options{Install: func(root string) error {
		dir := filepath.Join(root, "etc/systemd/system")
		return errors.Join(os.WriteFile(filepath.Join(dir, "broken.service"), []byte(unit), 0o644),
			os.Symlink("../broken.service", filepath.Join(dir, "multi-user.target.wants/broken.service")))
	}})
	if err == nil || !strings.Contains(err.Error(), "broken.service") {
		t.Errorf("%v, want an error that names the unit", err)
	}
}

// TestNothingIsLeft isn't parallel: it counts what the whole process has.
func TestNothingIsLeft(t *testing.T) {
	errInstall := errors.New("not today")
	for _, test := range []struct {
		name string
		end  func(t *testing.T)
	}{
		{"closed twice", func(t *testing.T) {
			m := boot(t, machines.Options{})
			if err := errors.Join(m.Close(), m.Close()); err != nil {
				t.Error(err)
			}
			if err := m.Command(t.Context(), "root", "true").Run(); err == nil {
				t.Error("a closed machine runs commands")
			}
		}},
		{"cancelled", func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			m, err := machines.Boot(ctx, machines.Options{})
			if err != nil {
				t.Fatal(err)
			}
			pid := m.RootPID()
			cancel()
			awaitEnd(t, pid)
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}},
		{"cancelled while booting", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if _, err := machines.Boot(ctx, machines.Options{}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, want %v", err, context.DeadlineExceeded)
			}
		}},
		{"not installed", func(t *testing.T) {
			_, err := machines.Boot(t.Context(), machines.Options{Install: func(string) error { return errInstall }})
			if !errors.Is(err, errInstall) {
				t.Errorf("%v, want %v", err, errInstall)
			}
		}},
		{"commands running", func(t *testing.T) {
			m := boot(t, machines.Options{})
			cmd := m.Command(context.WithoutCancel(t.Context()), "alice", "sh", "-c", "trap '' TERM HUP; sleep infinity & wait")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			if err := cmd.Wait(); err == nil {
				t.Error("the command outlived the machine")
			}
		}},
		{"init killed", func(t *testing.T) {
			m := boot(t, machines.Options{})
			if err := syscall.Kill(m.RootPID(), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			awaitEnd(t, m.RootPID())
			if err := m.Close(); err == nil {
				t.Error("no error from a machine that was killed")
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) { leavesNothing(t, test.end) })
	}
}

func TestKilledOwner(t *testing.T) {
	mounts := readFile(t, "/proc/self/mountinfo")
	owner := killOwner(t)
	if diff := cmp.Diff(mounts, readFile(t, "/proc/self/mountinfo")); diff != "" {
		t.Errorf("mounts (-before +after):\n%s", diff)
	}
	// Its control group is what the next machine removes.
	boot(t, machines.Options{})
	if left := groups(t, fmt.Sprintf("bpfbroker-%d-", owner)); len(left) != 0 {
		t.Errorf("control groups left: %q", left)
	}
}

func TestInterruptedBuild(t *testing.T) {
	t.Setenv("BPFBROKER_CACHE", t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if _, err := machines.Root(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v, want %v", err, context.DeadlineExceeded)
	}
	for _, pattern := range []string{"building-*", "root-*"} {
		left, err := filepath.Glob(filepath.Join(os.Getenv("BPFBROKER_CACHE"), pattern))
		if err != nil || len(left) != 0 {
			t.Errorf("left: %q, %v", left, err)
		}
	}
	if mounts := readFile(t, "/proc/self/mountinfo"); strings.Contains(mounts, os.Getenv("BPFBROKER_CACHE")) {
		t.Errorf("mounts left:\n%s", mounts)
	}
}
