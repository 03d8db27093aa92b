// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/internal/grant"
)

// published is one of the objects on the bus that come and go.
type published struct {
	path       dbus.ObjectPath
	iface      string
	properties map[string]dbus.Variant
}

// signal is one that is to be sent.
type signal struct {
	path          dbus.ObjectPath
	iface, member string
	values        []any
}

func added(p published) signal {
	return signal{rootPath, objectManagerInterface, "InterfacesAdded",
		[]any{p.path, map[string]map[string]dbus.Variant{p.iface: p.properties}}}
}

func removed(p published) signal {
	return signal{rootPath, objectManagerInterface, "InterfacesRemoved", []any{p.path, []string{p.iface}}}
}

// changed says what some of the properties are now.
func changed(p published, names ...string) signal {
	values := make(map[string]dbus.Variant, len(names))
	for _, name := range names {
		values[name] = p.properties[name]
	}
	return signal{p.path, propertiesInterface, "PropertiesChanged", []any{p.iface, values, []string{}}}
}

// tellOwner tells a grant's owner, on those connections that asked for it. On the
// system bus a broadcast would be for everybody.
func (f *Front) tellOwner(g grant.Grant, about signal) {
	f.tell(about, func(uid uint32) bool { return uid == g.Owner })
}

// tellAll tells everybody who asked for it.
func (f *Front) tellAll(about signal) { f.tell(about, func(uint32) bool { return true }) }

func (f *Front) tell(about signal, who func(uid uint32) bool) {
	s := f.session.Load()
	if s == nil {
		return
	}
	for _, name := range s.subscribersThat(who) {
		// Who doesn't get it has left, or the bus has.
		_ = s.conn.Signal(name, about.path, about.iface, about.member, about.values...)
	}
}
