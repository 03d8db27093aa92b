// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// alice is a uid that the tests give to targets.
const alice = 1000

// target starts a process that sleeps in new user and mount namespaces of
// alice's, and takes hold of it.
func target(t testing.TB, flags uintptr) *Process {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test needs root")
	}
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: alice, Size: 1}}
	cmd := exec.Command("sleep", "60")
	var pidfd int
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd, Pdeathsig: syscall.SIGKILL}
	if flags != 0 {
		// The first user namespace belongs to alice only if alice makes it.
		cmd = exec.Command("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "unshare", "-Urm", "sh", "-c", "echo ready; exec sleep 60")
		cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd, Pdeathsig: syscall.SIGKILL}
	}
	_ = ids
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if flags != 0 {
		var b [6]byte
		if _, err := out.Read(b[:]); err != nil {
			t.Fatal(err)
		}
	}
	p, err := NewProcess(os.NewFile(uintptr(pidfd), "pidfd"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func TestDelegate(t *testing.T) {
	p := target(t, 1)
	n, err := p.Namespaces()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	r, err := n.Relation()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
	d := Delegation{Commands: 1<<0 | 1<<5, Maps: 1 << 1, Programs: 1 << 1, Attachments: 1}
	f, err := Delegate(n, d, alice)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := f.Take()
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	if err := f.Attach("/nowhere"); !errors.Is(err, ErrPathNotFound) {
		t.Errorf("got %v", err)
	}
	if err := f.Attach("/mnt"); err != nil {
		t.Fatal(err)
	}
	if err := Detach(n, alice, f.ID, "/mnt"); err != nil {
		t.Fatal(err)
	}
	if err := Detach(n, alice, f.ID, "/mnt"); !errors.Is(err, ErrNotMounted) {
		t.Errorf("got %v", err)
	}
}

func BenchmarkDelegate(b *testing.B) {
	p := target(b, 1)
	n, err := p.Namespaces()
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	d := Delegation{Commands: 1<<0 | 1<<5, Maps: 1 << 1, Programs: 1 << 1, Attachments: 1}
	for b.Loop() {
		f, err := Delegate(n, d, alice)
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}
