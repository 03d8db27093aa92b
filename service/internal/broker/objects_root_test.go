// SPDX-License-Identifier: Apache-2.0

//go:build root && !kernels

package broker

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/journal"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// publish makes a fake that has objects, see its publish.
func publish(t *testing.T) (f *fake, file, pins string) {
	t.Helper()
	f = newFake(t)
	file, pins = f.publish()
	return f, file, pins
}

// Who watches hears of objects, as a list shows them.
func TestObjectNews(t *testing.T) {
	testtarget.NoLeaks(t)
	f, object, _ := publish(t)
	news := make(chan string, 10)
	f.Watch(Watcher{Object: func(o Object, n catalog.News) {
		news <- fmt.Sprint(o.Name, " ", o.State, " ", o.Refusal == nil, " ", n)
	}})
	c := caller(t, alice, testtarget.Start(t, testtarget.Attr{UID: alice}))
	file, _, err := f.OpenMap(t.Context(), c, "kinds", "hits", catalog.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	_ = file.Close()
	if err := os.Remove(object); err != nil {
		t.Fatal(err)
	}
	f.SetObjects(catalog.Load(config.Dirs{Etc: filepath.Dir(object)}))
	for _, want := range []string{"kinds loaded true 1", "kinds loaded true 2"} {
		if got := <-news; got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	}
	if _, err := f.FindObject("kinds"); Refuse(err).Name != "NoSuchObject" {
		t.Errorf("of what has gone: %v", err)
	}
}

func TestOpenObject(t *testing.T) {
	testtarget.NoLeaks(t)
	f, _, _ := publish(t)
	c := caller(t, alice, testtarget.Start(t, testtarget.Attr{UID: alice}))
	c.Interactive = true
	open := func(access catalog.Access, mapName string) func() (*os.File, error) {
		return func() (*os.File, error) {
			file, warnings, err := f.OpenMap(t.Context(), c, "kinds", mapName, access)
			if (len(warnings) > 0) != (access == catalog.ReadOnly) {
				t.Errorf("%s: %q", access, warnings)
			}
			return file, err
		}
	}
	for name, test := range map[string]struct {
		open    func() (*os.File, error)
		action  authority.Action
		details map[string]string
	}{
		"read":    {open(catalog.ReadOnly, "hits"), authority.OpenObject, map[string]string{"map": "hits", "program": "", "access": "read-only"}},
		"write":   {open(catalog.ReadWrite, "hits"), authority.OpenObjectWritable, map[string]string{"map": "hits", "program": "", "access": "read-write"}},
		"consume": {open(catalog.Consume, "events"), authority.OpenObject, map[string]string{"map": "events", "program": "", "access": "consume"}},
		"program": {func() (*os.File, error) { return f.OpenProgram(t.Context(), c, "kinds", "on_run") },
			authority.OpenObjectWritable, map[string]string{"map": "", "program": "on_run", "access": "read-write"}},
	} {
		before := len(f.questions())
		file, err := test.open()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		_ = file.Close()
		asked := f.questions()[before:]
		if len(asked) != 1 || asked[0].Action != test.action || !asked[0].Interactive || asked[0].Subject.UID != alice {
			t.Errorf("%s: asked %+v", name, asked)
			continue
		}
		test.details["object"] = "kinds"
		for _, key := range []string{"peer.unit", "peer.user-unit"} {
			test.details[key] = asked[0].Details[key]
		}
		if diff := cmp.Diff(test.details, asked[0].Details); diff != "" {
			t.Errorf("%s: details (-want +got):\n%s", name, diff)
		}
		for _, key := range objectDetails {
			if _, ok := asked[0].Details[key]; !ok {
				t.Errorf("%s: no detail %s", name, key)
			}
		}
	}
}

func TestOpenObjectRefused(t *testing.T) {
	testtarget.NoLeaks(t)
	f, file, pins := publish(t)
	text := logged(t)
	c := caller(t, alice, testtarget.Start(t, testtarget.Attr{UID: alice}))
	read := func() error {
		file, _, err := f.OpenMap(t.Context(), c, "kinds", "hits", catalog.ReadOnly)
		if file != nil {
			_ = file.Close()
		}
		return err
	}
	for answer, want := range map[error]string{
		authority.ErrDenied: "NotAuthorized", authority.ErrChallenge: "InteractionRequired",
		authority.ErrUnavailable: "AuthorityUnavailable", context.Canceled: "Canceled",
	} {
		f.answers(func(context.Context) error { return fmt.Errorf("no: %w", answer) })
		named(t, read(), want)
	}
	// Nobody who is refused can make the kernel work.
	if _, err := os.Stat(pins); !os.IsNotExist(err) {
		t.Errorf("loaded for nobody: %v", err)
	}
	if !strings.Contains(text(), "Object refused") || !strings.Contains(text(), journal.KeyObject+"=kinds") {
		t.Errorf("logged: %s", text())
	}

	// What changes while somebody looks for a password.
	f.answers(func(context.Context) error {
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
		f.SetObjects(catalog.Load(config.Dirs{Etc: filepath.Dir(file)}))
		return nil
	})
	named(t, read(), "NoSuchObject")
	f.answers(nil)
	for object, want := range map[string]string{"nonesuch": "NoSuchObject", "wrong": "InvalidObject", "\x00": "NoSuchObject"} {
		before := len(f.questions())
		_, _, err := f.OpenMap(t.Context(), c, object, "hits", catalog.ReadOnly)
		named(t, err, want)
		if _, err := f.DescribeObject(object); named(t, err, want).Layer != "object" {
			t.Error(err)
		}
		if len(f.questions()) != before {
			t.Errorf("%q: the authority was asked for what isn't there", object)
		}
	}
	if list := f.ListObjects(); len(list) != 1 || list[0].Name != "wrong" || list[0].Refusal == nil {
		t.Errorf("%+v", list)
	}
}

func TestMountObjects(t *testing.T) {
	testtarget.NoLeaks(t)
	f, _, _ := publish(t)
	p := testtarget.New(t, alice)
	p.Must("mkdir", "/mnt/a")
	c := caller(t, alice, p)
	c.Interactive = true
	before := p.Mounts()

	m, err := f.MountObjects(t.Context(), c, []string{"kinds", "kinds"}, nil, "/mnt/a")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"kinds/events", "kinds/hits", "kinds/on_run"}, m.Pins); diff != "" || m.Warnings != nil {
		t.Errorf("%s, %q", diff, m.Warnings)
	}
	modes := func() string {
		var text []string
		for _, pin := range m.Pins {
			info, err := os.Stat(fmt.Sprintf("/proc/%d/root/mnt/a/%s", p.PID, pin))
			if err != nil {
				t.Fatal(err)
			}
			text = append(text, info.Mode().String())
		}
		return strings.Join(text, " ")
	}
	if got := modes(); got != "-rw-rw-rw- -rw-rw-rw- -rw-rw-rw-" {
		t.Errorf("modes %s", got)
	}
	m.Undo()
	m.Undo()
	if diff := cmp.Diff(before, p.Mounts()); diff != "" {
		t.Errorf("mounts (-before +after):\n%s", diff)
	}

	// Of what is refused, the rest remains; and only the least is asked a password for.
	f.answers(func(context.Context) error {
		asked := f.questions()
		if last := asked[len(asked)-1]; last.Action == authority.OpenObjectWritable {
			if last.Interactive != (last.Details["program"] != "") {
				t.Errorf("asked %+v", last)
			}
			return authority.ErrDenied
		}
		return nil
	})
	if m, err = f.MountObjects(t.Context(), c, []string{"kinds"}, processOf(t, p), "/mnt/a"); err != nil {
		t.Fatal(err)
	}
	if got := modes(); got != "-rw-rw-rw- -r--r--r--" || len(m.Warnings) != 1 {
		t.Errorf("%v: modes %s, %q", m.Pins, got, m.Warnings)
	}
	p.Must("umount", "/mnt/a")

	other := testtarget.New(t, bob)
	initial := testtarget.Start(t, testtarget.Attr{UID: alice})
	f.answers(nil)
	for name, test := range map[string]struct {
		names  []string
		of     *testtarget.Process
		path   string
		answer error
		want   string
	}{
		"bob's":            {[]string{"kinds"}, other, "/mnt", nil, "NamespaceNotOwned"},
		"the host's":       {[]string{"kinds"}, initial, "/mnt", nil, "NamespaceInitial"},
		"nothing":          {nil, p, "/mnt", nil, "InvalidMessage"},
		"no object":        {[]string{"kinds", "nonesuch"}, p, "/mnt", nil, "NoSuchObject"},
		"a wrong one":      {[]string{"kinds", "wrong"}, p, "/mnt", nil, "InvalidObject"},
		"a relative path":  {[]string{"kinds"}, p, "mnt", nil, "PathInvalid"},
		"no directory":     {[]string{"kinds"}, p, "/mnt/nonesuch", nil, "PathNotFound"},
		"nothing allowed":  {[]string{"kinds"}, p, "/mnt", authority.ErrDenied, "NotAuthorized"},
		"nobody to answer": {[]string{"kinds"}, p, "/mnt", authority.ErrUnavailable, "AuthorityUnavailable"},
	} {
		f.answers(func(context.Context) error { return test.answer })
		_, err := f.MountObjects(t.Context(), c, test.names, processOf(t, test.of), test.path)
		if e := named(t, err, test.want); t.Failed() {
			t.Fatalf("%s: %+v", name, e)
		}
	}
	if diff := cmp.Diff(before, p.Mounts()); diff != "" {
		t.Errorf("mounts (-before +after):\n%s", diff)
	}
	// The process changes its namespaces while somebody looks for a password.
	f.answers(func(context.Context) error {
		p.Must("unshare", fmt.Sprint(unix.CLONE_NEWNS))
		f.answers(nil)
		return nil
	})
	_, err = f.MountObjects(t.Context(), c, []string{"kinds"}, nil, "/mnt")
	named(t, err, "ProcessGone")
}

func TestCheckObjects(t *testing.T) {
	testtarget.NoLeaks(t)
	f, _, _ := publish(t)
	c := caller(t, alice, testtarget.Start(t, testtarget.Attr{UID: alice}))
	for name, test := range map[string]struct {
		answer func(asked) error
		want   Finding
	}{
		"all":     {func(asked) error { return nil }, Finding{State: "yes", Reason: "unloaded; you can open events (consume)"}},
		"nothing": {func(asked) error { return authority.ErrDenied }, Finding{State: "no"}},
		"one": {func(a asked) error {
			if a.Details["program"] != "" {
				return nil
			}
			return authority.ErrChallenge
		}, Finding{State: "yes", Reason: "unloaded; you can open on_run (read-write)"}},
		"with a password": {func(a asked) error {
			if a.Details["access"] == "read-only" {
				return authority.ErrChallenge
			}
			return authority.ErrDenied
		}, Finding{State: "ask", Reason: "unloaded; you can open hits (read-only) after authentication"}},
		"nobody to ask": {func(asked) error { return authority.ErrUnavailable }, Finding{State: "no"}},
	} {
		f.answers(func(context.Context) error {
			asked := f.questions()
			if last := asked[len(asked)-1]; last.Details["object"] != "" {
				return test.answer(last)
			}
			return nil
		})
		before := len(f.questions())
		found := map[string]Finding{}
		for _, finding := range f.Broker.Check(t.Context(), c) {
			found[finding.Subject] = finding
		}
		got := found["object kinds"]
		if got.State != test.want.State || test.want.Reason != "" && got.Reason != test.want.Reason || got.Reason == "" {
			t.Errorf("%s: %+v", name, got)
		}
		if wrong := found["object wrong"]; wrong.State != "no" || !strings.Contains(wrong.Reason, "wrong.object") {
			t.Errorf("%s: %+v", name, wrong)
		}
		for _, a := range f.questions()[before:] {
			if a.Interactive {
				t.Errorf("%s: somebody is asked for a password: %+v", name, a)
			}
		}
	}
}
