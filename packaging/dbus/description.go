// SPDX-License-Identifier: Apache-2.0

// Package dbus holds what is installed for D-Bus, and has the interfaces'
// description for the daemon, which answers Introspect with it.
package dbus

import _ "embed"

// Description is org.bpfbroker.Broker1.xml.
//
//go:embed org.bpfbroker.Broker1.xml
var Description string
