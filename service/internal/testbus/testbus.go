// SPDX-License-Identifier: Apache-2.0

// Package testbus runs message buses for tests.
package testbus

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/godbus/dbus/v5"
)

// config has the rules of dbus-daemon's system.conf, and then the test's. The
// address is an abstract one, so that other users can reach it.
const config = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <auth>EXTERNAL</auth>
  <listen>unix:abstract=%s</listen>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
  </policy>
  %s
</busconfig>
`

// Bus is a dbus-daemon of the test's own, with the system bus's policy.
type Bus struct {
	// Address is the bus's address, and Socket its socket's name as package net
	// has it.
	Address, Socket string

	t      testing.TB
	config string
	daemon *exec.Cmd
}

// New starts a bus, which ends with the test. rules are elements of a
// configuration (dbus-daemon(1)) that come after the system bus's.
func New(t testing.TB, rules string) *Bus {
	t.Helper()
	dir := t.TempDir()
	name := filepath.Join(dir, "bus")
	b := &Bus{t: t, Address: "unix:abstract=" + name, Socket: "@" + name, config: filepath.Join(dir, "bus.conf")}
	if err := os.WriteFile(b.config, fmt.Appendf(nil, config, name, rules), 0o600); err != nil {
		t.Fatal(err)
	}
	b.Start()
	t.Cleanup(b.Stop)
	return b
}

// Start starts a bus that was stopped.
func (b *Bus) Start() {
	b.t.Helper()
	b.daemon = exec.Command("dbus-daemon", "--nofork", "--nopidfile", "--nosyslog", "--print-address", "--config-file="+b.config)
	b.daemon.Stderr = b.t.Output()
	stdout, err := b.daemon.StdoutPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.daemon.Start(); err != nil {
		b.t.Fatal(err)
	}
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		b.t.Fatalf("dbus-daemon didn't start: %v", err)
	}
}

// Stop kills the bus.
func (b *Bus) Stop() {
	if b.daemon == nil {
		return
	}
	if err := b.daemon.Process.Kill(); err != nil {
		b.t.Error(err)
	}
	_ = b.daemon.Wait() // it was killed, so the error says nothing
	b.daemon = nil
}

// Connect gives a connection of godbus's, which ends with the test.
func (b *Bus) Connect(t testing.TB) *dbus.Conn {
	t.Helper()
	c, err := dbus.Connect(b.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
