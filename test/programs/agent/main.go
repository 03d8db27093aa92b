// SPDX-License-Identifier: Apache-2.0

// Command agent is a polkit authentication agent, as a desktop has one, whose
// user has no password: it registers for the session in which it runs, says
// "registered", and of each question the action, "asked", and "withdrawn" when
// polkit takes the question back.
//
//	agent dismiss   closes each dialog at once
//	agent wait      leaves it open
package main

import (
	"fmt"
	"os"

	"github.com/godbus/dbus/v5"
)

const (
	path      = "/org/bpfbroker/test/Agent"
	authority = "org.freedesktop.PolicyKit1"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 || args[0] != "dismiss" && args[0] != "wait" {
		return fmt.Errorf("cannot do %q", args)
	}
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		return err
	}
	defer conn.Close()
	a := &agent{dismiss: args[0] == "dismiss", withdrawn: make(chan string, 1)}
	if err := conn.Export(a, path, authority+".AuthenticationAgent"); err != nil {
		return err
	}
	type subject struct {
		Kind    string
		Details map[string]dbus.Variant
	}
	session := subject{"unix-session", map[string]dbus.Variant{"session-id": dbus.MakeVariant(os.Getenv("XDG_SESSION_ID"))}}
	err = conn.Object(authority, "/org/freedesktop/PolicyKit1/Authority").
		Call(authority+".Authority.RegisterAuthenticationAgent", 0, session, "C.UTF-8", path).Err
	if err != nil {
		return err
	}
	fmt.Println("registered")
	select {}
}

type agent struct {
	dismiss   bool
	withdrawn chan string
}

var canceled = dbus.NewError(authority+".Error.Cancelled", []any{"the dialog was closed"})

type identity struct {
	Kind    string
	Details map[string]dbus.Variant
}

// BeginAuthentication is called by polkit, and returns when the dialog ends.
func (a *agent) BeginAuthentication(action, message, _ string, _ map[string]string, cookie string, _ []identity) *dbus.Error {
	fmt.Printf("asked %s: %s\n", action, message)
	if a.dismiss {
		return canceled
	}
	for withdrawn := range a.withdrawn {
		if withdrawn == cookie {
			fmt.Println("withdrawn")
			break
		}
	}
	return canceled
}

// CancelAuthentication is called by polkit when the question is no longer one.
func (a *agent) CancelAuthentication(cookie string) *dbus.Error {
	a.withdrawn <- cookie
	return nil
}
