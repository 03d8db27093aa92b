// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

func TestUnderManager(t *testing.T) {
	own := strconv.Itoa(os.Getpid())
	for _, test := range []struct {
		name, socket, started, main string
		want                        bool
	}{
		{"no service", "", "", "", false},
		{"the main process", "/run/notify", own, "", true},
		{"a manager that doesn't listen", "", own, "", false},
		{"a child of the main process", "/run/notify", "1", "", false},
		{"an older systemd", "/run/notify", "", "", false},
		{"ExecReload=", "/run/notify", own, "17", false},
	} {
		t.Setenv("NOTIFY_SOCKET", test.socket)
		t.Setenv("SYSTEMD_EXEC_PID", test.started)
		t.Setenv("MAINPID", test.main)
		if got := underManager(); got != test.want {
			t.Errorf("%s: got %v", test.name, got)
		}
	}
}

func TestHandOver(t *testing.T) {
	address := filepath.Join(t.TempDir(), "notify")
	t.Setenv("NOTIFY_SOCKET", address)
	if err := handOver(t.Context(), 17); err == nil {
		t.Error("handed over to nobody")
	}
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	receive := func() string {
		t.Helper()
		// Without room for a descriptor the kernel closes it.
		buffer := make([]byte, 64)
		n, err := manager.Read(buffer)
		if err != nil {
			t.Error(err)
		}
		return string(buffer[:n])
	}

	// It waits for the manager.
	done := make(chan error)
	go func() { done <- handOver(t.Context(), 17) }()
	if got := receive(); got != "MAINPID=17" {
		t.Errorf("got %q", got)
	}
	select {
	case err := <-done:
		t.Fatalf("it didn't wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if got := receive(); got != "BARRIER=1" {
		t.Errorf("got %q", got)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}

	// But not for ever.
	ctx, cancel := context.WithCancel(t.Context())
	go func() { done <- handOver(ctx, 17) }()
	receive()
	cancel()
	if err := <-done; err == nil {
		t.Error("handed over to a manager that doesn't answer")
	}
}
