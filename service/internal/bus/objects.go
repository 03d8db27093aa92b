// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/godbus/dbus/v5"

	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

const (
	objectInterface = busName + ".Object"
	objectsPath     = rootPath + "/object"
	objectPrefix    = objectsPath + "/"
)

// label makes an element of an object path of a name, as sd_bus_path_encode(3)
// does: all but letters and digits, and a digit at the beginning, become _xx.
func label(name string) string {
	text := new(strings.Builder)
	for i := range len(name) {
		c := name[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' && i > 0 {
			text.WriteByte(c)
		} else {
			fmt.Fprintf(text, "_%02x", c)
		}
	}
	return text.String()
}

// objectName returns the name in the path of a published object, "" if that is
// none. Each name has one path.
func objectName(object string) string {
	element, ok := strings.CutPrefix(object, objectPrefix)
	if !ok {
		return ""
	}
	var name []byte
	for rest := element; rest != ""; {
		var c byte
		if c, rest = rest[0], rest[1:]; c == '_' && len(rest) >= 2 {
			n, err := strconv.ParseUint(rest[:2], 16, 8)
			if err != nil {
				return ""
			}
			c, rest = byte(n), rest[2:]
		}
		name = append(name, c)
	}
	if label(string(name)) != element {
		return ""
	}
	return string(name)
}

// summary is what a list shows of a published object.
type summary struct {
	Name, Description, State string
	Available                bool
	Reason, Remedy           string
}

func summarize(o broker.Object) summary {
	s := summary{printable(o.Name), "", string(o.State), o.Refusal == nil, "", ""}
	if o.Object != nil {
		s.Description = o.Object.Description
	}
	if o.Refusal != nil {
		s.Reason, s.Remedy = printable(o.Refusal.Reason), o.Refusal.Remedy
	}
	return s
}

// objectOf is a published object on the bus.
func objectOf(o broker.Object) published {
	s := summarize(o)
	properties := map[string]any{
		"Name": s.Name, "Description": s.Description, "State": s.State,
		"Available": s.Available, "Reason": s.Reason, "Remedy": s.Remedy,
		"Load": "", "Keep": "", "Maps": []string{}, "Programs": []string{},
	}
	if o.Object != nil {
		properties["Load"], properties["Keep"] = o.Object.LoadText(), o.Object.KeepText()
		properties["Maps"], properties["Programs"] = list(o.Object.MapNames()), list(o.Object.ProgramNames())
	}
	return published{dbus.ObjectPath(objectPrefix + label(o.Name)), objectInterface, variants(properties)}
}

// objectSignal is the one for the news of a published object.
func objectSignal(o broker.Object, news catalog.News) signal {
	p := objectOf(o)
	switch news {
	case catalog.Appeared:
		return added(p)
	case catalog.Gone:
		return removed(p)
	}
	return changed(p, "Description", "State", "Available", "Reason", "Remedy", "Load", "Keep", "Maps", "Programs")
}

// objectHandlers are those of the manager's methods for published objects.
func (f *Front) objectHandlers() map[string]handler {
	b := f.Broker
	return map[string]handler{
		"ListObjects": func(_ context.Context, r *request) ([]any, error) {
			if err := r.decodeOptions(nil); err != nil {
				return nil, err
			}
			objects := []summary{}
			for _, o := range b.ListObjects() {
				objects = append(objects, summarize(o))
			}
			return []any{objects}, nil
		},

		"DescribeObject": func(_ context.Context, r *request) ([]any, error) {
			var name string
			if err := r.decodeOptions(nil, &name); err != nil {
				return nil, err
			}
			o, err := b.DescribeObject(name)
			if err != nil {
				return nil, err
			}
			return []any{describeObject(o)}, nil
		},

		"OpenMap": func(ctx context.Context, r *request) ([]any, error) {
			var object, mapName, access string
			if err := r.decodeOptions(nil, &object, &mapName, &access); err != nil {
				return nil, err
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			file, warnings, err := b.OpenMap(ctx, c, object, mapName, catalog.Access(access))
			if err != nil {
				return nil, err
			}
			r.files = []*os.File{file}
			return []any{dbus.UnixFD(file.Fd()), access, list(warnings)}, nil
		},

		"OpenSocket": func(ctx context.Context, r *request) ([]any, error) {
			var object, mapName string
			var queue uint32
			if err := r.decodeOptions(nil, &object, &mapName, &queue); err != nil {
				return nil, err
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			packets, device, err := b.OpenSocket(ctx, c, object, mapName, queue)
			if err != nil {
				return nil, err
			}
			r.files = []*os.File{packets.Socket, packets.Memory}
			return []any{dbus.UnixFD(packets.Socket.Fd()), dbus.UnixFD(packets.Memory.Fd()), device,
				uint32(kernel.PacketFrames), uint32(kernel.PacketFrameSize)}, nil
		},

		"OpenProgram": func(ctx context.Context, r *request) ([]any, error) {
			var object, program string
			if err := r.decodeOptions(nil, &object, &program); err != nil {
				return nil, err
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			file, err := b.OpenProgram(ctx, c, object, program)
			if err != nil {
				return nil, err
			}
			r.files = []*os.File{file}
			return []any{dbus.UnixFD(file.Fd())}, nil
		},

		"MountObjects": func(ctx context.Context, r *request) ([]any, error) {
			var objects []string
			var path string
			var pid uint32
			if err := r.decodeOptions(nil, &objects, &pid, &path); err != nil {
				return nil, err
			}
			if pid > maxPID {
				return nil, failure("InvalidArgs", "cannot take %d for a process id", pid)
			}
			c, err := r.caller()
			if err != nil {
				return nil, err
			}
			process := c.Process
			if pid != 0 {
				if process, err = f.OpenProcess(int(pid)); err != nil {
					return nil, fmt.Errorf("cannot take the process: %w", err)
				}
				defer process.Close()
			}
			m, err := b.MountObjects(ctx, c, objects, process, path)
			if err != nil {
				return nil, err
			}
			r.undo = m.Undo
			return []any{list(m.Pins), list(m.Warnings)}, nil
		},

		"OpenLink": func(_ context.Context, r *request) ([]any, error) {
			var object, link string
			if err := r.decodeOptions(nil, &object, &link); err != nil {
				return nil, err
			}
			l, err := b.OpenLink(object, link)
			if err != nil {
				return nil, err
			}
			return []any{describeLink(l)}, nil
		},
	}
}

func describeObject(o broker.Object) map[string]dbus.Variant {
	maps, programs, links := []map[string]dbus.Variant{}, []map[string]dbus.Variant{}, []map[string]dbus.Variant{}
	for _, m := range o.Maps {
		access := []string{}
		for _, a := range m.Access {
			access = append(access, string(a))
		}
		values := map[string]any{
			"Name": m.Name, "Type": m.Type, "Access": access,
			"KeySize": m.KeySize, "ValueSize": m.ValueSize, "MaxEntries": m.MaxEntries,
		}
		if m.KeyType != "" {
			values["KeyType"] = m.KeyType
		}
		if m.ValueType != "" {
			values["ValueType"] = m.ValueType
		}
		if m.BTF != nil {
			values["BTF"] = m.BTF
		}
		maps = append(maps, variants(values))
	}
	for _, p := range o.Programs {
		values := map[string]any{"Name": p.Name, "Type": p.Type}
		if p.AttachType != "" {
			values["AttachType"] = p.AttachType
		}
		programs = append(programs, variants(values))
	}
	for _, l := range o.Links {
		links = append(links, describeLink(l))
	}
	description := map[string]any{
		"Name":        o.Name,
		"Description": o.Object.Description,
		"State":       string(o.State),
		"Available":   o.Refusal == nil,
		"Load":        o.Object.LoadText(),
		"Keep":        o.Object.KeepText(),
		"Maps":        maps,
		"Programs":    programs,
		"Links":       links,
		"Files":       list(o.Object.Files),
	}
	if o.Refusal != nil {
		description["Reason"], description["Remedy"] = o.Refusal.Reason, o.Refusal.Remedy
	}
	return variants(description)
}

func describeLink(l catalog.LinkInfo) map[string]dbus.Variant {
	return variants(map[string]any{
		"Name": l.Name, "Program": l.Program, "Type": l.Type, "Target": l.Target, "Attached": l.Attached,
	})
}
