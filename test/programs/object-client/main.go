// SPDX-License-Identifier: Apache-2.0

// Object-client opens a map of a published object and prints its entries, as
// "KEY VALUE" in hexadecimal:
//
//	object-client OBJECT MAP ACCESS    opens it by the bus
//	object-client                      has it from whoever started this (LISTEN_FDS)
//	object-client PATH                 opens the pin as libbpf's bpf_obj_get does
//	object-client read PATH            opens it with BPF_F_RDONLY
//	object-client write ...            writes to the first entry before that
//
// or waits for a packet with a text and prints the interface and its link (OpenSocket
// and OpenLink of package client):
//
//	object-client receive OBJECT MAP TEXT
//
// or tells what the bus says of a published object, until that has gone:
//
//	object-client watch OBJECT
//
// It needs no rights of its own.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func main() {
	args := os.Args[1:]
	if len(args) == 4 && args[0] == "receive" {
		if err := receive(args[1], args[2], args[3]); err != nil {
			fmt.Fprintln(os.Stderr, "object-client:", err)
			os.Exit(1)
		}
		return
	}
	if len(args) == 2 && args[0] == "watch" {
		if err := watch(args[1]); err != nil {
			fmt.Fprintln(os.Stderr, "object-client:", err)
			os.Exit(1)
		}
		return
	}
	write := len(args) > 0 && args[0] == "write"
	if write {
		args = args[1:]
	}
	if err := run(args, write); err != nil {
		fmt.Fprintln(os.Stderr, "object-client:", err)
		os.Exit(1)
	}
}

func receive(object, name, text string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c := client.New()
	defer c.Close()
	s, err := c.OpenSocket(ctx, object, name, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	l, err := c.OpenLink(ctx, object, "on_packet")
	if err != nil {
		return err
	}
	if err := s.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	fmt.Println("waiting")
	for packet := make([]byte, s.Size); ; {
		n, err := s.Read(packet)
		if err != nil {
			return err
		}
		if bytes.Contains(packet[:n], []byte(text)) {
			fmt.Println(s.Interface, l.Type, l.Target, l.Attached)
			return nil
		}
	}
}

type properties = map[string]dbus.Variant

func watch(name string) error {
	const published = "org.bpfbroker.Broker1.Object"
	bus, err := dbus.ConnectSystemBus()
	if err != nil {
		return err
	}
	defer bus.Close()
	signals := make(chan *dbus.Signal, 100)
	bus.Signal(signals)
	var all map[dbus.ObjectPath]map[string]properties
	if err := bus.Object("org.bpfbroker.Broker1", "/org/bpfbroker/Broker1").Call("org.freedesktop.DBus.ObjectManager.GetManagedObjects", 0).Store(&all); err != nil {
		return err
	}
	for path, interfaces := range all {
		if p := interfaces[published]; p["Name"].Value() == name {
			fmt.Println("found", path, p["State"])
		}
	}
	for s := range signals {
		switch s.Name {
		case "org.freedesktop.DBus.ObjectManager.InterfacesAdded":
			fmt.Println("added", s.Body[0], s.Body[1].(map[string]properties)[published]["State"])
		case "org.freedesktop.DBus.Properties.PropertiesChanged":
			fmt.Println("changed", s.Path, s.Body[1].(properties)["State"])
		case "org.freedesktop.DBus.ObjectManager.InterfacesRemoved":
			fmt.Println("removed", s.Body[0])
			return nil
		}
	}
	return errors.New("the bus has gone")
}

func run(args []string, write bool) error {
	m, err := open(args)
	if err != nil {
		return err
	}
	defer m.Close()
	if write {
		if err := m.Put(make([]byte, m.KeySize()), make([]byte, m.ValueSize())); err != nil {
			return err
		}
	}
	var key, value []byte
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		fmt.Printf("%x %x\n", key, value)
	}
	return entries.Err()
}

func open(args []string) (*ebpf.Map, error) {
	switch len(args) {
	case 0:
		return ebpf.NewMapFromFD(3)
	case 1:
		return ebpf.LoadPinnedMap(args[0], nil)
	case 2:
		return ebpf.LoadPinnedMap(args[1], &ebpf.LoadPinOptions{ReadOnly: true})
	case 3:
	default:
		return nil, fmt.Errorf("these are no arguments: %q", args)
	}
	bus, err := dbus.ConnectSystemBus()
	if err != nil {
		return nil, err
	}
	defer bus.Close()
	var fd dbus.UnixFD
	var access string
	var warnings []string
	call := bus.Object("org.bpfbroker.Broker1", "/org/bpfbroker/Broker1").Call("org.bpfbroker.Broker1.Manager.OpenMap", 0,
		args[0], args[1], args[2], map[string]dbus.Variant{})
	if err := call.Store(&fd, &access, &warnings); err != nil {
		return nil, err
	}
	for _, warning := range warnings {
		fmt.Fprintln(os.Stderr, warning)
	}
	return ebpf.NewMapFromFD(int(fd))
}
