// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/godbus/dbus/v5"
)

// benchMock is set, to a bus's address, for a process that is polkit for a
// benchmark: in the same process it would take the time that is measured.
const benchMock = "BPFBROKER_TEST_POLKIT"

// serveMock is the life of that process. It ends when its standard input does.
func serveMock(address string) {
	c, err := dbus.Connect(address)
	if err == nil {
		err = c.ExportMethodTable(map[string]any{
			"CheckAuthorization": func(subject mockSubject, _ string, details map[string]string, _ uint32, _ string) (mockResult, *dbus.Error) {
				if fd, ok := subject.Details["pidfd"].Value().(dbus.UnixFD); ok {
					_ = syscall.Close(int(fd))
				}
				return mockResult{Authorized: true, Details: details}, nil
			},
		}, polkitPath, polkitInterface)
	}
	if err == nil {
		_, err = c.RequestName(polkitName, dbus.NameFlagDoNotQueue)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

func benchBus(b *testing.B) testBus {
	b.Helper()
	bus := newBus(b)
	polkit := exec.Command(os.Args[0])
	polkit.Env = append(os.Environ(), benchMock+"="+bus.Address)
	polkit.Stderr = b.Output()
	stdin, err := polkit.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := polkit.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := polkit.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := stdin.Close(); err != nil {
			b.Error(err)
		}
		if err := polkit.Wait(); err != nil {
			b.Error(err)
		}
	})
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		b.Fatalf("the mock didn't start: %v", err)
	}
	return bus
}

// Check beside the same round trip with nothing in between: BenchmarkCheck may
// cost little more than BenchmarkBare.
func BenchmarkCheck(b *testing.B) {
	bus := benchBus(b)
	p := bus.polkit()
	subject := self(b)
	for b.Loop() {
		if err := p.Check(b.Context(), subject, TokenNetwork, map[string]string{DetailProfile: "network"}, false); err != nil {
			b.Fatal(err)
		}
	}
}

// The same by godbus's own connection.
func BenchmarkGodbus(b *testing.B) {
	bus := benchBus(b)
	polkit := bus.connect().Object(polkitName, polkitPath)
	args := checkArgs(self(b), TokenNetwork, map[string]string{DetailProfile: "network"}, 0, "1")
	for b.Loop() {
		var result mockResult
		if err := polkit.CallWithContext(b.Context(), polkitInterface+".CheckAuthorization", 0, args...).Store(&result); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBare(b *testing.B) {
	bus := benchBus(b)
	c := newRawConn(b, bus)
	check := methodCall(polkitName, polkitPath, polkitInterface, "CheckAuthorization",
		checkArgs(self(b), TokenNetwork, map[string]string{DetailProfile: "network"}, 0, "1")...)
	check.Headers[dbus.FieldUnixFDs] = dbus.MakeVariant(uint32(1))
	call := encode(b, check)
	serial := uint32(1)
	for b.Loop() {
		serial++
		binary.LittleEndian.PutUint32(call[8:], serial)
		c.write(call, self(b).PidFD)
		c.skip()
	}
}
