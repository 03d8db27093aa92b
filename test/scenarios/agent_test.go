// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// output is what a program has written so far.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

func (o *output) Write(data []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(data)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func (o *output) waitFor(t *testing.T, text string) {
	t.Helper()
	eventually(t, "the agent says "+text, func() bool { return strings.Contains(o.String(), text) })
}

// startAgent starts an authentication agent, as a desktop's, for a session until
// the test's end, and returns what it says.
func startAgent(t *testing.T, s *machines.Session, mode string) *output {
	t.Helper()
	var said output
	cmd := s.Command(context.WithoutCancel(t.Context()), "agent", mode)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = machines.Signal(cmd, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	said.waitFor(t, "registered\n")
	return &said
}

// The session's agent asks what polkit wants to know, and a dialog that is
// closed is a no.
func TestDialogDismissed(t *testing.T) {
	leavesNothing(t)
	s := login(t, "bob")
	agent := startAgent(t, s, "dismiss")
	out, err := s.Command(t.Context(), "bpfbroker", "run", "-p", "tracing", "--", "true").CombinedOutput()
	if code := exitCode(t, err); code != 77 || !strings.Contains(string(out), "dismissed") || !strings.Contains(string(out), "authenticate when asked") {
		t.Errorf("exit status %d\n%s", code, out)
	}
	if asked := agent.String(); !strings.Contains(asked, "asked org.bpfbroker.token-"+tiers["tracing"]+": ") || !strings.Contains(asked, "the profile tracing.") {
		t.Errorf("the dialog: %s", asked)
	}
	// The same for a service of bob's own, while he is there.
	r := run(t, "bob", "XDG_RUNTIME_DIR=/run/user/1001 systemd-run --user --quiet --collect --wait --pipe -p NotifyAccess=main -- bpfbroker run -p tracing -- true")
	if r.code != 77 || !strings.Contains(r.err, "dismissed") || strings.Count(agent.String(), "asked") != 2 {
		t.Errorf("a service: %+v\n%s", r, agent)
	}
}

// Without an agent nobody can be asked.
func TestNoAgent(t *testing.T) {
	leavesNothing(t)
	s := login(t, "bob")
	out, err := s.Command(t.Context(), "bpfbroker", "run", "-p", "tracing", "--", "true").CombinedOutput()
	if code := exitCode(t, err); code != 77 || !strings.Contains(string(out), "have an authentication agent, or ask the administrator for a polkit rule") {
		t.Errorf("exit status %d\n%s", code, out)
	}
}

// A dialog goes away with the one who asked, however he goes.
func TestDialogWithdrawn(t *testing.T) {
	leavesNothing(t)
	s := login(t, "bob")
	agent := startAgent(t, s, "wait")
	for i, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		cmd := s.Command(context.WithoutCancel(t.Context()), "bpfbroker", "run", "-p", "tracing", "--", "touch", "/tmp/it-ran")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a dialog", func() bool { return strings.Count(agent.String(), "asked") == i+1 })
		if err := machines.Signal(cmd, signal); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		eventually(t, "the dialog goes away", func() bool { return strings.Count(agent.String(), "withdrawn") == i+1 })
	}
	must(t, "root", "! test -e /tmp/it-ran")
}
