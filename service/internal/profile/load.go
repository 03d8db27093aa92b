// SPDX-License-Identifier: Apache-2.0

package profile

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
	maxFileSize = 64 << 10
	maxProfiles = 256
	maxDropIns  = 64
	maxEntries  = 4096
	maxName     = 64
)

// Dirs are where profiles are looked for; a file in a later one stands instead
// of a file of the same name in an earlier one. An empty path isn't looked at.
type Dirs struct {
	// Usr is for packages: nobody may do without the guard there.
	Usr string
	// Run and Etc are the administrator's.
	Run, Etc string

	// owner has to own every file, root but for tests.
	owner uint32
}

// DefaultDirs are those of an installed system.
func DefaultDirs() Dirs {
	return Dirs{
		Usr: "/usr/lib/bpfbroker/profiles.d",
		Run: "/run/bpfbroker/profiles.d",
		Etc: "/etc/bpfbroker/profiles.d",
	}
}

// ErrNotFound is what Get answers for a name that no profile has.
var ErrNotFound = errors.New("no such profile")

// Set is what Load found. It isn't changed afterwards.
type Set struct {
	profiles map[string]*Profile
	wrong    map[string][]*FileError
	// unreadable keeps everything from being offered: what can't be seen might
	// be a mask, or a drop-in that takes rights away.
	unreadable *FileError
}

// Get gives a profile. It answers ErrNotFound for what isn't there or is
// masked, and a *FileError for what is there but can't be offered.
func (s *Set) Get(name string) (*Profile, error) {
	if s.unreadable != nil {
		return nil, s.unreadable
	}
	if errs := s.wrong[name]; errs != nil {
		return nil, errs[0]
	}
	if p := s.profiles[name]; p != nil {
		return p, nil
	}
	return nil, ErrNotFound
}

// All gives the profiles that can be offered, by name.
func (s *Set) All() []*Profile {
	var all []*Profile
	for _, name := range slices.Sorted(maps.Keys(s.profiles)) {
		all = append(all, s.profiles[name])
	}
	return all
}

// Errors gives everything that is wrong, each a *FileError, by profile and then
// in the order of the files.
func (s *Set) Errors() []error {
	var all []error
	if s.unreadable != nil {
		all = append(all, s.unreadable)
	}
	for _, name := range slices.Sorted(maps.Keys(s.wrong)) {
		for _, e := range s.wrong[name] {
			all = append(all, e)
		}
	}
	return all
}

// Load reads the profiles as systemd reads its units: NAME.profile and
// NAME.profile.d/*.conf, of which those in a later directory replace those of
// the same name; an empty file or a link to /dev/null masks. It never fails as
// a whole: a profile with anything wrong in its files isn't offered, the
// others are. Only a directory that can't be read keeps all from being offered.
func Load(dirs Dirs) *Set {
	s := &Set{profiles: map[string]*Profile{}, wrong: map[string][]*FileError{}}
	files := map[string]file{}
	dropIns := map[string][]file{}
	for _, dir := range []file{{dirs.Usr, true}, {dirs.Run, false}, {dirs.Etc, false}} {
		entries, err := dirs.list(dir.path)
		if err != nil {
			s.profiles, s.unreadable = nil, err
			return s
		}
		for _, entry := range entries {
			f := file{filepath.Join(dir.path, entry), dir.vendor}
			if name, ok := strings.CutSuffix(entry, ".profile"); ok {
				files[name] = f
			} else if name, ok := strings.CutSuffix(entry, ".profile.d"); ok {
				dropIns[name] = append(dropIns[name], f)
			}
		}
	}
	for i, name := range slices.Sorted(maps.Keys(files)) {
		var p *Profile
		var errs []*FileError
		switch {
		case !validName(name):
			errs = []*FileError{files[name].fail(0, "a profile's name is a-z, 0-9, _ and -, and at most %d long", maxName)}
		case i >= maxProfiles:
			errs = []*FileError{files[name].fail(0, "more than %d profiles", maxProfiles)}
		default:
			p, errs = dirs.load(name, files[name], dropIns[name])
		}
		if errs != nil {
			s.wrong[name] = errs
		} else if p != nil {
			s.profiles[name] = p
		}
	}
	return s
}

// validName keeps names fit for polkit's details, object paths and journals.
func validName(name string) bool {
	for _, c := range []byte(name) {
		if !digit(c) && (c < 'a' || c > 'z') && c != '_' && c != '-' {
			return false
		}
	}
	return name != "" && len(name) <= maxName && name[0] != '_' && name[0] != '-'
}

// load reads one profile with its drop-ins; it gives neither for a masked one.
func (d Dirs) load(name string, main file, dropInDirs []file) (*Profile, []*FileError) {
	data, err := d.read(main)
	if err != nil {
		return nil, []*FileError{err}
	}
	if len(data) == 0 {
		return nil, nil
	}
	p := &Profile{Name: name, Files: []string{main.path}}
	errs := parse(p, main, data)

	dropIns := map[string]file{}
	for _, dir := range dropInDirs {
		entries, err := d.list(dir.path)
		if err != nil {
			return nil, append(errs, err)
		}
		for _, entry := range entries {
			if strings.HasSuffix(entry, ".conf") {
				dropIns[entry] = file{filepath.Join(dir.path, entry), dir.vendor}
			}
		}
	}
	if len(dropIns) > maxDropIns {
		return nil, append(errs, main.fail(0, "more than %d drop-ins", maxDropIns))
	}
	for _, entry := range slices.Sorted(maps.Keys(dropIns)) {
		if len(errs) >= maxErrors {
			break
		}
		f := dropIns[entry]
		data, err := d.read(f)
		if err != nil {
			errs = append(errs, err)
		} else if len(data) > 0 {
			p.Files = append(p.Files, f.path)
			errs = append(errs, parse(p, f, data)...)
		}
	}
	if errs != nil {
		return nil, errs
	}
	p.finish()
	return p, nil
}

// list gives the names in a directory, without hidden ones; none if it isn't there.
func (d Dirs) list(path string) ([]string, *FileError) {
	if path == "" {
		return nil, nil
	}
	dir := file{path: path}
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
		return nil, dir.fail(0, "not a directory")
	}
	if err := d.trust(info); err != nil {
		return nil, dir.fail(0, "%v", err)
	}
	entries, err := f.Readdirnames(maxEntries + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, dir.cannot("read", err)
	}
	if len(entries) > maxEntries {
		return nil, dir.fail(0, "more than %d entries", maxEntries)
	}
	return slices.DeleteFunc(entries, func(s string) bool { return s[0] == '.' }), nil
}

// read gives a file's content, which is empty when it masks.
func (d Dirs) read(src file) ([]byte, *FileError) {
	// Before opening: opening a device can do things.
	info, err := os.Stat(src.path)
	if err != nil {
		return nil, src.cannot("stat", err)
	}
	if isNull(info) {
		return nil, nil
	}
	if !info.Mode().IsRegular() {
		return nil, src.fail(0, "not a regular file")
	}
	// Not to hang if it was replaced by a pipe.
	f, err := os.OpenFile(src.path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, src.cannot("open", err)
	}
	defer f.Close()
	info, err = f.Stat()
	if err != nil {
		return nil, src.cannot("stat", err)
	}
	if !info.Mode().IsRegular() {
		return nil, src.fail(0, "not a regular file")
	}
	if err := d.trust(info); err != nil {
		return nil, src.fail(0, "%v", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, src.cannot("read", err)
	}
	if len(data) > maxFileSize {
		return nil, src.fail(0, "larger than %d bytes", maxFileSize)
	}
	return data, nil
}

// trust refuses what somebody else than the administrator can change.
func (d Dirs) trust(info fs.FileInfo) error {
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != d.owner {
		return fmt.Errorf("not owned by uid %d", d.owner)
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
