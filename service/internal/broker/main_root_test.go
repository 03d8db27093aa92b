// SPDX-License-Identifier: Apache-2.0

//go:build root

package broker

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/peer"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

const (
	alice = testtarget.Alice
	bob   = testtarget.Bob
	both  = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
)

func TestMain(m *testing.M) {
	testtarget.OwnMounts()
	slog.SetDefault(slog.New(slog.DiscardHandler)) // but see logged
	testtarget.Main(m, ops, func() error { return kernel.StartHelpers(func() { panic("no helpers any more") }) })
}

// files are the profiles of the tests.
var files = map[string]string{
	"plain":    "[Profile]\nDescription=Plain\n[Delegate]\nCommands=map_create prog_load\nMaps=lru_hash\nPrograms=socket_filter\n",
	"leased":   "[Profile]\nLease=1h\nGuard=optional\n[Delegate]\nCommands=map_create\nMaps=hash\n",
	"guarded":  "[Profile]\nLease=1h\n[Delegate]\nCommands=map_create\nMaps=hash\n",
	"held":     "[Delegate]\nCommands=map_create prog_load\nMaps=hash\nPrograms=socket_filter\n[Guard]\nCapabilities=CAP_BPF\n",
	"reaching": "[Profile]\nLease=1h\n[Delegate]\nCommands=any\nMaps=any\nPrograms=any\nAttachments=any\n[Attach]\nInterfaces=own\nCgroups=any\nProcesses=any\n",
	"any":      "[Delegate]\nCommands=any\nMaps=any\nPrograms=any\nAttachments=any\n",
	"misspelt": "[Profile]\nLeese=1h\n[Delegate]\nCommands=map_create\n",
}

// asked is a question to the authority.
type asked struct {
	Subject     authority.Subject
	Action      authority.Action
	Details     map[string]string
	Interactive bool
}

// fake is an authority and a broker that asks it.
type fake struct {
	*Broker
	t             *testing.T
	profiles, dir string
	guard         *guard.Guard

	mu     sync.Mutex
	asked  []asked
	answer func(context.Context) error
}

func (f *fake) Check(ctx context.Context, subject authority.Subject, action authority.Action, details map[string]string, interactive bool) error {
	f.mu.Lock()
	f.asked = append(f.asked, asked{subject, action, details, interactive})
	answer := f.answer
	f.mu.Unlock()
	if answer == nil {
		return nil
	}
	return answer(ctx)
}

func (f *fake) questions() []asked {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked)
}

// answers makes the authority answer so.
func (f *fake) answers(answer func(context.Context) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

var errNoGuard = errors.New("a test without a guard")

// newFake makes a broker with an authority that says yes.
func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{t: t, profiles: t.TempDir(), dir: t.TempDir()}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(f.profiles, name+".profile"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.open()
	t.Cleanup(func() { f.Close() })
	return f
}

func (f *fake) open() {
	f.t.Helper()
	var err error
	if f.Broker, err = New(f, f.load(), f.dir, f.guard, errNoGuard); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fake) load() *profile.Set { return profile.Load(config.Dirs{Etc: f.profiles}) }

// nothingIs wants no rows and no mounts of the process's to be there.
func (f *fake) nothingIs(p *testtarget.Process) {
	f.t.Helper()
	if n := f.Grants(); n != 0 {
		f.t.Errorf("%d grants are left", n)
	}
	rows, err := os.ReadDir(f.dir)
	if err != nil || len(rows) != 0 {
		f.t.Errorf("rows are left: %v, %v", rows, err)
	}
	if !alive(p) {
		return
	}
	if mounted := p.Mounted("bpf"); len(mounted) != 0 {
		f.t.Errorf("still mounted: %v", mounted)
	}
}

func alive(p *testtarget.Process) bool {
	poll := []unix.PollFd{{Fd: int32(p.PidFD.Fd()), Events: unix.POLLIN}}
	n, _ := unix.Poll(poll, 0)
	return n == 0
}

func processOf(t *testing.T, p *testtarget.Process) *kernel.Process {
	t.Helper()
	process, err := kernel.NewProcess(p.Dup())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Close() })
	return process
}

func caller(t *testing.T, uid uint32, p *testtarget.Process) Caller {
	t.Helper()
	return Caller{Peer: peer.New(&kernel.Credentials{UID: uid, GID: uid, Process: processOf(t, p)})}
}

// named wants an error with a name, and everything that belongs to it.
func named(t *testing.T, err error, want string) *Error {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Errorf("got %v, want %s", err, want)
		return &Error{}
	}
	if e.Name != want {
		t.Errorf("got %s (%s), want %s", e.Name, e.Reason, want)
	}
	layers := []string{"request", "profile", "object", "target", "polkit", "kernel", "guard", "limit"}
	if e.Reason == "" || !slices.Contains(layers, e.Layer) || e.Remedy == "" && want != "Canceled" {
		t.Errorf("not all of an error: %+v", e)
	}
	if strings.Count(e.Reason, "cannot") > 1 {
		t.Errorf("a chain of %q", e.Reason)
	}
	return e
}

// logged collects what is logged until the test ends.
func logged(t *testing.T) func() string {
	t.Helper()
	var mu sync.Mutex
	var b bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(writer(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return b.Write(p)
	}), &slog.HandlerOptions{Level: slog.LevelDebug})))
	t.Cleanup(func() { slog.SetDefault(old) })
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		return b.String()
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

// The use cases whose signatures tests would else repeat.

func (f *fake) list(c Caller) []grant.Grant {
	f.t.Helper()
	list, err := f.ListGrants(f.t.Context(), c, false)
	if err != nil {
		f.t.Fatal(err)
	}
	grants := []grant.Grant{}
	for _, g := range list {
		grants = append(grants, *g)
	}
	return grants
}

func (f *fake) revoke(c Caller, id string) ([]string, error) {
	return f.RevokeGrant(f.t.Context(), c, id, false)
}

const kinds = `[Object]
File=ELF
[Map hits]
Access=read-only read-write
[Map events]
Access=consume
[Program on_run]
Publish=yes
[Program on_raw]
Attach=none
[Program on_tracepoint]
Attach=none
`

// publish has the broker publish objects. It returns the file of one of them, and the
// directory of what is pinned.
func (f *fake) publish() (file, pins string) {
	t := f.t
	t.Helper()
	// It is there on other kernels, too: test/kernels.
	elf, err := os.ReadFile("../catalog/testdata/kinds.bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	dir, bpf := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "elf"), elf, 0o600); err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(dir, "kinds.object")
	if err := os.WriteFile(file, []byte(strings.Replace(kinds, "ELF", filepath.Join(dir, "elf"), 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "wrong.object"), []byte("[Object]\nFile=x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", bpf, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(bpf, 0); err != nil {
			t.Error(err)
		}
	})
	pins = filepath.Join(bpf, "objects")
	c, err := catalog.New(pins, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	f.Publish(c)
	f.SetObjects(catalog.Load(config.Dirs{Etc: dir}))
	return file, pins
}
