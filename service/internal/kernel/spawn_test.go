// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
)

// output runs a command in a Suspended and returns what it prints.
func output(t *testing.T, root bool, capabilities []int, argv ...string) (string, syscall.WaitStatus) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// The process gets its caller's descriptors 0 to 2; a test has no use for
	// its own stdout but can't change it, so the command writes where it is told.
	argv = append([]string{"sh", "-c", argv[0] + " >&" + itoa(int(w.Fd()))}, argv[1:]...)
	if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, w.Fd(), syscall.F_SETFD, 0); errno != 0 {
		t.Fatal(errno)
	}
	s, err := Suspend("/bin/sh", argv, os.Environ(), root)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Exec(capabilities); err != nil {
		s.Kill()
		t.Fatal(err)
	}
	w.Close()
	var b strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			break
		}
	}
	status, err := s.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(b.String()), status
}

func itoa(n int) string { return string(rune('0' + n%10)) }

func TestSuspend(t *testing.T) {
	const capBPF, capNetAdmin = 39, 12
	out, status := output(t, false, []int{capBPF, capNetAdmin}, "id -u; id -g; grep CapAmb /proc/self/status; ulimit -n; grep SigBlk /proc/self/status; kill -TERM $$")
	t.Log(out)
	if !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("got status %v, want SIGTERM", status)
	}
	_, status = output(t, true, nil, "exit 7; ")
	if status.ExitStatus() != 7 {
		t.Errorf("got %v", status)
	}
	s, err := Suspend("/nonexistent", []string{"x"}, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Exec(nil); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("got %v, want ENOENT", err)
	}
	s.Kill()
}
