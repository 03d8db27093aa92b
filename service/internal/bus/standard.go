// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/godbus/dbus/v5"
)

const (
	peerInterface           = "org.freedesktop.DBus.Peer"
	introspectableInterface = "org.freedesktop.DBus.Introspectable"
	propertiesInterface     = "org.freedesktop.DBus.Properties"
	objectManagerInterface  = "org.freedesktop.DBus.ObjectManager"
	logControlInterface     = "org.freedesktop.LogControl1"
)

// standardHandlers are those of interfaces that others have specified.
func (f *Front) standardHandlers() map[string]map[string]handler {
	return map[string]map[string]handler{
		peerInterface: {
			"Ping": func(context.Context, *request) ([]any, error) { return nil, nil },
			"GetMachineId": func(context.Context, *request) ([]any, error) {
				id, err := os.ReadFile("/etc/machine-id")
				if err != nil {
					return nil, fmt.Errorf("cannot tell the machine's id: %w", err)
				}
				return []any{strings.TrimSpace(string(id))}, nil
			},
		},
		introspectableInterface: {
			"Introspect": func(_ context.Context, r *request) ([]any, error) {
				return []any{f.introspect(r.message.Path)}, nil
			},
		},
		propertiesInterface: {
			"Get":    f.getProperty,
			"GetAll": f.getProperties,
			"Set":    f.setProperty,
		},
		objectManagerInterface: {
			"GetManagedObjects": f.getManagedObjects,
		},
	}
}

// getManagedObjects returns the caller's own grants and the published objects,
// and from then on signals about them go to the caller's connection.
func (f *Front) getManagedObjects(ctx context.Context, r *request) ([]any, error) {
	c, err := r.caller()
	if err != nil {
		return nil, err
	}
	// First, so that nothing is missed.
	if err := r.session.subscribe(r); err != nil {
		return nil, err
	}
	grants, err := f.Broker.ListGrants(ctx, c, false)
	if err != nil {
		return nil, err
	}
	all := map[dbus.ObjectPath]map[string]map[string]dbus.Variant{}
	add := func(p published) { all[p.path] = map[string]map[string]dbus.Variant{p.iface: p.properties} }
	for _, g := range grants {
		add(grantOf(*g))
	}
	for _, o := range f.Broker.ListObjects() {
		add(objectOf(o))
	}
	return []any{all}, nil
}

func (f *Front) getProperty(ctx context.Context, r *request) ([]any, error) {
	var iface, name string
	if err := r.decode(&iface, &name); err != nil {
		return nil, err
	}
	all, err := f.properties(ctx, r, iface)
	if err != nil {
		return nil, err
	}
	value, ok := all[name]
	if !ok {
		return nil, failure("UnknownProperty", "the interface has no such property")
	}
	return []any{value}, nil
}

func (f *Front) getProperties(ctx context.Context, r *request) ([]any, error) {
	var iface string
	if err := r.decode(&iface); err != nil {
		return nil, err
	}
	all, err := f.properties(ctx, r, iface)
	return []any{all}, err
}

// properties returns those of an interface of the request's object.
func (f *Front) properties(ctx context.Context, r *request, iface string) (map[string]dbus.Variant, error) {
	if !slices.Contains(interfacesAt(r.message.Path), iface) {
		return nil, errInterface
	}
	switch iface {
	case grantInterface:
		g, err := r.getGrant(ctx, r.grantID())
		if err != nil {
			return nil, err
		}
		return grantOf(g).properties, nil
	case objectInterface:
		o, err := f.Broker.FindObject(objectName(r.message.Path))
		if err != nil {
			return nil, err
		}
		return objectOf(o).properties, nil
	case logControlInterface:
		return variants(map[string]any{
			"LogLevel":         levelName(f.LogLevel.Level()),
			"LogTarget":        logTarget(),
			"SyslogIdentifier": "bpfbrokerd",
		}), nil
	}
	return map[string]dbus.Variant{}, nil
}

// setProperty sets the log level, the only property that can be set.
func (f *Front) setProperty(_ context.Context, r *request) ([]any, error) {
	var iface, name string
	var value dbus.Variant
	if err := r.decode(&iface, &name, &value); err != nil {
		return nil, err
	}
	if r.message.Path != logControlPath || iface != logControlInterface || name != "LogLevel" {
		return nil, failure("PropertyReadOnly", "the property cannot be set")
	}
	// The bus's policy says so too.
	if r.uid != 0 {
		return nil, failure("AccessDenied", "only root can set the log level")
	}
	text, ok := value.Value().(string)
	for _, l := range levels {
		if ok && l.name == text {
			f.LogLevel.Set(l.level)
			return nil, nil
		}
	}
	return nil, failure("InvalidArgs", "no such log level")
}

// levels are those of org.freedesktop.LogControl1(5), with slog's numbers.
var levels = []struct {
	name  string
	level slog.Level
}{
	{"debug", slog.LevelDebug},
	{"info", slog.LevelInfo},
	{"notice", slog.LevelInfo + 2},
	{"warning", slog.LevelWarn},
	{"err", slog.LevelError},
	{"crit", slog.LevelError + 4},
	{"alert", slog.LevelError + 8},
	{"emerg", slog.LevelError + 12},
}

func levelName(level slog.Level) string {
	name := levels[0].name
	for _, l := range levels {
		if l.level <= level {
			name = l.name
		}
	}
	return name
}

func logTarget() string {
	if os.Getenv("JOURNAL_STREAM") != "" {
		return "journal"
	}
	return "console"
}
