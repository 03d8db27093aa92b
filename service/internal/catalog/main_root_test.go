// SPDX-License-Identifier: Apache-2.0

//go:build root

package catalog

import (
	"context"
	"embed"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

//go:embed testdata/*.bpf.o
var programs embed.FS

// ops are what this package's tests tell their processes to do.
var ops = map[string]testtarget.Op{}

func TestMain(m *testing.M) {
	testtarget.OwnMounts()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	testtarget.Main(m, ops, nil)
}

// fixture is a catalog with files and a BPF file system of its own.
type fixture struct {
	*Catalog
	t                      *testing.T
	files, elf, bpf, state string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{t: t, files: t.TempDir(), elf: t.TempDir(), bpf: t.TempDir(), state: t.TempDir()}
	if err := unix.Mount("bpf", f.bpf, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(f.bpf, 0); err != nil {
			t.Errorf("cannot unmount: %v", err)
		}
	})
	for _, name := range []string{"kinds", "bad", "missing", "probes", "xsk"} {
		data, err := programs.ReadFile("testdata/" + name + ".bpf.o")
		if err != nil {
			t.Fatal(err)
		}
		f.write(filepath.Join(f.elf, name+".bpf.o"), string(data))
	}
	f.open()
	t.Cleanup(func() { f.Close() })
	return f
}

func (f *fixture) open() {
	f.t.Helper()
	var err error
	if f.Catalog, err = New(f.root(), f.state); err != nil {
		f.t.Fatal(err)
	}
}

// again closes the catalog and opens another one, as a daemon that is started
// again does.
func (f *fixture) again() {
	f.t.Helper()
	f.Close()
	f.open()
	f.reload()
}

func (f *fixture) root() string { return filepath.Join(f.bpf, "bpfbroker", "objects") }

func (f *fixture) write(path, text string) {
	f.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// object writes an object file, in which ELF stands for the directory of ELF
// files, and reads all of them.
func (f *fixture) object(name, text string) {
	f.t.Helper()
	f.write(filepath.Join(f.files, name+".object"), strings.ReplaceAll(text, "ELF", f.elf))
	f.reload()
}

func (f *fixture) reload() { f.Set(Load(config.Dirs{Etc: f.files})) }

// self is the test's own process, as a peer's.
func (f *fixture) self() *kernel.Process {
	f.t.Helper()
	p, err := kernel.OpenProcess(os.Getpid())
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { p.Close() })
	return p
}

// openMap opens a map; a file that is none is a failure. The caller closes it.
func (f *fixture) openMap(object, name string, access Access) *ebpf.Map {
	f.t.Helper()
	file, err := f.OpenMap(object, name, access, f.self(), 0)
	if err != nil {
		f.t.Fatal(err)
	}
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		f.t.Fatal(err)
	}
	m, err := ebpf.NewMapFromFD(fd)
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

// openBy opens a map as another process.
func (f *fixture) openBy(p *testtarget.Process, object string) {
	f.t.Helper()
	process, err := kernel.NewProcess(p.Dup())
	if err != nil {
		f.t.Fatal(err)
	}
	defer process.Close()
	file, err := f.OpenMap(object, "hits", ReadOnly, process, 0)
	if err != nil {
		f.t.Fatal(err)
	}
	_ = file.Close()
}

// pins are the paths below the catalog's root, without digests.
func (f *fixture) pins() []string {
	f.t.Helper()
	var all []string
	err := filepath.WalkDir(f.root(), func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !entry.IsDir() {
			rest := strings.TrimPrefix(path, f.root()+"/")
			name, rest, _ := strings.Cut(rest, "/")
			name, _, _ = strings.Cut(name, version)
			all = append(all, name+"/"+rest)
		}
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func (f *fixture) wantPins(want ...string) {
	f.t.Helper()
	if diff := cmp.Diff(want, f.pins()); diff != "" {
		f.t.Errorf("pins (-want +got):\n%s", diff)
	}
}

// run runs a command that has to succeed, and returns what it printed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(context.WithoutCancel(t.Context()), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
