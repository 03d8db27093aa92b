// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"

	description "github.com/bpfbroker/bpfbroker/packaging/dbus"
	"github.com/bpfbroker/bpfbroker/service/internal/broker"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
)

// The daemon knows nothing but what is described, so this walks through all of it.
func TestEveryMethod(t *testing.T) {
	f := newFixture(t)
	c := f.connectAs(t, 0)
	c.manager("AcquireToken", "network", noOptions) // the grant of the calls below
	const id = "00000000000003e8"
	paths := map[string]string{managerInterface: rootPath, objectManagerInterface: rootPath, grantInterface: grantPrefix + id}
	args := map[string][]any{
		"AcquireToken":    {"network", noOptions},
		"MountToken":      {"network", uint32(os.Getpid()), "/sys/fs/bpf", noOptions},
		"ListProfiles":    {noOptions},
		"DescribeProfile": {"network", noOptions},
		"ListGrants":      {noOptions},
		"GetGrant":        {id, noOptions},
		"ExplainGrant":    {id, noOptions},
		"Check":           {noOptions},
		"ListObjects":     {noOptions},
		"DescribeObject":  {"tcp", noOptions},
		"OpenLink":        {"tcp", "p", noOptions},
		"OpenMap":         {"tcp", "m", "read-only", noOptions},
		"MountObjects":    {[]string{"tcp"}, uint32(0), "/mnt", noOptions},
		"OpenSocket":      {"tcp", "m", uint32(0), noOptions},
		"OpenProgram":     {"tcp", "p", noOptions},
		"Renew":           {noOptions},
		"Revoke":          {noOptions},
		"Get":             {logControlInterface, "LogLevel"},
		"GetAll":          {logControlInterface},
		"Set":             {logControlInterface, "LogLevel", dbus.MakeVariant("debug")},
	}
	for _, text := range []string{description.Description, standardDescription} {
		node, err := parseDescription(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range node.Interfaces {
			for _, m := range i.Methods {
				path := paths[i.Name]
				if path == "" {
					path = logControlPath
				}
				call := c.call(path, i.Name+"."+m.Name, args[m.Name]...)
				closeFiles(t, call)
				if m.Name == "GetMachineId" && errorOf(call) == "Internal" {
					continue // not every machine that runs tests has one
				}
				if call.Err != nil {
					t.Errorf("%s: %v", m.Name, call.Err)
					continue
				}
				var got string
				if len(call.Body) > 0 {
					got = signatureOf(call.Body)
				}
				if want := m.signature("out"); got != want {
					t.Errorf("%s gave (%s), not (%s)", m.Name, got, want)
				}
			}
		}
	}
	if f.LogLevel.Level() != slog.LevelDebug {
		t.Error("the log level was not set")
	}
}

// signatureOf is dbus.SignatureOf for decoded values, where structs are []any.
func signatureOf(values []any) string {
	var signature string
	for _, value := range values {
		if rows, ok := value.([][]any); ok && len(rows) > 0 {
			signature += "a(" + dbus.SignatureOf(rows[0]...).String() + ")"
			continue
		}
		signature += dbus.SignatureOf(value).String()
	}
	return signature
}

func TestPropertiesAreAsDescribed(t *testing.T) {
	f := newFixture(t)
	c := f.bus.connect(t)
	closeFiles(t, c.manager("AcquireToken", "network", noOptions))
	for _, text := range []string{description.Description, standardDescription} {
		node, err := parseDescription(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range node.Interfaces {
			path, ok := map[string]string{
				grantInterface: grantPrefix + "00000000000003e8", objectInterface: objectPrefix + "tcp", logControlInterface: logControlPath,
			}[i.Name]
			if !ok {
				continue
			}
			described, got := map[string]string{}, map[string]string{}
			for _, p := range i.Properties {
				described[p.Name] = p.Type
			}
			var all map[string]dbus.Variant
			if err := c.call(path, propertiesInterface+".GetAll", i.Name).Store(&all); err != nil {
				t.Fatal(err)
			}
			for name, value := range all {
				got[name] = value.Signature().String()
				var one dbus.Variant
				if err := c.call(path, propertiesInterface+".Get", i.Name, name).Store(&one); err != nil || one.String() != value.String() {
					t.Errorf("%s is %v and %v, %v", name, value, one, err)
				}
			}
			if diff := cmp.Diff(described, got); diff != "" {
				t.Errorf("properties of %s (-described +got):\n%s", i.Name, diff)
			}
		}
	}
}

// The policy, the description and the access table name the same members.
func TestPolicyNamesTheSameMembers(t *testing.T) {
	data, err := os.ReadFile(ourPolicy)
	if err != nil {
		t.Fatal(err)
	}
	var policy struct {
		Policies []struct {
			Allow []struct {
				Destination string `xml:"send_destination,attr"`
				Interface   string `xml:"send_interface,attr"`
				Member      string `xml:"send_member,attr"`
				Own         string `xml:"own,attr"`
			} `xml:"allow"`
		} `xml:"policy"`
	}
	if err := xml.Unmarshal(data, &policy); err != nil {
		t.Fatal(err)
	}
	allowed, described, table := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, p := range policy.Policies {
		for _, a := range p.Allow {
			if a.Own == busName {
				continue
			}
			if a.Destination != busName || a.Interface == "" || a.Member == "" {
				t.Errorf("%v allows more than a member", a)
			}
			allowed[a.Interface+"."+a.Member] = true
		}
	}
	for _, text := range []string{description.Description, standardDescription} {
		node, err := parseDescription(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range node.Interfaces {
			for _, m := range i.Methods {
				described[i.Name+"."+m.Name] = true
				if row, ours := tableRow(i.Name, m.Name); ours {
					table[row] = true
				}
			}
		}
	}
	if diff := cmp.Diff(described, allowed); diff != "" {
		t.Errorf("members (-description +policy):\n%s", diff)
	}
	single := maps.Clone(broker.Methods)
	maps.DeleteFunc(single, func(_ string, a broker.Access) bool { return a.Streams })
	if diff := cmp.Diff(slices.Sorted(maps.Keys(single)), slices.Sorted(maps.Keys(table))); diff != "" {
		t.Errorf("methods (-access table +description):\n%s", diff)
	}
}

func TestMethodsNeedARow(t *testing.T) {
	f := &Front{Config: Config{Broker: newFakeBroker()}}
	table := maps.Clone(broker.Methods)
	if err := f.describe(table); err != nil {
		t.Error(err)
	}
	table["New"] = broker.Access{}
	if err := f.describe(table); err == nil {
		t.Error("a row without a method is served")
	}
	delete(table, "New")
	table["Check"] = broker.Access{Streams: true}
	if err := f.describe(table); err == nil {
		t.Error("a method of the socket alone is served")
	}
	table["Check"] = broker.Access{}
	delete(table, "RevokeGrant")
	if err := f.describe(table); err == nil {
		t.Error("a method without a row is served")
	}
}

func TestIntrospection(t *testing.T) {
	f := newFixture(t)
	c := f.bus.connect(t)
	// As busctl tree does.
	var walk func(path string) []string
	walk = func(path string) []string {
		var text string
		if err := c.call(path, introspectableInterface+".Introspect").Store(&text); err != nil {
			t.Fatal(err)
		}
		var node struct {
			Children []struct {
				Name string `xml:"name,attr"`
			} `xml:"node"`
		}
		if err := xml.Unmarshal([]byte(text), &node); err != nil {
			t.Fatal(err)
		}
		found := []string{path}
		for _, child := range node.Children {
			found = append(found, walk(strings.TrimSuffix(path, "/")+"/"+child.Name)...)
		}
		return found
	}
	got := walk("/")
	slices.Sort(got)
	want := slices.Sorted(maps.Keys(nodes))
	want = append(want, objectPrefix+label("tcp"), objectPrefix+label(oddName))
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("objects (-want +found by walking):\n%s", diff)
	}
	var text string
	if err := c.call(objectPrefix+label(oddName), introspectableInterface+".Introspect").Store(&text); err != nil || !strings.Contains(text, `"Programs"`) {
		t.Errorf("an object's description: %v\n%s", err, text)
	}
	if err := c.call(grantPrefix+"0123456789abcdef", introspectableInterface+".Introspect").Store(&text); err != nil || !strings.Contains(text, `"OwnerUID"`) {
		t.Errorf("a grant's description: %v\n%s", err, text)
	}
}

func TestBadCalls(t *testing.T) {
	f := newFixture(t)
	f.Users = unlimited // a MiB is as much as many calls
	c := f.connectAs(t, 0)
	option := map[string]dbus.Variant{"x": dbus.MakeVariant(1)}
	const gone = grantPrefix + "0123456789abcdef"
	tests := map[string]struct {
		path, method string
		args         []any
		want         string
	}{
		"no arguments":         {rootPath, managerInterface + ".AcquireToken", nil, "InvalidArgs"},
		"too few":              {rootPath, managerInterface + ".AcquireToken", []any{"a"}, "InvalidArgs"},
		"too many":             {rootPath, managerInterface + ".AcquireToken", []any{"a", noOptions, "b"}, "InvalidArgs"},
		"wrong type":           {rootPath, managerInterface + ".AcquireToken", []any{1, noOptions}, "InvalidArgs"},
		"variant for a string": {rootPath, managerInterface + ".AcquireToken", []any{dbus.MakeVariant("a"), noOptions}, "InvalidArgs"},
		"a{ss} for options":    {rootPath, managerInterface + ".AcquireToken", []any{"a", map[string]string{}}, "InvalidArgs"},
		"signed pid":           {rootPath, managerInterface + ".MountToken", []any{"a", int32(-1), "/", noOptions}, "InvalidArgs"},
		"unknown option":       {rootPath, managerInterface + ".AcquireToken", []any{"a", option}, "InvalidArgs"},
		"unknown option, list": {rootPath, managerInterface + ".ListProfiles", []any{option}, "InvalidArgs"},
		"option of wrong type": {rootPath, managerInterface + ".ListGrants", []any{map[string]dbus.Variant{"all": dbus.MakeVariant("yes")}}, "InvalidArgs"},
		"pid 0":                {rootPath, managerInterface + ".MountToken", []any{"a", uint32(0), "/", noOptions}, "InvalidArgs"},
		"pid -1":               {rootPath, managerInterface + ".MountToken", []any{"a", ^uint32(0), "/", noOptions}, "InvalidArgs"},
		"pid of nobody":        {rootPath, managerInterface + ".MountToken", []any{"a", uint32(maxPID), "/", noOptions}, "ProcessGone"},
		"1 MiB profile":        {rootPath, managerInterface + ".AcquireToken", []any{strings.Repeat("x", 1<<20), noOptions}, "MessageTooLarge"},
		"long path":            {rootPath, managerInterface + ".MountToken", []any{"a", uint32(1), strings.Repeat("x", 9000), noOptions}, "MessageTooLarge"},
		"1 MiB object path":    {"/" + strings.Repeat("x", 1<<18), managerInterface + ".ListProfiles", []any{noOptions}, "UnknownObject"},
		"error with NUL":       {rootPath, managerInterface + ".AcquireToken", []any{"bad", noOptions}, "NoSuchProfile"},
		"no such profile":      {rootPath, managerInterface + ".DescribeProfile", []any{"a", noOptions}, "NoSuchProfile"},
		"empty profile":        {rootPath, managerInterface + ".DescribeProfile", []any{"", noOptions}, "NoSuchProfile"},
		"no such grant":        {rootPath, managerInterface + ".GetGrant", []any{"0123456789abcdef", noOptions}, "NoSuchGrant"},
		"no id":                {rootPath, managerInterface + ".GetGrant", []any{"../../x", noOptions}, "NoSuchGrant"},
		"ended grant":          {gone, grantInterface + ".Revoke", []any{noOptions}, "NoSuchGrant"},
		"ended grant, renewed": {gone, grantInterface + ".Renew", []any{noOptions}, "NoSuchGrant"},
		"ended grant, read":    {gone, propertiesInterface + ".GetAll", []any{grantInterface}, "NoSuchGrant"},
		"short id":             {grantPrefix + "0123", grantInterface + ".Revoke", []any{noOptions}, "UnknownObject"},
		"upper-case id":        {grantPrefix + "0123456789ABCDEF", grantInterface + ".Revoke", []any{noOptions}, "UnknownObject"},
		"below a grant":        {gone + "/x", grantInterface + ".Revoke", []any{noOptions}, "UnknownObject"},
		"no published object":  {objectPrefix + "nonesuch", propertiesInterface + ".GetAll", []any{objectInterface}, "NoSuchObject"},
		"one property of none": {objectPrefix + "nonesuch", propertiesInterface + ".Get", []any{objectInterface, "State"}, "NoSuchObject"},
		"an object's on grant": {gone, propertiesInterface + ".GetAll", []any{objectInterface}, "UnknownInterface"},
		"set an object's":      {objectPrefix + "tcp", propertiesInterface + ".Set", []any{objectInterface, "State", dbus.MakeVariant("loaded")}, "PropertyReadOnly"},
		"no property of its":   {objectPrefix + "tcp", propertiesInterface + ".Get", []any{objectInterface, "Profile"}, "UnknownProperty"},
		"not encoded":          {objectPrefix + "0_a_2db", propertiesInterface + ".GetAll", []any{objectInterface}, "UnknownObject"},
		"encoded needlessly":   {objectPrefix + "_74cp", propertiesInterface + ".GetAll", []any{objectInterface}, "UnknownObject"},
		"encoded in capitals":  {objectPrefix + "a_2Db", propertiesInterface + ".GetAll", []any{objectInterface}, "UnknownObject"},
		"encoded by half":      {objectPrefix + "a_2", propertiesInterface + ".GetAll", []any{objectInterface}, "UnknownObject"},
		"encoded badly":        {objectPrefix + "a_xxb", propertiesInterface + ".GetAll", []any{objectInterface}, "UnknownObject"},
		"below an object":      {objectPrefix + "tcp/x", propertiesInterface + ".GetAll", []any{objectInterface}, "UnknownObject"},
		"1 MiB name in a path": {objectPrefix + strings.Repeat("x", 1<<20), propertiesInterface + ".GetAll", []any{objectInterface}, "UnknownObject"},
		"1 MiB object":         {rootPath, managerInterface + ".DescribeObject", []any{strings.Repeat("x", 1<<20), noOptions}, "MessageTooLarge"},
		"no such object":       {"/x", managerInterface + ".ListProfiles", []any{noOptions}, "UnknownObject"},
		"wrong object":         {"/", managerInterface + ".ListProfiles", []any{noOptions}, "UnknownInterface"},
		"grant's on manager":   {rootPath, grantInterface + ".Revoke", []any{noOptions}, "UnknownInterface"},
		"set a grant's":        {gone, propertiesInterface + ".Set", []any{grantInterface, "Tier", dbus.MakeVariant("basic")}, "PropertyReadOnly"},
		"no such property":     {logControlPath, propertiesInterface + ".Get", []any{logControlInterface, "x"}, "UnknownProperty"},
		"properties of none":   {rootPath, propertiesInterface + ".GetAll", []any{"x.y"}, "UnknownInterface"},
		"no such level":        {logControlPath, propertiesInterface + ".Set", []any{logControlInterface, "LogLevel", dbus.MakeVariant("loud")}, "InvalidArgs"},
		"level of wrong type":  {logControlPath, propertiesInterface + ".Set", []any{logControlInterface, "LogLevel", dbus.MakeVariant(1)}, "InvalidArgs"},
		"panic":                {rootPath, managerInterface + ".DescribeProfile", []any{"panic", noOptions}, "Internal"},
		// The policy's:
		"not a member":   {rootPath, managerInterface + ".New", nil, "AccessDenied"},
		"an fd":          {rootPath, managerInterface + ".ListProfiles", []any{dbus.UnixFD(2)}, "AccessDenied"},
		"an fd for Ping": {rootPath, peerInterface + ".Ping", []any{dbus.UnixFD(2)}, "AccessDenied"},
		"an fd by root":  {logControlPath, propertiesInterface + ".Set", []any{logControlInterface, "LogLevel", dbus.MakeVariant(dbus.UnixFD(2))}, "AccessDenied"},
	}
	before := openFiles(t)
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			call := c.call(test.path, test.method, test.args...)
			if got := errorOf(call); got != test.want {
				t.Errorf("got %q, want %s (%v)", got, test.want, call.Err)
			}
			if call.Err != nil && strings.Contains(call.Err.Error(), "secret") {
				t.Errorf("told the caller %v", call.Err)
			}
		})
	}
	if err := c.manager("ListProfiles", noOptions).Err; err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}
}

func TestErrorText(t *testing.T) {
	tests := []struct {
		err        error
		name, text string
	}{
		{&broker.Error{Name: "A", Reason: "r", Layer: "l", Remedy: "m"}, errorPrefix + "A", "r (refused by l; remedy: m)"},
		{&broker.Error{Name: "A", Reason: "r", Layer: "l"}, errorPrefix + "A", "r (refused by l)"},
		{failure("B", "x\x00\xff"), "org.freedesktop.DBus.Error.B", "x\ufffd\ufffd"},
		{fmt.Errorf("x: %w", grant.ErrNotFound), errorPrefix + "NoSuchGrant", "x: no such grant (refused by request; remedy: see \"bpfbroker list\")"},
	}
	for _, test := range tests {
		if name, text := errorName(test.err), errorText(test.err); name != test.name || text != test.text {
			t.Errorf("%v: %s %q", test.err, name, text)
		}
	}
}

func TestCaller(t *testing.T) {
	f := newFixture(t)
	c := f.bus.connect(t)
	closeFiles(t, c.manager("AcquireToken", "network", noOptions))
	got := f.broker.caller()
	if got.UID != uint32(os.Getuid()) || got.Process.PID != os.Getpid() || got.BusName != c.Names()[0] || got.Interactive {
		t.Errorf("caller is %+v", got)
	}
	call := &dbus.Message{Type: dbus.TypeMethodCall, Flags: dbus.FlagAllowInteractiveAuthorization, Body: []any{"network", noOptions},
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldDestination: dbus.MakeVariant(busName),
			dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath(rootPath)),
			dbus.FieldInterface:   dbus.MakeVariant(managerInterface),
			dbus.FieldMember:      dbus.MakeVariant("AcquireToken"),
			dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf("", noOptions)),
		}}
	done := <-c.Send(call, make(chan *dbus.Call, 1)).Done
	closeFiles(t, done)
	if done.Err != nil || !f.broker.caller().Interactive {
		t.Errorf("interaction isn't allowed: %v", done.Err)
	}
}

// dbus before 1.16 gives no pidfd.
func TestNoPidFD(t *testing.T) {
	f := serveOn(t, newBus(t), func(f *fixture) {
		f.processFD = func(file *os.File, _ uint32) *os.File {
			if file != nil {
				_ = file.Close()
			}
			return nil
		}
	})
	c := f.bus.connect(t)
	if got := errorOf(c.manager("AcquireToken", "network", noOptions)); got != "KernelNotSupported" {
		t.Errorf("got %q", got)
	}
	if err := c.manager("ListProfiles", noOptions).Err; err != nil {
		t.Error(err)
	}
}

func TestOthersGrants(t *testing.T) {
	f := newFixture(t)
	alice, bob := f.connectAs(t, 1001), f.connectAs(t, 1002)
	var path dbus.ObjectPath
	call := alice.manager("MountToken", "network", uint32(os.Getpid()), "/sys/fs/bpf", noOptions)
	if err := call.Store(&path); err != nil {
		t.Fatal(err)
	}
	for _, who := range []struct {
		*client
		grants int
		err    string
	}{{bob, 0, "NoSuchGrant"}, {alice, 1, ""}} {
		var objects map[dbus.ObjectPath]any
		err := who.call(rootPath, objectManagerInterface+".GetManagedObjects").Store(&objects)
		maps.DeleteFunc(objects, func(path dbus.ObjectPath, _ any) bool { return !strings.HasPrefix(string(path), grantPrefix) })
		if err != nil || len(objects) != who.grants {
			t.Errorf("%d grants: %v", len(objects), err)
		}
		var rows [][]any
		if err := who.manager("ListGrants", noOptions).Store(&rows); err != nil || len(rows) != who.grants {
			t.Errorf("%d rows: %v", len(rows), err)
		}
		for _, call := range []*dbus.Call{
			who.call(string(path), propertiesInterface+".Get", grantInterface, "Profile"),
			who.call(string(path), propertiesInterface+".GetAll", grantInterface),
			who.call(string(path), grantInterface+".Renew", noOptions),
			who.manager("GetGrant", "00000000000003e8", noOptions),
			who.call(string(path), grantInterface+".Revoke", noOptions),
		} {
			if got := errorOf(call); got != who.err {
				t.Errorf("%s: %q, want %q", call.Method, got, who.err)
			}
		}
	}
}

// Names are what a file system has, and become paths and texts of the bus.
func TestObjectsOnTheBus(t *testing.T) {
	f := newFixture(t)
	c := f.connectAs(t, 1001)
	var all map[dbus.ObjectPath]map[string]map[string]dbus.Variant
	if err := c.call(rootPath, objectManagerInterface+".GetManagedObjects").Store(&all); err != nil {
		t.Fatal(err)
	}
	got := map[dbus.ObjectPath]string{}
	for path, interfaces := range all {
		p := interfaces[objectInterface]
		got[path] = fmt.Sprint(p["Name"], p["State"], p["Available"], p["Reason"], p["Maps"], p["Programs"])
	}
	if diff := cmp.Diff(map[dbus.ObjectPath]string{
		objectPrefix + "tcp":            `"tcp" "loaded" true "" ["m"] ["p"]`,
		objectPrefix + "_30_5fa_2db_ff": "\"0_a-b�\" \"failed\" false \"why �\" @as [] @as []",
	}, got); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
	var name string
	if err := c.call(objectPrefix+"_30_5fa_2db_ff", propertiesInterface+".Get", objectInterface, "Name").Store(&name); err != nil || name != "0_a-b�" {
		t.Errorf("%q, %v", name, err)
	}
	var rows [][]any
	if err := c.manager("ListObjects", noOptions).Store(&rows); err != nil || len(rows) != 2 {
		t.Errorf("%v, %v", rows, err)
	}
	if err := c.manager("DescribeObject", "tcp", noOptions).Err; err != nil { // with its files
		t.Error(err)
	}
}

func TestLabel(t *testing.T) {
	for name, want := range map[string]string{
		"tcp": "tcp", "syscall-latency": "syscall_2dlatency", "a_b": "a_5fb", "0": "_30", "a0Z": "a0Z", "_": "_5f", "é/": "_c3_a9_2f",
	} {
		if got := label(name); got != want || objectName(objectPrefix+got) != name {
			t.Errorf("%q becomes %q, and that %q", name, got, objectName(objectPrefix+got))
		}
	}
	for _, element := range []string{"", "_", "0", "_61", "a_2D", "a_2", "a__", "a-b", "a_zz", "a/b"} {
		if name := objectName(objectPrefix + element); name != "" {
			t.Errorf("%q is the path of %q", element, name)
		}
	}
}

// An option says whether the holders end, too.
func TestRevokeKill(t *testing.T) {
	f := newFixture(t)
	c := f.connectAs(t, 1001)
	for _, test := range []struct {
		options map[string]dbus.Variant
		want    []string
		err     string
	}{
		{noOptions, []string{"links"}, ""},
		{map[string]dbus.Variant{"kill": dbus.MakeVariant(false)}, []string{"links"}, ""},
		{map[string]dbus.Variant{"kill": dbus.MakeVariant(true)}, []string{}, ""},
		{map[string]dbus.Variant{"kill": dbus.MakeVariant("yes")}, nil, "InvalidArgs"},
		{map[string]dbus.Variant{"force": dbus.MakeVariant(true)}, nil, "InvalidArgs"},
	} {
		var path dbus.ObjectPath
		if err := c.manager("MountToken", "network", uint32(os.Getpid()), "/sys/fs/bpf", noOptions).Store(&path); err != nil {
			t.Fatal(err)
		}
		call := c.call(string(path), grantInterface+".Revoke", test.options)
		var got []string
		if call.Err == nil {
			_ = call.Store(&got)
		}
		if diff := cmp.Diff(test.want, got); diff != "" || errorOf(call) != test.err {
			t.Errorf("%v: error %q, %s", test.options, errorOf(call), diff)
		}
	}
}

// Signals go to the owner's connections that asked for them, and to nobody else
// however hard they listen.
func TestSignals(t *testing.T) {
	f := newFixture(t)
	alice, silent, bob := f.connectAs(t, 1001), f.connectAs(t, 1001), f.connectAs(t, 1002)
	heard := map[*client]chan *dbus.Signal{}
	for _, c := range []*client{alice, silent, bob} {
		heard[c] = make(chan *dbus.Signal, 100)
		if err := c.AddMatchSignal(dbus.WithMatchSender(busName)); err != nil {
			t.Fatal(err)
		}
		c.Signal(heard[c])
	}
	for _, c := range []*client{alice, bob} {
		if err := c.call(rootPath, objectManagerInterface+".GetManagedObjects").Err; err != nil {
			t.Fatal(err)
		}
	}
	var path dbus.ObjectPath
	if err := silent.manager("MountToken", "network", uint32(os.Getpid()), "/sys/fs/bpf", noOptions).Store(&path); err != nil {
		t.Fatal(err)
	}
	if err := silent.call(string(path), grantInterface+".Renew", noOptions).Err; err != nil {
		t.Fatal(err)
	}
	if err := silent.call(string(path), grantInterface+".Revoke", noOptions).Err; err != nil {
		t.Fatal(err)
	}
	var got []string
	for range 4 {
		select {
		case s := <-heard[alice]:
			got = append(got, fmt.Sprint(s.Path, " ", s.Name, " ", s.Body))
		case <-time.After(10 * time.Second):
			t.Fatal("no signal")
		}
	}
	own := func(s string) bool {
		return strings.Contains(s, "Name") && strings.Contains(s, "freedesktop.DBus.Name")
	}
	got = slices.DeleteFunc(got, own)
	want := []string{
		rootPath + " " + objectManagerInterface + ".InterfacesAdded",
		string(path) + " " + propertiesInterface + ".PropertiesChanged [" + grantInterface + " map[Expires:@t 77] []]",
		string(path) + " " + propertiesInterface + ".PropertiesChanged [" + grantInterface + " map[State:\"revoked\"] []]",
		rootPath + " " + objectManagerInterface + ".InterfacesRemoved [" + string(path) + " [" + grantInterface + "]]",
	}
	for i := range want {
		if i >= len(got) || !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("signal %d isn't %s: %q", i, want[i], got)
		}
	}
	for _, c := range []*client{silent, bob} {
		if err := c.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil { // comes after signals
			t.Fatal(err)
		}
		for len(heard[c]) > 0 {
			if s := <-heard[c]; strings.Contains(s.Name, "Broker1") || strings.Contains(s.Name, "Properties") || strings.Contains(s.Name, "Interfaces") {
				t.Errorf("somebody else heard %v", s)
			}
		}
	}
	if err := alice.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the subscriber is forgotten", func() bool {
		return len(f.session.Load().subscribersThat(func(uid uint32) bool { return uid == 1001 })) == 0
	})
}

// What happens to published objects is for all who asked to hear of objects.
func TestObjectSignals(t *testing.T) {
	f := newFixture(t)
	alice, bob, silent := f.connectAs(t, 1001), f.connectAs(t, 1002), f.connectAs(t, 1003)
	heard := map[*client]chan *dbus.Signal{}
	for _, c := range []*client{alice, bob, silent} {
		heard[c] = make(chan *dbus.Signal, 100)
		if err := c.AddMatchSignal(dbus.WithMatchSender(busName)); err != nil {
			t.Fatal(err)
		}
		c.Signal(heard[c])
		if c == silent {
			continue
		}
		if err := c.call(rootPath, objectManagerInterface+".GetManagedObjects").Err; err != nil {
			t.Fatal(err)
		}
	}
	o := broker.Object{Description: f.broker.describe("a-b")}
	f.broker.object(o, catalog.Appeared)
	o.State = catalog.Unloaded
	f.broker.object(o, catalog.Changed)
	f.broker.object(failedObject, catalog.Changed)
	f.broker.object(o, catalog.Gone)
	const path, odd = objectPrefix + "a_2db", objectPrefix + "_30_5fa_2db_ff"
	for _, c := range []*client{alice, bob} {
		var got []string
		for len(got) < 4 {
			select {
			case s := <-heard[c]:
				switch {
				case strings.HasSuffix(s.Name, "InterfacesAdded"):
					p := s.Body[1].(map[string]map[string]dbus.Variant)[objectInterface]
					got = append(got, fmt.Sprint(s.Path, " added ", s.Body[0], p["Name"], p["State"], len(p)))
				case strings.HasSuffix(s.Name, "InterfacesRemoved"):
					got = append(got, fmt.Sprint(s.Path, " removed ", s.Body))
				case strings.HasSuffix(s.Name, "PropertiesChanged"):
					p := s.Body[1].(map[string]dbus.Variant)
					got = append(got, fmt.Sprint(s.Path, " changed ", s.Body[0], p["State"], p["Available"], len(p), s.Body[2]))
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("no signal after %q", got)
			}
		}
		if diff := cmp.Diff([]string{
			rootPath + " added " + path + `"a-b" "loaded" 10`,
			path + " changed " + objectInterface + `"unloaded" true 9 []`,
			odd + " changed " + objectInterface + `"failed" false 9 []`,
			rootPath + " removed [" + path + " [" + objectInterface + "]]",
		}, got); diff != "" {
			t.Errorf("signals (-want +got):\n%s", diff)
		}
	}
	if err := silent.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil { // comes after signals
		t.Fatal(err)
	}
	for len(heard[silent]) > 0 {
		if s := <-heard[silent]; !strings.HasPrefix(s.Name, "org.freedesktop.DBus.Name") {
			t.Errorf("who didn't ask heard %v", s)
		}
	}
}

// PropertiesChanged has what the description says that it has.
func TestObjectChangesAreAsDescribed(t *testing.T) {
	node, err := parseDescription(description.Description)
	if err != nil {
		t.Fatal(err)
	}
	described := map[string]bool{}
	for _, i := range node.Interfaces {
		for _, p := range i.Properties {
			if i.Name == objectInterface && p.Name != "Name" {
				described[p.Name] = true
			}
		}
	}
	got := map[string]bool{}
	for name := range objectSignal(failedObject, catalog.Changed).values[1].(map[string]dbus.Variant) {
		got[name] = true
	}
	if diff := cmp.Diff(described, got); diff != "" {
		t.Errorf("properties (-described +sent):\n%s", diff)
	}
}

func TestSubscribersAreLimited(t *testing.T) {
	f := newFixture(t)
	for i := range maxSubscribersPerUser + 1 {
		c := f.connectAs(t, 1001)
		want := ""
		if i == maxSubscribersPerUser {
			want = "QuotaExceeded"
		}
		for range 2 { // asking again costs nothing
			if got := errorOf(c.call(rootPath, objectManagerInterface+".GetManagedObjects")); got != want {
				t.Errorf("connection %d: %q", i, got)
			}
		}
	}
	if got := errorOf(f.connectAs(t, 1002).call(rootPath, objectManagerInterface+".GetManagedObjects")); got != "" {
		t.Errorf("another user: %q", got)
	}
}

func TestFilesHandedOutAreClosed(t *testing.T) {
	f := newFixture(t)
	c := f.bus.connect(t)
	acquire := func() {
		call := c.manager("AcquireToken", "network", noOptions)
		var path dbus.ObjectPath
		var mount dbus.UnixFD
		if err := call.Store(&path, &mount); err != nil {
			t.Fatal(err)
		}
		closeFiles(t, call)
	}
	acquire()
	f.settle(t)
	before := openFiles(t)
	for range 1000 {
		acquire()
	}
	f.settle(t)
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after 1000 tokens", before, after)
	}
	t.Logf("%d open files before and after 1000 tokens", before)
	if n := f.broker.taken(); n != 0 {
		t.Errorf("%d grants withdrawn", n)
	}
}

// settle waits until no request is being done.
func (f *fixture) settle(t testing.TB) {
	t.Helper()
	eventually(t, "requests end", func() bool {
		_, idle := f.IdleSince()
		return idle
	})
}

func TestUndeliverableAnswersAreUndone(t *testing.T) {
	f := newFixture(t)
	before := openFiles(t)

	// A file that can't be sent.
	c := f.bus.connect(t)
	if got := errorOf(c.manager("AcquireToken", "unsendable", noOptions)); got != "Internal" {
		t.Errorf("got %q", got)
	}
	eventually(t, "the grant is withdrawn", func() bool { return f.broker.taken() == 1 })

	// A call without an answer.
	c.Object(busName, rootPath).Go(managerInterface+".AcquireToken", dbus.FlagNoReplyExpected, nil, "network", noOptions)
	eventually(t, "the grant is withdrawn", func() bool { return f.broker.taken() == 2 })

	// A caller that has left.
	c.Object(busName, rootPath).Go(managerInterface+".AcquireToken", 0, make(chan *dbus.Call, 1), "stubborn", noOptions)
	<-f.broker.started
	name := c.Names()[0]
	_ = c.Close()
	observer := f.bus.connect(t)
	eventually(t, "the bus has noticed", func() bool {
		var has bool
		if err := observer.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, name).Store(&has); err != nil {
			t.Fatal(err)
		}
		return !has
	})
	_ = observer.Close()
	close(f.broker.release)
	eventually(t, "the grant is withdrawn", func() bool { return f.broker.taken() == 3 })

	// A caller that takes no fds.
	socket, err := net.Dial("unix", f.bus.Socket)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := dbus.NewConn(socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(plain.Auth(nil), plain.Hello()); err != nil {
		t.Fatal(err)
	}
	plain.Object(busName, rootPath).Go(managerInterface+".AcquireToken", 0, make(chan *dbus.Call, 1), "network", noOptions)
	eventually(t, "the grant is withdrawn", func() bool { return f.broker.taken() == 4 })
	_ = plain.Close()

	// One that leaves as soon as it has the answer, and then it is one.
	if out, err := exec.Command("busctl", "--address="+f.bus.Address, "call", busName, rootPath, managerInterface,
		"MountToken", "susa{sv}", "network", fmt.Sprint(os.Getpid()), "/x", "0").CombinedOutput(); err != nil {
		t.Errorf("busctl: %v\n%s", err, out)
	}
	f.settle(t)
	if n := f.broker.taken(); n != 4 {
		t.Errorf("%d grants withdrawn", n)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}
}

func TestCallerLeavesDuringAuthorization(t *testing.T) {
	f := newFixture(t)
	before := openFiles(t)
	c := f.bus.connect(t)
	c.Object(busName, rootPath).Go(managerInterface+".AcquireToken", 0, make(chan *dbus.Call, 1), "slow", noOptions)
	<-f.broker.started
	if _, idle := f.IdleSince(); idle {
		t.Error("idle while a request is done")
	}
	_ = c.Close()
	select {
	case err := <-f.broker.canceled:
		if err != context.Canceled {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the request goes on")
	}
	f.settle(t)
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}
}

// hostile sends n messages with fds to a name, in every way.
func hostile(t *testing.T, bus testBus, to string, n int) {
	t.Helper()
	c := bus.stranger(t)
	for i := range n {
		message := &dbus.Message{Type: dbus.TypeSignal, Body: []any{dbus.UnixFD(2), dbus.UnixFD(2)},
			Headers: map[dbus.HeaderField]dbus.Variant{
				dbus.FieldDestination: dbus.MakeVariant(to),
				dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath(rootPath)),
				dbus.FieldInterface:   dbus.MakeVariant(managerInterface),
				dbus.FieldMember:      dbus.MakeVariant("AcquireToken"),
				dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf(dbus.UnixFD(0), dbus.UnixFD(0))),
			}}
		switch i % 4 {
		case 1:
			message.Type = dbus.TypeMethodCall
		case 2:
			message.Type = dbus.TypeMethodCall
			message.Headers[dbus.FieldInterface] = dbus.MakeVariant(peerInterface)
			message.Headers[dbus.FieldMember] = dbus.MakeVariant("Ping")
		case 3:
			message.Type = dbus.TypeMethodCall
			delete(message.Headers, dbus.FieldInterface)
		}
		if message.Type == dbus.TypeMethodCall {
			message.Flags = dbus.FlagNoReplyExpected
		}
		if err := c.Send(message, make(chan *dbus.Call, 1)).Err; err != nil {
			t.Fatal(err)
		}
		// The bus queues 64 fds for a receiver and drops what comes beyond that.
		if i%16 == 15 {
			if err := c.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = c.Close()
}

func TestHostileFiles(t *testing.T) {
	f := newFixture(t)
	c := f.bus.connect(t)
	if err := c.manager("ListProfiles", noOptions).Err; err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	hostile(t, f.bus, busName, 5_000)
	hostile(t, f.bus, f.session.Load().conn.Name(), 5_000)
	if err := c.manager("ListProfiles", noOptions).Err; err != nil {
		t.Fatal(err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after 10 000 messages with 2 fds each", before, after)
	}
	t.Logf("%d open files before and after 10 000 messages with 2 fds each", before)
}

func TestStrangersMaySetNothing(t *testing.T) {
	f := newFixture(t)
	c := f.bus.stranger(t)
	if err := c.manager("ListProfiles", noOptions).Err; err != nil {
		t.Error(err)
	}
	var level string
	if err := c.call(logControlPath, propertiesInterface+".Get", logControlInterface, "LogLevel").Store(&level); err != nil || level != "info" {
		t.Errorf("level %q, %v", level, err)
	}
	if got := errorOf(c.call(logControlPath, propertiesInterface+".Set", logControlInterface, "LogLevel", dbus.MakeVariant("debug"))); got != "AccessDenied" {
		t.Errorf("got %q", got)
	}
	if reply, err := c.RequestName(busName, dbus.NameFlagDoNotQueue); err == nil && os.Getuid() == 0 {
		t.Errorf("a stranger has the name: %v", reply)
	}
	// The same without the policy.
	bob := f.connectAs(t, 1002)
	if got := errorOf(bob.call(logControlPath, propertiesInterface+".Set", logControlInterface, "LogLevel", dbus.MakeVariant("debug"))); got != "AccessDenied" {
		t.Errorf("got %q", got)
	}
}

func TestLogControl(t *testing.T) {
	f := newFixture(t)
	c := f.connectAs(t, 0)
	for _, l := range levels {
		if err := c.call(logControlPath, propertiesInterface+".Set", logControlInterface, "LogLevel", dbus.MakeVariant(l.name)).Err; err != nil {
			t.Error(err)
		}
		var got string
		if err := c.call(logControlPath, propertiesInterface+".Get", logControlInterface, "LogLevel").Store(&got); err != nil || got != l.name || f.LogLevel.Level() != l.level {
			t.Errorf("set %s, got %s (%v), %v", l.name, got, f.LogLevel, err)
		}
	}
}

func TestAThousandCallsAtOnce(t *testing.T) {
	f := newFixture(t)
	alice, bob := f.connectAs(t, 1001), f.connectAs(t, 1002)
	answers := make(chan *dbus.Call, 1000)
	for range cap(answers) {
		alice.Object(busName, rootPath).Go(managerInterface+".AcquireToken", 0, answers, "slow", noOptions)
	}
	for range 32 {
		<-f.broker.started
	}
	start := time.Now()
	if err := bob.manager("ListProfiles", noOptions).Err; err != nil {
		t.Error(err)
	}
	took := time.Since(start)
	if took > time.Second {
		t.Errorf("another user waited %v", took)
	}
	refused := map[string]int{}
	for range cap(answers) - 32 {
		refused[errorOf(<-answers)]++
	}
	if diff := cmp.Diff(map[string]int{"QuotaExceeded": 968}, refused); diff != "" {
		t.Errorf("answers (-want +got):\n%s", diff)
	}
	close(f.broker.release)
	for range 32 {
		call := <-answers
		closeFiles(t, call)
		if call.Err != nil {
			t.Error(call.Err)
		}
	}
	t.Logf("another user waited %v", took)
}

// Who sends without end is refused, and the others are served.
func TestFlood(t *testing.T) {
	f := newFixture(t)
	alice, bob := f.connectAs(t, 1001), f.connectAs(t, 1002)
	if err := bob.manager("ListProfiles", noOptions).Err; err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	flooded := make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				flooded <- n
				return
			default:
				alice.Object(busName, rootPath).Go(managerInterface+".ListProfiles", dbus.FlagNoReplyExpected, nil, noOptions)
				n++
			}
		}
	}()
	var worst time.Duration
	for range 50 {
		start := time.Now()
		if err := bob.manager("ListProfiles", noOptions).Err; err != nil {
			t.Error(err)
		}
		worst = max(worst, time.Since(start))
		time.Sleep(10 * time.Millisecond)
	}
	close(stop)
	t.Logf("during %d calls of another user's, the longest wait was %v", <-flooded, worst)
	if worst > time.Second {
		t.Errorf("waited %v", worst)
	}
}

// Limits in all, and many connections of one user's that nobody knows yet.
func TestManyConnections(t *testing.T) {
	f := newFixture(t)
	bob := f.connectAs(t, 1002)
	answers := make(chan *dbus.Call, 100*40)
	for range 100 {
		c := f.connectAs(t, 1001)
		for range 40 {
			c.Object(busName, rootPath).Go(managerInterface+".ListProfiles", 0, answers, noOptions)
		}
	}
	start := time.Now()
	if err := bob.manager("ListProfiles", noOptions).Err; err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("another user waited %v", took)
	}
	for range cap(answers) {
		if got := errorOf(<-answers); got != "" && got != "QuotaExceeded" {
			t.Error(got)
		}
	}
}

func TestTotalOfRequests(t *testing.T) {
	f := newFixture(t)
	answers := make(chan *dbus.Call, maxRequests+32)
	for uid := range uint32(maxRequests / 32) {
		c := f.connectAs(t, 2000+uid)
		for range 32 {
			c.Object(busName, rootPath).Go(managerInterface+".AcquireToken", 0, answers, "slow", noOptions)
		}
	}
	for range maxRequests {
		<-f.broker.started
	}
	bob := f.connectAs(t, 1002)
	if got := errorOf(bob.manager("ListProfiles", noOptions)); got != "Busy" {
		t.Errorf("got %q", got)
	}
	close(f.broker.release)
	for range maxRequests {
		closeFiles(t, <-answers)
	}
	f.settle(t)
	if got := errorOf(bob.manager("ListProfiles", noOptions)); got != "" {
		t.Errorf("got %q", got)
	}
}

// The uids that a user has for containers count as one.
func TestSubordinateUsers(t *testing.T) {
	f := serveOn(t, newBus(t), func(f *fixture) {
		f.accountOf = func(uid uint32) uint32 {
			if uid >= 2000 {
				return 2000
			}
			return uid
		}
	})
	const users = maxRequests/32 + 1
	answers := make(chan *dbus.Call, users*32)
	for uid := range uint32(users) {
		c := f.connectAs(t, 2000+uid)
		for range 32 {
			c.Object(busName, rootPath).Go(managerInterface+".AcquireToken", 0, answers, "slow", noOptions)
		}
	}
	for range cap(answers) - 32 {
		if got := errorOf(<-answers); got != "QuotaExceeded" {
			t.Errorf("got %q", got)
		}
	}
	bob := f.connectAs(t, 1002)
	if got := errorOf(bob.manager("ListProfiles", noOptions)); got != "" {
		t.Errorf("another user: %q", got)
	}
	close(f.broker.release)
	for range 32 {
		closeFiles(t, <-answers)
	}
	f.settle(t)
	for i := range uint32(maxSubscribersPerUser + 1) {
		want := ""
		if i == maxSubscribersPerUser {
			want = "QuotaExceeded"
		}
		if got := errorOf(f.connectAs(t, 2000+i).call(rootPath, objectManagerInterface+".GetManagedObjects")); got != want {
			t.Errorf("subscriber %d: %q", i, got)
		}
	}
}

func TestBusRestarts(t *testing.T) {
	f := newFixture(t)
	c := f.bus.connect(t)
	var path dbus.ObjectPath
	if err := c.manager("MountToken", "network", uint32(os.Getpid()), "/x", noOptions).Store(&path); err != nil {
		t.Fatal(err)
	}
	c.Object(busName, rootPath).Go(managerInterface+".AcquireToken", 0, make(chan *dbus.Call, 1), "slow", noOptions)
	<-f.broker.started
	before := openFiles(t)
	for range 2 {
		f.bus.Stop()
		eventually(t, "the loss is noticed", func() bool { return f.session.Load() == nil })
		f.bus.Start()
		f.waitForName(t)
	}
	<-f.broker.canceled
	c = f.bus.connect(t)
	if err := c.call(string(path), grantInterface+".Revoke", noOptions).Err; err != nil {
		t.Error(err)
	}
	f.settle(t)
	if after := openFiles(t); after > before {
		t.Errorf("%d open files before, %d after", before, after)
	}
}

func TestNoBus(t *testing.T) {
	f, err := New(Config{Broker: newFakeBroker()})
	if err != nil {
		t.Fatal(err)
	}
	f.address = "unix:path=/nowhere"
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := f.Serve(ctx); err != nil {
		t.Error(err)
	}
}

// What was asked before the name was given up is answered.
func TestStop(t *testing.T) {
	f := newFixture(t)
	goroutines, before := runtime.NumGoroutine(), openFiles(t)
	c := f.bus.connect(t)
	answers := make(chan *dbus.Call, 100)
	c.Object(busName, rootPath).Go(managerInterface+".AcquireToken", 0, answers, "slow", noOptions)
	<-f.broker.started
	stopped := make(chan error)
	sent := 0
	for ; ; sent++ { // until the name is gone
		if sent == 20 {
			go func() { stopped <- f.stop() }()
		}
		if call := c.call(rootPath, peerInterface+".Ping"); call.Err != nil {
			if got := errorOf(call); got != "ServiceUnknown" && got != "NameHasNoOwner" {
				t.Errorf("got %q", got)
			}
			break
		}
	}
	close(f.broker.release)
	call := <-answers
	closeFiles(t, call)
	if call.Err != nil {
		t.Errorf("a request under way: %v", call.Err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	_ = c.Close()
	eventually(t, "goroutines end", func() bool { return runtime.NumGoroutine() < goroutines })
	if after := openFiles(t); after >= before {
		t.Errorf("%d open files before, %d after", before, after)
	}
	t.Logf("%d calls while stopping", sent)
}

// A request that waits for a password ends when the daemon stops.
func TestStopCutsRequests(t *testing.T) {
	f := newFixture(t)
	c := f.bus.connect(t)
	answers := make(chan *dbus.Call, 1)
	c.Object(busName, rootPath).Go(managerInterface+".AcquireToken", 0, answers, "slow", noOptions)
	<-f.broker.started
	if err := f.stop(); err != nil {
		t.Error(err)
	}
	if got := errorOf(<-answers); got != "Canceled" {
		t.Errorf("got %q", got)
	}
}

// busctl is a client that isn't ours.
func TestBusctl(t *testing.T) {
	f := newFixture(t)
	for _, args := range [][]string{
		{"tree", busName},
		{"introspect", busName, rootPath},
		{"call", busName, rootPath, managerInterface, "AcquireToken", "sa{sv}", "network", "0"},
		{"--allow-interactive-authorization=no", "call", busName, rootPath, managerInterface, "ListProfiles", "a{sv}", "0"},
		{"get-property", busName, grantPrefix + "00000000000003e8", grantInterface, "NotEnforced", "State"},
	} {
		out, err := exec.Command("busctl", append([]string{"--address=" + f.bus.Address}, args...)...).CombinedOutput()
		if err != nil {
			t.Errorf("busctl %v: %v\n%s", args, err, out)
		}
	}
}

func BenchmarkPing(b *testing.B) {
	f := newFixture(b)
	f.Users = unlimited
	c := f.bus.connect(b)
	for b.Loop() {
		if err := c.call(rootPath, peerInterface+".Ping").Err; err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkListProfiles(b *testing.B) {
	f := newFixture(b)
	f.Users = unlimited
	c := f.bus.connect(b)
	for b.Loop() {
		if err := c.manager("ListProfiles", noOptions).Err; err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAcquireToken(b *testing.B) {
	f := newFixture(b)
	f.Users = unlimited
	c := f.bus.connect(b)
	for b.Loop() {
		call := c.manager("AcquireToken", "network", noOptions)
		if call.Err != nil {
			b.Fatal(call.Err)
		}
		closeFiles(b, call)
	}
}

func BenchmarkListGrants(b *testing.B) {
	for _, n := range []int{100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			f := newFixture(b)
			f.Users = unlimited
			for i := range n {
				id := grant.ID(i)
				f.broker.grants[id] = grant.Grant{ID: id, Profile: "network", Tier: "network", Owner: uint32(os.Getuid()), PID: 1, Path: "/sys/fs/bpf"}
			}
			c := f.bus.connect(b)
			for b.Loop() {
				if err := c.manager("ListGrants", noOptions).Err; err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
