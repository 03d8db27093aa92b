// SPDX-License-Identifier: Apache-2.0

package peer

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

func TestMain(m *testing.M) { testtarget.Main(m, nil, nil) }

func TestParseUnit(t *testing.T) {
	t.Parallel()
	const user = "/user.slice/user-1000.slice/user@1000.service"
	for _, test := range []struct {
		path         string
		system, user string
	}{
		{"", "", ""},
		{"/", "", ""},
		{"/init.scope", "init.scope", ""},
		{"/system.slice", "", ""},
		{"/system.slice/cron.service", "cron.service", ""},
		{"/system.slice/cron.service/", "cron.service", ""},
		{"/system.slice/cron.service/below/it", "cron.service", ""},
		{"/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service", ""},
		{`/system.slice/a\x2db:c_d.service`, `a\x2db:c_d.service`, ""},
		{"/user.slice/user-1000.slice/session-3.scope", "session-3.scope", ""},
		{user, "user@1000.service", ""},
		{user + "/init.scope", "user@1000.service", "init.scope"},
		{user + "/app.slice/x.service", "user@1000.service", "x.service"},
		{user + "/app.slice/app-a.slice/a.scope/b.service", "user@1000.service", "a.scope"},
		{user + "/app.slice", "user@1000.service", ""},

		// A '_' before what the kernel reserves.
		{"/system.slice/_cpu.service", "cpu.service", ""},
		{"/_system.slice/cron.service", "cron.service", ""},
		{user + "/_x.service", "user@1000.service", "x.service"},
		{"/system.slice/__x.service", "_x.service", ""},

		// No unit, or one below what isn't a slice's.
		{"/cron", "", ""},
		{"/machine/system.slice/cron.service", "", ""},
		{"/system.slice/dir/cron.service", "", ""},
		{"/system.slice/cron.mount", "", ""},
		{"system.slice/cron.service", "cron.service", ""},
		{"/../system.slice/cron.service", "", ""},
		{"//system.slice//cron.service", "", ""},
		{"/system.slice/cron.service (deleted)", "", ""},
		{"/docker/0123456789abcdef", "", ""},

		// Users name what is below their manager as they like. It is never a
		// system unit, and never more than a unit's name.
		{user + "/system.slice/cron.service", "user@1000.service", "cron.service"},
		{user + "/user.slice/user-0.slice/user@0.service", "user@1000.service", "user@0.service"},
		{user + "/user@0.service/root.service", "user@1000.service", "user@0.service"},
		{user + "/a\nb.service", "user@1000.service", ""},
		{user + "/a b.service", "user@1000.service", ""},
		{user + "/a=b.service", "user@1000.service", ""},
		{user + "/\x1b[2J.service", "user@1000.service", ""},
		{user + "/é.service", "user@1000.service", ""},
		{user + "/\xff.service", "user@1000.service", ""},
		{user + "/a\x00.service", "user@1000.service", ""},
		{user + "/\n.slice/x.service", "user@1000.service", ""},
		{user + "/../../../system.slice/cron.service", "user@1000.service", ""},
		{user + "/./x.service", "user@1000.service", ""},
		// A session's own groups don't make it a manager.
		{"/user.slice/user-1000.slice/session-3.scope/user@0.service/x.service", "session-3.scope", ""},
		{"/system.slice/user@.service.service/x.service", "user@.service.service", "x.service"},
	} {
		got := parseUnit(test.path)
		if got.System != test.system || got.User != test.user {
			t.Errorf("%q: got %+v", test.path, got)
		}
		want := test.user
		if want == "" {
			want = test.system
		}
		if got.Name() != want {
			t.Errorf("%q: the name is %q", test.path, got.Name())
		}
	}
}

func FuzzParseUnit(f *testing.F) {
	f.Add("/user.slice/user-1000.slice/user@1000.service/app.slice/x.service")
	f.Fuzz(func(t *testing.T, path string) {
		u := parseUnit(path)
		for _, name := range []string{u.System, u.User} {
			if strings.ContainsAny(name, "/\n\x00= ") || name != "" && !strings.HasSuffix(name, ".service") && !strings.HasSuffix(name, ".scope") {
				t.Errorf("%q: got %q", path, name)
			}
		}
		if u.User != "" && !strings.HasPrefix(u.System, "user@") {
			t.Errorf("%q: got %+v", path, u)
		}
	})
}

func TestFromConn(t *testing.T) {
	testtarget.NoLeaks(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	theirs, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	p, err := FromConn(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if int(p.UID) != os.Geteuid() || p.Key() != p.UID || p.Process.PID != os.Getpid() {
		t.Errorf("got %+v of process %d", p, p.Process.PID)
	}
	if _, err := UnitOf(p.Process); err != nil {
		t.Error(err)
	}
}
