// SPDX-License-Identifier: Apache-2.0

// Package config reads what the administrator wrote: text files in systemd's
// style, with drop-ins and masks. What the words in them mean is for others to
// say.
package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Limits of what is read. Everything here belongs to root, so they are there
// for mistakes, not for attacks.
const (
	// MaxFileSize is how many bytes a file may have.
	MaxFileSize = 64 << 10
	// MaxNames is how many files of a kind are read.
	MaxNames = 256
	// MaxDropIns is how many drop-ins a name may have.
	MaxDropIns = 64
	// MaxEntries is how many entries a directory may have.
	MaxEntries = 4096
	// MaxName is how long a name may be, in bytes.
	MaxName = 64
)

// Dirs are where files are looked for; a file in a later one stands instead of
// a file of the same name in an earlier one. An empty path isn't looked at.
type Dirs struct {
	// Usr is for packages.
	Usr string
	// Run and Etc are the administrator's.
	Run, Etc string
	// Owner is the uid that has to own every file: root's, but for tests.
	Owner uint32
}

// DefaultDirs are the directories of that name on an installed system.
func DefaultDirs(name string) Dirs {
	return Dirs{
		Usr: "/usr/lib/bpfbroker/" + name,
		Run: "/run/bpfbroker/" + name,
		Etc: "/etc/bpfbroker/" + name,
	}
}

// Format says how the files of one kind are read into a T.
type Format[T any] struct {
	// Suffix is that of the files, such as ".profile", Noun what they are called,
	// and Missing the error of a name that no file has.
	Suffix, Noun string
	Missing      error
	// Key gives what puts the value of a key into a T, or nil if the section has
	// no such key. Section says whether there is such a section.
	Key     func(section, key string) Setter[T]
	Section func(section string) bool
	// New makes the T of a name.
	New func(name string) *T
	// Finish says what follows from all the files together, whose paths it gets
	// in the order in which they count.
	Finish func(t *T, files []string) error
}

// Setter puts the value of one assignment into t.
type Setter[T any] = func(t *T, src Source, value string) error

// Set is what Load found. It isn't changed afterwards.
type Set[T any] struct {
	missing error
	found   map[string]*T
	wrong   map[string][]*FileError
	// unreadable keeps everything from being offered: what can't be seen might
	// be a mask, or a drop-in that takes rights away.
	unreadable *FileError
}

// Get gives what has the name. It answers the format's Missing for what isn't
// there or is masked, and a *FileError for what is there but can't be offered.
func (s *Set[T]) Get(name string) (*T, error) {
	if s.unreadable != nil {
		return nil, s.unreadable
	}
	if errs := s.wrong[name]; errs != nil {
		return nil, errs[0]
	}
	if t := s.found[name]; t != nil {
		return t, nil
	}
	return nil, s.missing
}

// All gives what can be offered, by name.
func (s *Set[T]) All() []*T {
	var all []*T
	for _, name := range slices.Sorted(maps.Keys(s.found)) {
		all = append(all, s.found[name])
	}
	return all
}

// Wrong gives the names of what can't be offered, in order.
func (s *Set[T]) Wrong() []string { return slices.Sorted(maps.Keys(s.wrong)) }

// Errors gives everything that is wrong, each a *FileError, by name and then in
// the order of the files.
func (s *Set[T]) Errors() []error {
	var all []error
	if s.unreadable != nil {
		all = append(all, s.unreadable)
	}
	for _, name := range s.Wrong() {
		for _, e := range s.wrong[name] {
			all = append(all, e)
		}
	}
	return all
}

// Load reads files as systemd reads its units: NAME.profile, say, and
// NAME.profile.d/*.conf, of which those in a later directory replace those of
// the same name; an empty file or a link to /dev/null masks. It never fails as
// a whole: a name with anything wrong in its files isn't offered, the others
// are. Only a directory that can't be read keeps all from being offered.
func Load[T any](dirs Dirs, format *Format[T]) *Set[T] {
	s := &Set[T]{missing: format.Missing, found: map[string]*T{}, wrong: map[string][]*FileError{}}
	files := map[string]Source{}
	dropIns := map[string][]Source{}
	for _, dir := range []Source{{dirs.Usr, true}, {dirs.Run, false}, {dirs.Etc, false}} {
		entries, err := dirs.list(dir.Path)
		if err != nil {
			s.found, s.unreadable = nil, err
			return s
		}
		for _, entry := range entries {
			f := Source{filepath.Join(dir.Path, entry), dir.Vendor}
			if name, ok := strings.CutSuffix(entry, format.Suffix); ok {
				files[name] = f
			} else if name, ok := strings.CutSuffix(entry, format.Suffix+".d"); ok {
				dropIns[name] = append(dropIns[name], f)
			}
		}
	}
	for i, name := range slices.Sorted(maps.Keys(files)) {
		var t *T
		var errs []*FileError
		switch {
		case !ValidName(name):
			errs = []*FileError{files[name].Fail(0, "the name of %s is a-z, 0-9, _ and -, and at most %d long", format.Noun, MaxName)}
		case i >= MaxNames:
			errs = []*FileError{files[name].Fail(0, "more than %d files of its kind", MaxNames)}
		default:
			t, errs = load(dirs, format, name, files[name], dropIns[name])
		}
		if errs != nil {
			s.wrong[name] = errs
		} else if t != nil {
			s.found[name] = t
		}
	}
	return s
}

// ValidName keeps names fit for polkit's details, object paths and journals.
func ValidName(name string) bool {
	for _, c := range []byte(name) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && c != '_' && c != '-' {
			return false
		}
	}
	return name != "" && len(name) <= MaxName && name[0] != '_' && name[0] != '-'
}

// load reads what has one name, with its drop-ins; it gives neither for what is
// masked.
func load[T any](d Dirs, format *Format[T], name string, main Source, dropInDirs []Source) (*T, []*FileError) {
	data, err := d.read(main)
	if err != nil {
		return nil, []*FileError{err}
	}
	if len(data) == 0 {
		return nil, nil
	}
	t := format.New(name)
	paths := []string{main.Path}
	errs := format.Parse(t, main, data)

	dropIns := map[string]Source{}
	for _, dir := range dropInDirs {
		entries, err := d.list(dir.Path)
		if err != nil {
			return nil, append(errs, err)
		}
		for _, entry := range entries {
			if strings.HasSuffix(entry, ".conf") {
				dropIns[entry] = Source{filepath.Join(dir.Path, entry), dir.Vendor}
			}
		}
	}
	if len(dropIns) > MaxDropIns {
		return nil, append(errs, main.Fail(0, "more than %d drop-ins", MaxDropIns))
	}
	for _, entry := range slices.Sorted(maps.Keys(dropIns)) {
		if len(errs) >= MaxErrors {
			break
		}
		f := dropIns[entry]
		data, err := d.read(f)
		if err != nil {
			errs = append(errs, err)
		} else if len(data) > 0 {
			paths = append(paths, f.Path)
			errs = append(errs, format.Parse(t, f, data)...)
		}
	}
	if errs != nil {
		return nil, errs
	}
	if err := format.Finish(t, paths); err != nil {
		return nil, []*FileError{main.Fail(0, "%v", err)}
	}
	return t, nil
}

// list gives the names in a directory, without hidden ones; none if it isn't there.
func (d Dirs) list(path string) ([]string, *FileError) {
	if path == "" {
		return nil, nil
	}
	dir := Source{Path: path}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, dir.cannot("open", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, dir.cannot("stat", err)
	}
	if !info.IsDir() {
		return nil, dir.Fail(0, "not a directory")
	}
	if err := d.trust(info); err != nil {
		return nil, dir.Fail(0, "%v", err)
	}
	entries, err := f.Readdirnames(MaxEntries + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, dir.cannot("read", err)
	}
	if len(entries) > MaxEntries {
		return nil, dir.Fail(0, "more than %d entries", MaxEntries)
	}
	return slices.DeleteFunc(entries, func(s string) bool { return s[0] == '.' }), nil
}

// read gives a file's content, which is empty when it masks.
func (d Dirs) read(src Source) ([]byte, *FileError) {
	return d.readUpTo(src, MaxFileSize)
}

// ReadFile gives the content of a file that a setting names, of at most size
// bytes. It is held to the rules of the settings' own files, but for masks.
func (d Dirs) ReadFile(path string, size int64) ([]byte, *FileError) {
	src := Source{Path: path}
	data, err := d.readUpTo(src, size)
	if err == nil && len(data) == 0 {
		return nil, src.Fail(0, "empty")
	}
	return data, err
}

func (d Dirs) readUpTo(src Source, size int64) ([]byte, *FileError) {
	// Before opening: opening a device can do things.
	info, err := os.Stat(src.Path)
	if err != nil {
		return nil, src.cannot("stat", err)
	}
	if isNull(info) {
		return nil, nil
	}
	if !info.Mode().IsRegular() {
		return nil, src.Fail(0, "not a regular file")
	}
	// Not to hang if it was replaced by a pipe.
	f, err := os.OpenFile(src.Path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, src.cannot("open", err)
	}
	defer f.Close()
	info, err = f.Stat()
	if err != nil {
		return nil, src.cannot("stat", err)
	}
	if !info.Mode().IsRegular() {
		return nil, src.Fail(0, "not a regular file")
	}
	if err := d.trust(info); err != nil {
		return nil, src.Fail(0, "%v", err)
	}
	if info.Size() > size {
		return nil, src.Fail(0, "larger than %d bytes", size)
	}
	data, err := io.ReadAll(io.LimitReader(f, size+1))
	if err != nil {
		return nil, src.cannot("read", err)
	}
	if int64(len(data)) > size {
		return nil, src.Fail(0, "larger than %d bytes", size)
	}
	return data, nil
}

// trust refuses what somebody else than the administrator can change.
func (d Dirs) trust(info fs.FileInfo) error {
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != d.Owner {
		return fmt.Errorf("not owned by uid %d", d.Owner)
	}
	if info.Mode()&0o022 != 0 {
		return fmt.Errorf("writable by others than its owner, mode %#o", info.Mode().Perm())
	}
	return nil
}

// isNull recognizes /dev/null, by whatever name.
func isNull(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && info.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 1<<8|3
}
