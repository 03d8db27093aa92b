// SPDX-License-Identifier: Apache-2.0

package bus

import (
	_ "embed"
	"encoding/xml"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	description "github.com/bpfbroker/bpfbroker/packaging/dbus"
	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
)

const (
	rootPath       = "/org/bpfbroker/Broker1"
	logControlPath = "/org/freedesktop/LogControl1"
)

//go:embed standard.xml
var standardDescription string

// method is a method as it is described and done.
type method struct {
	in     string // the signature of its arguments
	handle handler
}

// nodes are the objects that are always there, with their interfaces, apart from
// those that every object has. The ones in between are for walking down.
var nodes = map[string][]string{
	"/":                 nil,
	"/org":              nil,
	"/org/bpfbroker":    nil,
	rootPath:            {managerInterface, objectManagerInterface},
	rootPath + "/grant": nil,
	objectsPath:         nil,
	"/org/freedesktop":  nil,
	logControlPath:      {logControlInterface},
}

// everywhere are the interfaces that every object has.
var everywhere = []string{peerInterface, introspectableInterface, propertiesInterface}

// interfacesAt returns the interfaces of an object, nil if there is none. The
// object of a grant is there for every id, and that of what is published for every
// name: whether there is such a thing is the broker's to say.
func interfacesAt(object string) []string {
	own, ok := nodes[object]
	if id, found := strings.CutPrefix(object, grantPrefix); found && new(grant.ID).UnmarshalText([]byte(id)) == nil {
		own, ok = []string{grantInterface}, true
	}
	if name := objectName(object); name != "" {
		own, ok = []string{objectInterface}, true
	}
	if !ok {
		return nil
	}
	return slices.Concat(own, everywhere)
}

// find returns a method of an object.
func (f *Front) find(object, iface, member string) (method, error) {
	interfaces := interfacesAt(object)
	switch {
	case interfaces == nil:
		return method{}, failure("UnknownObject", "no such object")
	case !slices.Contains(interfaces, iface):
		return method{}, errInterface
	}
	m, ok := f.methods[iface][member]
	if !ok {
		return method{}, failure("UnknownMethod", "the interface has no such method")
	}
	return m, nil
}

// introspect describes an object.
func (f *Front) introspect(object string) string {
	text := new(strings.Builder)
	text.WriteString("<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n" +
		" \"https://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n<node>\n")
	for _, name := range interfacesAt(object) {
		fmt.Fprintf(text, "  <interface name=%q>%s</interface>\n", name, f.xml[name])
	}
	for _, child := range slices.Sorted(maps.Keys(nodes)) {
		if child != "/" && path.Dir(child) == object {
			fmt.Fprintf(text, "  <node name=%q/>\n", path.Base(child))
		}
	}
	if object == objectsPath {
		for _, o := range f.Broker.ListObjects() {
			fmt.Fprintf(text, "  <node name=%q/>\n", label(o.Name))
		}
	}
	text.WriteString("</node>\n")
	return text.String()
}

// describe makes the methods of what the descriptions say and the handlers do.
// The broker's own have to be in the access table.
func (f *Front) describe(table map[string]broker.Access) error {
	handlers := f.standardHandlers()
	handlers[managerInterface] = f.managerHandlers()
	maps.Copy(handlers[managerInterface], f.objectHandlers())
	handlers[grantInterface] = f.grantHandlers()
	f.methods, f.xml = map[string]map[string]method{}, map[string]string{}
	granted := map[string]bool{}
	for _, text := range []string{description.Description, standardDescription} {
		node, err := parseDescription(text)
		if err != nil {
			return err
		}
		for _, i := range node.Interfaces {
			f.xml[i.Name] = i.Inner
			f.methods[i.Name] = map[string]method{}
			for _, m := range i.Methods {
				handle := handlers[i.Name][m.Name]
				if handle == nil {
					return fmt.Errorf("cannot serve %s.%s: nothing does it", i.Name, m.Name)
				}
				delete(handlers[i.Name], m.Name)
				f.methods[i.Name][m.Name] = method{m.signature("in"), handle}
				row, ours := tableRow(i.Name, m.Name)
				if access, ok := table[row]; ours && (!ok || access.Streams) {
					return fmt.Errorf("cannot serve %s.%s: it is not in the access table", i.Name, m.Name)
				}
				granted[row] = true
			}
		}
	}
	for name, rest := range handlers {
		for member := range rest {
			return fmt.Errorf("cannot serve %s.%s: it is not described", name, member)
		}
	}
	for row, access := range table {
		if !granted[row] && !access.Streams {
			return fmt.Errorf("cannot serve the access table: %s is not described", row)
		}
	}
	return nil
}

// tableRow gives the row of the access table that a method is under: those of a
// grant have "Grant" behind their name.
func tableRow(iface, member string) (row string, ours bool) {
	switch iface {
	case managerInterface:
		return member, true
	case grantInterface:
		return member + "Grant", true
	}
	return "", false
}

// node is a description in D-Bus's introspection format.
type node struct {
	Interfaces []struct {
		Name       string              `xml:"name,attr"`
		Inner      string              `xml:",innerxml"`
		Methods    []describedMethod   `xml:"method"`
		Properties []describedProperty `xml:"property"`
	} `xml:"interface"`
}

type describedMethod struct {
	Name string `xml:"name,attr"`
	Args []struct {
		Type      string `xml:"type,attr"`
		Direction string `xml:"direction,attr"`
	} `xml:"arg"`
}

type describedProperty struct {
	Name string `xml:"name,attr"`
	Type string `xml:"type,attr"`
}

// signature gives the types of the arguments in a direction, in or out.
func (m describedMethod) signature(direction string) string {
	var signature string
	for _, arg := range m.Args {
		if arg.Direction == direction {
			signature += arg.Type
		}
	}
	return signature
}

func parseDescription(text string) (*node, error) {
	n := &node{}
	if err := xml.Unmarshal([]byte(text), n); err != nil {
		return nil, fmt.Errorf("cannot read an interface's description: %w", err)
	}
	return n, nil
}
