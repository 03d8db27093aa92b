// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/unit"
)

// FileError says what is wrong with a file, so that its profile isn't offered.
type FileError struct {
	File string
	// Line counts from 1; 0 is the whole file. An assignment over several
	// lines is known by its first.
	Line   int
	Reason string
}

// Error gives "FILE:LINE: reason", or "FILE: reason", fit for a terminal.
func (e *FileError) Error() string {
	name := e.File
	if strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		name = strconv.Quote(name)
	}
	if e.Line == 0 {
		return name + ": " + e.Reason
	}
	return fmt.Sprintf("%s:%d: %s", name, e.Line, e.Reason)
}

// file is one that is read, a directory too.
type file struct {
	path string
	// vendor is set below /usr, where a package speaks, not the administrator.
	vendor bool
}

func (f file) fail(line int, format string, args ...any) *FileError {
	return &FileError{File: f.path, Line: line, Reason: fmt.Sprintf(format, args...)}
}

// cannot is for errors of the file system, which name the path themselves.
func (f file) cannot(do string, err error) *FileError {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err
	}
	return f.fail(0, "cannot %s: %v", do, err)
}

const (
	maxLine        = unit.SYSTEMD_LINE_MAX - 1
	maxNames       = 1024
	maxIdentifier  = 127
	maxDescription = 256
	// maxErrors ends the reading of what was never meant to be a profile.
	maxErrors = 16
)

// setter puts the value of one assignment into the profile.
type setter func(p *Profile, src file, value string) error

// keys are all that may be written. Repeated lists append, everything else is
// replaced; an empty value takes back what was said before, as in systemd.
var keys = map[string]map[string]setter{
	"Profile": {
		"Description": setDescription,
		"Lease":       setLease,
		"Guard":       setGuard,
	},
	"Delegate": {
		"Commands":    setMask(&commands, func(p *Profile) *Mask { return &p.Commands }),
		"Maps":        setMask(&mapTypes, func(p *Profile) *Mask { return &p.Maps }),
		"Programs":    setMask(&programs, func(p *Profile) *Mask { return &p.Programs }),
		"Attachments": setMask(&attachments, func(p *Profile) *Mask { return &p.Attachments }),
	},
	"Guard": {
		"Capabilities": setCapabilities,
		"Helpers":      setNames(helperName, func(p *Profile) *Names { return &p.Helpers }),
		"Kfuncs":       setNames(kfuncName, func(p *Profile) *Names { return &p.Kfuncs }),
		"MaxPrograms":  setCount(func(p *Profile) *int { return &p.MaxPrograms }),
		"MaxMaps":      setCount(func(p *Profile) *int { return &p.MaxMaps }),
		"MaxMapBytes":  setMapBytes,
	},
	"Attach": {
		"Interfaces": setReach(func(p *Profile) *Reach { return &p.Attach.Interfaces }),
		"Cgroups":    setReach(func(p *Profile) *Reach { return &p.Attach.Cgroups }),
		"Processes":  setReach(func(p *Profile) *Reach { return &p.Attach.Processes }),
	},
}

// parse reads one file, and adds what it says to p. It reports everything that
// is wrong with the file; p is of no use then.
func parse(p *Profile, src file, data []byte) []*FileError {
	text, lines, errs := canonical(src, data)
	if errs != nil {
		return errs
	}
	options, err := unit.DeserializeOptions(strings.NewReader(text))
	if err == nil && len(options) != len(lines) {
		err = errors.New("not every line was understood")
	}
	if err != nil {
		return []*FileError{src.fail(0, "%v", err)}
	}
	for i, o := range options {
		if len(errs) >= maxErrors {
			break
		}
		set := keys[o.Section][o.Name]
		if set == nil {
			errs = append(errs, src.fail(lines[i], "unknown key %.64q in section [%s]", o.Name, o.Section))
		} else if err := set(p, src, o.Value); err != nil {
			errs = append(errs, src.fail(lines[i], "%s=: %v", o.Name, err))
		}
	}
	return errs
}

// canonical rewrites a file so that each section and each assignment is one
// line of its own and nothing else is left. Comments and continuation lines
// are taken as systemd takes them. It gives the number of the line, in the
// file, of each assignment in the text: unit doesn't tell, and on such a text
// it has nothing to understand differently.
func canonical(src file, data []byte) (text string, lines []int, errs []*FileError) {
	if !utf8.Valid(data) {
		return "", nil, []*FileError{src.fail(0, "not valid UTF-8")}
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))

	var out, logical strings.Builder
	section := ""
	start := 0
	add := func() error {
		line := strings.TrimSpace(logical.String())
		logical.Reset()
		switch {
		case line == "":
			return nil
		case len(line) > maxLine:
			return fmt.Errorf("longer than %d bytes; write several assignments, they append", maxLine)
		case strings.HasSuffix(line, `\`):
			return errors.New("ends in a backslash that continues nothing")
		case line[0] == '[':
			section = strings.TrimSuffix(line[1:], "]")
			if keys[section] == nil || line != "["+section+"]" {
				return fmt.Errorf("unknown section %.64q", line)
			}
		case !strings.Contains(line, "="):
			return fmt.Errorf("neither a section nor KEY=VALUE: %.64q", line)
		case keys[section] == nil:
			return errors.New("not in a section that is known")
		default:
			lines = append(lines, start)
		}
		out.WriteString(line + "\n")
		return nil
	}

	n := 0
	for physical := range strings.SplitSeq(string(data), "\n") {
		n++
		if len(errs) >= maxErrors {
			break
		}
		physical = strings.TrimSuffix(physical, "\r")
		if strings.ContainsFunc(physical, func(r rune) bool { return r != '\t' && unicode.IsControl(r) }) {
			errs = append(errs, src.fail(n, "control character"))
			continue
		}
		// Also between the lines of one assignment, and never continued.
		if s := strings.TrimLeft(physical, " \t"); s != "" && (s[0] == '#' || s[0] == ';') {
			continue
		}
		if logical.Len() == 0 {
			start = n
		}
		rest := strings.TrimRight(physical, `\`)
		if continued := (len(physical)-len(rest))%2 == 1; continued {
			logical.WriteString(physical[:len(physical)-1] + " ")
			continue
		}
		logical.WriteString(physical)
		if err := add(); err != nil {
			errs = append(errs, src.fail(start, "%v", err))
		}
	}
	// A file may end in a continuation.
	if err := add(); err != nil {
		errs = append(errs, src.fail(start, "%v", err))
	}
	return out.String(), lines, errs
}

// finish computes what follows from all the files together.
func (p *Profile) finish() {
	// PROG_LOAD wants the bit of expected_attach_type too, and these send 0.
	// It opens no other door: a cgroup_skb program, for which 0 means
	// something, counts as it does by its program type alone.
	if p.Programs&zeroSenders != 0 {
		p.Attachments |= 1
	}
	if p.Guard == GuardUnneeded && p.NotEnforced() != nil {
		p.Guard = GuardRequired
	}
}

func setDescription(p *Profile, _ file, value string) error {
	// It is shown on terminals and by polkit: no escapes, no reordering of text.
	if strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return errors.New("not printable")
	}
	if len(value) > maxDescription {
		return fmt.Errorf("longer than %d bytes", maxDescription)
	}
	p.Description = value
	return nil
}

func setGuard(p *Profile, src file, value string) error {
	switch value {
	case "":
		p.Guard = GuardUnneeded
	case "required":
		p.Guard = GuardRequired
	case "optional":
		if src.vendor {
			return errors.New("optional is the administrator's word, for a file below /etc or /run")
		}
		p.Guard = GuardOptional
	default:
		return fmt.Errorf("%.64q is neither required nor optional", value)
	}
	return nil
}

// words splits a list at white space, or at systemd's commas.
func words(value string) []string {
	return strings.FieldsFunc(value, func(r rune) bool { return r == ' ' || r == '\t' || r == ',' })
}

func setMask(e *enum, field func(*Profile) *Mask) setter {
	return func(p *Profile, _ file, value string) error {
		if value == "" {
			*field(p) = 0
		}
		for _, word := range words(value) {
			m, err := e.parse(word)
			if err != nil {
				return err
			}
			*field(p) |= m
		}
		return nil
	}
}

func setCapabilities(p *Profile, _ file, value string) error {
	if value == "" {
		p.Capabilities = nil
	}
	for _, word := range words(value) {
		if !slices.Contains([]string{capBPF, capNetAdmin, capPerfmon, capSysAdmin}, word) {
			return fmt.Errorf("%.64q is no capability that a token uses (%s, %s, %s, %s)",
				word, capBPF, capNetAdmin, capPerfmon, capSysAdmin)
		}
		if !slices.Contains(p.Capabilities, word) {
			p.Capabilities = append(p.Capabilities, word)
		}
	}
	return nil
}

func setNames(check func(string) (string, error), field func(*Profile) *Names) setter {
	return func(p *Profile, _ file, value string) error {
		n := field(p)
		if value == "" {
			*n = Names{}
		}
		for _, word := range words(value) {
			word, deny := strings.CutPrefix(word, "~")
			name, err := check(word)
			if err != nil {
				return err
			}
			if len(n.List) > 0 && deny != n.Deny {
				return fmt.Errorf("%.64q: a list either allows or denies, with ~ before each name", name)
			}
			n.Deny = deny
			if !slices.Contains(n.List, name) {
				n.List = append(n.List, name)
			}
			if len(n.List) > maxNames {
				return fmt.Errorf("more than %d names", maxNames)
			}
		}
		return nil
	}
}

// helperName takes a helper's name with or without bpf_ before it.
func helperName(word string) (string, error) {
	name := strings.TrimPrefix(word, "bpf_")
	if !slices.Contains(helpers, name) {
		return "", fmt.Errorf("unknown helper %.64q", word)
	}
	return name, nil
}

// kfuncName takes any identifier: modules bring kfuncs of their own.
func kfuncName(word string) (string, error) {
	ok := word != "" && len(word) <= maxIdentifier && !digit(word[0])
	for _, r := range []byte(word) {
		ok = ok && (r == '_' || digit(r) || 'a' <= r|0x20 && r|0x20 <= 'z')
	}
	if !ok {
		return "", fmt.Errorf("%.64q is no function's name", word)
	}
	return word, nil
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

func setReach(field func(*Profile) *Reach) setter {
	return func(p *Profile, _ file, value string) error {
		switch value {
		case "":
			*field(p) = ReachNone
		case "own":
			*field(p) = ReachOwn
		case "any":
			*field(p) = ReachAny
		default:
			return fmt.Errorf("%.64q is neither own nor any", value)
		}
		return nil
	}
}
