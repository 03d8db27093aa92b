// SPDX-License-Identifier: Apache-2.0

//go:build kernels

// Package daemon runs in a guest whose kernel lacks what the daemon needs, and tests what the daemon says there.
package daemon

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// refusal is an error reply.
type refusal struct {
	Error      string
	Parameters struct{ Layer, Reason, Remedy string }
}

func TestKernelNotSupported(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	daemon := start(t, listener)

	// A peer that only listens hears the same as one that asks.
	for _, request := range []string{
		`{"method":"org.bpfbroker.Broker.ListProfiles"}`,
		`{"method":"org.bpfbroker.Broker.AcquireToken","parameters":{"profile":"basic"}}`,
		"",
	} {
		r := call(t, socket, request)
		t.Logf("%s: %+v", request, r)
		if r.Error != "org.bpfbroker.Broker.KernelNotSupported" {
			t.Errorf("got error %q", r.Error)
		}
		if r.Parameters.Layer != "kernel" || r.Parameters.Reason == "" || r.Parameters.Remedy == "" {
			t.Errorf("got %+v, want the kernel's layer, a reason and a remedy", r.Parameters)
		}
	}

	before := descriptors(t, daemon)
	for range 100 {
		call(t, socket, `{"method":"org.bpfbroker.Broker.AcquireToken","parameters":{"profile":"basic"}}`)
	}
	// The peer may hear of its connection's end before the daemon's table does.
	after := descriptors(t, daemon)
	for range 100 {
		if after == before {
			break
		}
		time.Sleep(10 * time.Millisecond)
		after = descriptors(t, daemon)
	}
	if after != before {
		t.Errorf("the daemon had %d file descriptors before 100 calls, and has %d now", before, after)
	}

	if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := daemon.Wait(); err != nil {
		t.Errorf("the daemon ended with %v", err)
	}
}

// start starts the daemon as systemd does.
func start(t *testing.T, listener *net.UnixListener) *exec.Cmd {
	t.Helper()
	file, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	daemon := exec.Command("sh", "-c", "LISTEN_PID=$$ exec /usr/libexec/bpfbrokerd")
	daemon.Env = append(os.Environ(), "LISTEN_FDS=1", "LISTEN_FDNAMES=varlink")
	daemon.ExtraFiles = []*os.File{file}
	daemon.Stdout, daemon.Stderr = os.Stdout, os.Stderr
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = daemon.Process.Kill() })
	return daemon
}

// call sends a request on a connection of its own, and returns the reply.
func call(t *testing.T, socket, request string) refusal {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if request != "" {
		// The daemon may have refused and hung up already.
		if _, err := conn.Write(append([]byte(request), 0)); err != nil && !errors.Is(err, syscall.EPIPE) {
			t.Fatal(err)
		}
	}
	reader := bufio.NewReader(conn)
	data, err := reader.ReadBytes(0)
	if err != nil {
		t.Fatalf("cannot read a reply: %v", err)
	}
	var r refusal
	if err := json.Unmarshal(data[:len(data)-1], &r); err != nil {
		t.Fatalf("cannot read the reply %q: %v", data, err)
	}
	if _, err := reader.ReadByte(); err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after the reply: %v, want the connection's end", err)
	}
	return r
}

// descriptors counts those of the daemon, which has to be alive.
func descriptors(t *testing.T, daemon *exec.Cmd) int {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(daemon.Process.Pid), "fd"))
	if err != nil {
		t.Fatalf("the daemon has gone: %v", err)
	}
	return len(entries)
}
