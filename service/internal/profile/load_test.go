// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
)

// tree makes the three directories, with files by path below them: "etc/x.profile".
// A content that starts with "->" is a link's target.
func tree(t testing.TB, files map[string]string) config.Dirs {
	t.Helper()
	root := t.TempDir()
	for path, content := range files {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if target, ok := strings.CutPrefix(content, "->"); ok {
			if err := os.Symlink(target, path); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return config.Dirs{
		Usr:   filepath.Join(root, "usr"),
		Run:   filepath.Join(root, "run"),
		Etc:   filepath.Join(root, "etc"),
		Owner: uint32(os.Getuid()),
	}
}

const good = "[Profile]\nDescription=d\n[Delegate]\nPrograms=socket_filter\n"

func described(s string) string { return "[Profile]\nDescription=" + s + "\n" }

// describe gives the description of each profile that is offered.
func describe(s *Set) map[string]string {
	m := map[string]string{}
	for _, p := range s.All() {
		m[p.Name] = p.Description
	}
	return m
}

func TestLoadOrder(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		files map[string]string
		want  map[string]string
	}{
		{"nothing", nil, map[string]string{}},
		{
			"a later directory replaces the whole file",
			map[string]string{
				"usr/a.profile": described("usr") + "[Delegate]\nMaps=hash\n", "run/a.profile": described("run"),
				"usr/b.profile": described("usr"), "run/b.profile": described("run"), "etc/b.profile": described("etc"),
				"usr/c.profile": described("usr"),
			},
			map[string]string{"a": "run", "b": "etc", "c": "usr"},
		},
		{
			"drop-ins of all directories, by name",
			map[string]string{
				"etc/a.profile":              described("main"),
				"usr/a.profile.d/20-b.conf":  described("usr 20"),
				"etc/a.profile.d/10-z.conf":  described("etc 10"),
				"etc/a.profile.d/99-no.txt":  described("not read"),
				"etc/a.profile.d/.99-h.conf": described("not read"),
				"etc/b.profile.d/99.conf":    described("no profile"),
			},
			map[string]string{"a": "usr 20"},
		},
		{
			"a drop-in replaces one of the same name",
			map[string]string{
				"usr/a.profile":             described("main"),
				"usr/a.profile.d/10.conf":   described("usr"),
				"run/a.profile.d/10.conf":   "[Attach]\nCgroups=own\n",
				"usr/b.profile":             described("main"),
				"usr/b.profile.d/10.conf":   described("usr"),
				"etc/b.profile.d/10.conf":   "->/dev/null",
				"usr/c.profile":             described("main"),
				"usr/c.profile.d/10.conf":   described("usr"),
				"etc/c.profile.d/10.conf":   "",
				"etc/c.profile.d/11.conf":   "->/dev/null",
				"etc/c.profile.d/README.md": "read me",
			},
			map[string]string{"a": "main", "b": "main", "c": "main"},
		},
		{
			"masks",
			map[string]string{
				"usr/a.profile": good, "etc/a.profile": "->/dev/null",
				"usr/b.profile": good, "run/b.profile": "",
				"usr/c.profile": good, "run/c.profile": "->/dev/null", "etc/c.profile": described("etc"),
				"usr/d.profile": "->/dev/null",
			},
			map[string]string{"c": "etc"},
		},
		{
			"links to files, and files that are none of ours",
			map[string]string{
				"usr/a.profile":  "->../elsewhere/file",
				"elsewhere/file": described("elsewhere"),
				"usr/.b.profile": "garbage", "usr/c.profile~": "garbage", "usr/d.profile.bak": "garbage", "usr/README": "x",
			},
			map[string]string{"a": "elsewhere"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := Load(tree(t, test.files))
			if errs := s.Errors(); errs != nil {
				t.Error(errs)
			}
			if diff := cmp.Diff(test.want, describe(s)); diff != "" {
				t.Error(diff)
			}
			if _, err := s.Get("nobody"); !errors.Is(err, ErrNotFound) {
				t.Errorf("Get of nobody: %v", err)
			}
		})
	}
}

func TestLoadFiles(t *testing.T) {
	t.Parallel()
	dirs := tree(t, map[string]string{
		"usr/a.profile":           good,
		"usr/a.profile.d/20.conf": "[Guard]\nMaxMaps=3\n",
		"etc/a.profile.d/10.conf": "[Profile]\nGuard=optional\n",
	})
	p, err := Load(dirs).Get("a")
	if err != nil {
		t.Fatal(err)
	}
	want := &Profile{
		Name:        "a",
		Description: "d",
		Guard:       GuardOptional,
		Programs:    1 << 1,
		Attachments: 1,
		MaxMaps:     3,
		Files: []string{
			filepath.Join(dirs.Usr, "a.profile"),
			filepath.Join(dirs.Etc, "a.profile.d/10.conf"),
			filepath.Join(dirs.Usr, "a.profile.d/20.conf"),
		},
	}
	if diff := cmp.Diff(want, p); diff != "" {
		t.Error(diff)
	}
	if p.NeedsGuard() {
		t.Error("needs the guard in spite of Guard=optional")
	}
}

// Each bad profile keeps itself from being offered, and nothing else.
func TestLoadBad(t *testing.T) {
	t.Parallel()
	many := map[string]string{"usr/bad.profile": good}
	for i := range config.MaxDropIns + 1 {
		many[fmt.Sprintf("usr/bad.profile.d/%02d.conf", i)] = described("x")
	}
	tests := []struct {
		name  string
		files map[string]string
		mess  func(t *testing.T, d config.Dirs)
		want  string // after the temporary directory
	}{
		{"misspelt key", map[string]string{"usr/bad.profile": "[Profile]\nDescripton=x\n"}, nil,
			`usr/bad.profile:2: unknown key "Descripton" in section [Profile]`},
		{"number in a list", map[string]string{"usr/bad.profile": "[Delegate]\nMaps=hash 5 array\n"}, nil,
			`usr/bad.profile:2: Maps=: "5" is a number, names are needed`},
		{"wrong encoding", map[string]string{"usr/bad.profile": "[Profile]\nDescription=\xff\n"}, nil,
			`usr/bad.profile: not valid UTF-8`},
		{"utf-16", map[string]string{"usr/bad.profile": "\xff\xfe[\x00P\x00"}, nil, `usr/bad.profile: not valid UTF-8`},
		{"NUL", map[string]string{"usr/bad.profile": "[Profile]\nDescription=a\x00b\n"}, nil,
			`usr/bad.profile:2: control character`},
		{"1 MiB", map[string]string{"usr/bad.profile": good + strings.Repeat("#", 1<<20)}, nil,
			`usr/bad.profile: larger than 65536 bytes`},
		{"one byte too many", map[string]string{"usr/bad.profile": good + strings.Repeat("#", config.MaxFileSize+1-len(good))}, nil,
			`usr/bad.profile: larger than 65536 bytes`},
		{"in a drop-in", map[string]string{"usr/bad.profile": good, "etc/bad.profile.d/1.conf": "[Profile]\n\nLeash=1\n"}, nil,
			`etc/bad.profile.d/1.conf:3: unknown key "Leash" in section [Profile]`},
		{"mixed by a drop-in", map[string]string{
			"usr/bad.profile":          "[Guard]\nHelpers=~redirect\n",
			"etc/bad.profile.d/1.conf": "[Guard]\nHelpers=loop\n",
		}, nil,
			`etc/bad.profile.d/1.conf:2: Helpers=: "loop": a list either allows or denies, with ~ before each name`},
		{"a package without the guard", map[string]string{"usr/bad.profile": "[Profile]\nGuard=optional\n"}, nil,
			`usr/bad.profile:2: Guard=: optional is the administrator's word, for a file below /etc or /run`},
		{"a package's drop-in without the guard", map[string]string{
			"etc/bad.profile": good, "usr/bad.profile.d/1.conf": "[Profile]\nGuard=optional\n"}, nil,
			`usr/bad.profile.d/1.conf:2: Guard=: optional is the administrator's word, for a file below /etc or /run`},
		{"too many drop-ins", many, nil, `usr/bad.profile: more than 64 drop-ins`},
		{"directory", map[string]string{"usr/bad.profile/x": ""}, nil, `usr/bad.profile: not a regular file`},
		{"device", map[string]string{"usr/bad.profile": "->/dev/zero"}, nil, `usr/bad.profile: not a regular file`},
		{"dangling link", map[string]string{"usr/bad.profile": "->nowhere"}, nil,
			`usr/bad.profile: cannot stat: no such file or directory`},
		{"link to itself", map[string]string{"usr/bad.profile": "->bad.profile"}, nil,
			`usr/bad.profile: cannot stat: too many levels of symbolic links`},
		{"pipe", nil, func(t *testing.T, d config.Dirs) {
			if err := syscall.Mkfifo(filepath.Join(d.Usr, "bad.profile"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, `usr/bad.profile: not a regular file`},
		{"writable by others", map[string]string{"usr/bad.profile": good}, func(t *testing.T, d config.Dirs) {
			if err := os.Chmod(filepath.Join(d.Usr, "bad.profile"), 0o646); err != nil {
				t.Fatal(err)
			}
		}, `usr/bad.profile: writable by others than its owner, mode 0646`},
		{"drop-ins writable by the group", map[string]string{"usr/bad.profile": good, "usr/bad.profile.d/1.conf": good},
			func(t *testing.T, d config.Dirs) {
				if err := os.Chmod(filepath.Join(d.Usr, "bad.profile.d"), 0o775); err != nil {
					t.Fatal(err)
				}
			}, `usr/bad.profile.d: writable by others than its owner, mode 0775`},
		{"drop-ins in a file", map[string]string{"usr/bad.profile": good, "usr/bad.profile.d": good}, nil,
			`usr/bad.profile.d: not a directory`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			files := map[string]string{"usr/fine.profile": described("fine")}
			for k, v := range test.files {
				files[k] = v
			}
			dirs := tree(t, files)
			if test.mess != nil {
				test.mess(t, dirs)
			}
			s := Load(dirs)
			if diff := cmp.Diff(map[string]string{"fine": "fine"}, describe(s)); diff != "" {
				t.Error(diff)
			}
			_, err := s.Get("bad")
			if _, ok := errors.AsType[*config.FileError](err); !ok {
				t.Fatalf("Get: %v, want a *config.FileError", err)
			}
			want := filepath.Dir(dirs.Usr) + "/" + test.want
			if err.Error() != want {
				t.Errorf("got  %s\nwant %s", err, want)
			}
			if errs := s.Errors(); len(errs) != 1 || errs[0] != err {
				t.Errorf("Errors() = %v", errs)
			}
		})
	}
}

func TestLoadForeignOwner(t *testing.T) {
	t.Parallel()
	dirs := tree(t, map[string]string{"usr/a.profile": good})
	dirs.Owner++
	if got := Load(dirs).All(); got != nil {
		t.Errorf("offered: %v", got)
	}
}

func TestLoadNames(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", config.MaxName)
	names := map[string]bool{
		"a": true, "0": true, "a-b_c-9": true, long: true,
		long + "a": false, "A": false, "-a": false, "_a": false, "a.b": false, "a b": false, "ä": false, "a\nb": false, "a\x1b": false,
	}
	files := map[string]string{"usr/.profile": good}
	for name := range names {
		files["usr/"+name+".profile"] = good
	}
	s := Load(tree(t, files))
	for name, want := range names {
		p, err := s.Get(name)
		if _, bad := errors.AsType[*config.FileError](err); want != (p != nil) || want == bad {
			t.Errorf("%q: %v, %v", name, p, err)
		}
		if err != nil && strings.ContainsFunc(err.Error(), unicode.IsControl) {
			t.Errorf("control character in %q", err)
		}
	}
}

func TestLoadTooMany(t *testing.T) {
	t.Parallel()
	files := map[string]string{}
	for i := range config.MaxNames + 2 {
		files[fmt.Sprintf("usr/p%03d.profile", i)] = good
	}
	s := Load(tree(t, files))
	if got := len(s.All()); got != config.MaxNames {
		t.Errorf("%d profiles", got)
	}
	if got := len(s.Errors()); got != 2 {
		t.Errorf("%d errors", got)
	}
}

// What can't be read might have masked something.
func TestLoadUnreadable(t *testing.T) {
	t.Parallel()
	for name, mess := range map[string]func(d config.Dirs) error{
		"a file":   func(d config.Dirs) error { return os.WriteFile(d.Etc, nil, 0o644) },
		"writable": func(d config.Dirs) error { return errors.Join(os.Mkdir(d.Etc, 0o755), os.Chmod(d.Etc, 0o777)) },
		"crowded": func(d config.Dirs) error {
			err := os.Mkdir(d.Etc, 0o755)
			for i := range config.MaxEntries + 1 {
				err = errors.Join(err, os.WriteFile(filepath.Join(d.Etc, fmt.Sprint(i)), nil, 0o644))
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dirs := tree(t, map[string]string{"usr/a.profile": good})
			if err := mess(dirs); err != nil {
				t.Fatal(err)
			}
			s := Load(dirs)
			if s.All() != nil || len(s.Errors()) != 1 {
				t.Errorf("%v, %v", s.All(), s.Errors())
			}
			for _, name := range []string{"a", "b"} {
				if _, err := s.Get(name); err != s.Errors()[0] {
					t.Errorf("Get: %v", err)
				}
			}
		})
	}
}

func TestShippedTime(t *testing.T) {
	dirs := shippedDirs(t)
	best := time.Hour
	for range 20 {
		start := time.Now()
		Load(dirs)
		best = min(best, time.Since(start))
	}
	if best > 2*time.Millisecond {
		t.Errorf("loading the shipped profiles takes %v", best)
	}
}

func BenchmarkLoad(b *testing.B) {
	dirs := shippedDirs(b)
	for b.Loop() {
		Load(dirs)
	}
}
