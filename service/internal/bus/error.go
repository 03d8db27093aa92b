// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"errors"
	"fmt"
	"strings"

	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/bus/wire"
)

const errorPrefix = busName + ".Error."

var (
	errInternal    = &broker.Error{Name: "Internal", Layer: "request", Reason: "the service failed", Remedy: "see \"journalctl -u bpfbroker.service\""}
	errQuota       = &broker.Error{Name: "QuotaExceeded", Layer: "limit", Reason: "too many requests from this user", Remedy: "wait and try again"}
	errBusy        = &broker.Error{Name: "Busy", Layer: "limit", Reason: "too many requests from all users", Remedy: "wait and try again"}
	errSubscribers = &broker.Error{Name: "QuotaExceeded", Layer: "limit", Reason: "too many connections want signals", Remedy: "close connections that called GetManagedObjects"}
	errTooLarge    = &broker.Error{Name: "MessageTooLarge", Layer: "request",
		Reason: fmt.Sprintf("the message's arguments are longer than %d bytes", wire.MaxBody), Remedy: "send shorter arguments"}
	errNoPidFD = &broker.Error{Name: "KernelNotSupported", Layer: "kernel",
		Reason: "cannot tell who calls: the bus gives no pidfd (ProcessFD) of the caller", Remedy: "use dbus 1.16 or newer, or the socket"}
)

var errInterface = failure("UnknownInterface", "the object has no such interface")

// protocolError is an error of D-Bus's own.
type protocolError struct{ name, text string }

func (e *protocolError) Error() string { return e.text }

func failure(name, format string, args ...any) error {
	return &protocolError{"org.freedesktop.DBus.Error." + name, fmt.Sprintf(format, args...)}
}

func errorName(err error) string {
	var e *protocolError
	if errors.As(err, &e) {
		return e.name
	}
	return errorPrefix + broker.Refuse(err).Name
}

// errorText gives an error's text in the form that the interface's description
// promises.
func errorText(err error) string {
	var p *protocolError
	if errors.As(err, &p) {
		return printable(p.text)
	}
	e := broker.Refuse(err)
	text := fmt.Sprintf("%s (refused by %s", e.Reason, e.Layer)
	if e.Remedy != "" {
		text += "; remedy: " + e.Remedy
	}
	return printable(text + ")")
}

// printable makes a text one that D-Bus has: UTF-8 without NUL.
func printable(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\ufffd"), "\x00", "\ufffd")
}
