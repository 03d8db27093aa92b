// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/godbus/dbus/v5"
)

const (
	busName  = "org.bpfbroker.Broker1"
	rootPath = "/org/bpfbroker/Broker1"
	mebibyte = 1 << 20
)

// onBus does to the broker on the bus what no client should.
func onBus(what string, args []string) error {
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		return err
	}
	defer conn.Close()
	switch what {
	case "bus-nonsense":
		return nonsense(conn, args)
	case "bus-fds":
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		return busFiles(conn, n)
	case "bus-crowd":
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		return crowd(n)
	}
	return fmt.Errorf("cannot understand %q", what)
}

// options are none.
type options = map[string]dbus.Variant

var none = options{}

// methods have arguments that could be right.
var methods = []struct {
	iface, member string
	args          []any
}{
	{"Manager", "AcquireToken", []any{"network", none}},
	{"Manager", "MountToken", []any{"network", uint32(1), "/mnt", none}},
	{"Manager", "ListProfiles", []any{none}},
	{"Manager", "DescribeProfile", []any{"network", none}},
	{"Manager", "ListGrants", []any{none}},
	{"Manager", "GetGrant", []any{"0123456789abcdef", none}},
	{"Manager", "Check", []any{none}},
	{"Grant", "Renew", []any{none}},
	{"Grant", "Revoke", []any{none}},
}

// nonsense calls every method in every wrong way and prints what comes of it, a
// line each: the kind of nonsense, the method, the error. ids are grants that
// aren't the caller's or aren't there, pids are no targets.
func nonsense(conn *dbus.Conn, args []string) error {
	say := func(kind, member string, err error) { fmt.Println(kind, member, errorName(err)) }
	for _, m := range methods {
		path := rootPath
		if m.iface == "Grant" {
			path += "/grant/0123456789abcdef"
		}
		do := func(path string, args ...any) error {
			return conn.Object(busName, dbus.ObjectPath(path)).Call(busName+"."+m.iface+"."+m.member, 0, args...).Err
		}
		// last has the arguments with others for the last, the options.
		last := func(o any) []any { return append(slices.Clone(m.args[:len(m.args)-1]), o) }
		for _, wrong := range [][]any{nil, append(slices.Clone(m.args), "more"), last("x"), last(map[string]string{}), last([]options{none})} {
			say("signature", m.member, do(path, wrong...))
		}
		say("option", m.member, do(path, last(options{"nonesuch": dbus.MakeVariant(true)})...))
		say("large", m.member, do(path, last(options{"all": dbus.MakeVariant(strings.Repeat("x", mebibyte))})...))
		for i, arg := range m.args {
			if _, text := arg.(string); text {
				large := slices.Clone(m.args)
				large[i] = strings.Repeat("x", mebibyte)
				say("large", m.member, do(path, large...))
			}
		}
		for _, elsewhere := range []string{"/", "/org", rootPath + "/grant", rootPath + "/grant/x", rootPath + "/grant/0123456789abcdef/x",
			rootPath + "/grant/0123456789ABCDEF", "/" + strings.Repeat("x", 100_000)} {
			say("path", m.member, do(elsewhere, m.args...))
		}
		if m.iface == "Grant" {
			say("object", m.member, do(rootPath, m.args...))
			for _, id := range args {
				if len(id) == 16 {
					say("id", m.member, do(rootPath+"/grant/"+id, m.args...))
				}
			}
		} else {
			say("object", m.member, do(rootPath+"/grant/0123456789abcdef", m.args...))
		}
	}
	manager := conn.Object(busName, rootPath)
	for _, id := range append(args, "", "x", "../0123456789abcdef", "0123456789ABCDEF", "\x1b[2J") {
		if !isPID(id) {
			say("id", "GetGrant", manager.Call(busName+".Manager.GetGrant", 0, id, none).Err)
		}
	}
	say("option", "ListGrants", manager.Call(busName+".Manager.ListGrants", 0, options{"all": dbus.MakeVariant("yes")}).Err)
	for _, pid := range args {
		if n, err := strconv.ParseUint(pid, 10, 32); isPID(pid) && err == nil {
			say("pid-"+pid, "MountToken", manager.Call(busName+".Manager.MountToken", 0, "network", uint32(n), "/mnt", none).Err)
		}
	}
	return nil
}

func isPID(arg string) bool {
	return len(arg) < 16 && strings.Trim(arg, "0123456789") == "" && arg != ""
}

func errorName(err error) string {
	if e, ok := err.(dbus.Error); ok {
		return strings.TrimPrefix(strings.TrimPrefix(e.Name, busName+".Error."), "org.freedesktop.DBus.Error.")
	}
	return fmt.Sprint(err)
}

// busFiles sends messages with descriptors, calls, signals and pings in turn, and
// prints how many of the calls got which error.
func busFiles(conn *dbus.Conn, n int) error {
	answers := map[string]int{}
	for i := range n {
		fields := map[dbus.HeaderField]dbus.Variant{
			dbus.FieldDestination: dbus.MakeVariant(busName),
			dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath(rootPath)),
			dbus.FieldInterface:   dbus.MakeVariant(busName + ".Manager"),
			dbus.FieldMember:      dbus.MakeVariant("ListProfiles"),
			dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf(none, dbus.UnixFD(0))),
			dbus.FieldUnixFDs:     dbus.MakeVariant(uint32(1)),
		}
		m := &dbus.Message{Type: dbus.TypeMethodCall, Headers: fields, Body: []any{none, dbus.UnixFD(0)}}
		switch i % 3 {
		case 1:
			m.Type = dbus.TypeSignal
		case 2:
			fields[dbus.FieldInterface] = dbus.MakeVariant("org.freedesktop.DBus.Peer")
			fields[dbus.FieldMember] = dbus.MakeVariant("Ping")
		}
		call := conn.Send(m, make(chan *dbus.Call, 1))
		if m.Type == dbus.TypeMethodCall {
			<-call.Done
			answers[errorName(call.Err)]++
		} else if i%30 == 1 {
			// The bus takes in so many descriptors of a connection at a time.
			if err := conn.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil {
				return err
			}
		}
	}
	fmt.Println(answers)
	return nil
}

// crowd keeps n calls under way until standard input ends, and prints how many
// calls there were when all of the first are sent. The bus lets a connection wait
// for 128 answers.
func crowd(n int) error {
	const each = 50
	done := make(chan struct{})
	var calls, sent sync.WaitGroup
	for range n / each {
		conn, err := dbus.ConnectSystemBus()
		if err != nil {
			return err
		}
		defer conn.Close()
		for range each {
			sent.Add(1)
			calls.Go(func() {
				for first := true; ; first = false {
					call := conn.Object(busName, rootPath).Go(busName+".Manager.Check", 0, nil, none)
					if first {
						sent.Done()
					}
					<-call.Done
					select {
					case <-done:
						return
					default:
					}
				}
			})
		}
	}
	sent.Wait()
	fmt.Println(n)
	_, err := io.Copy(io.Discard, os.Stdin)
	close(done)
	calls.Wait()
	return err
}
