// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/unit"
)

// FileError says what is wrong with a file, so that what it is about isn't offered.
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

// Source is a file that is read, a directory too.
type Source struct {
	Path string
	// Vendor is set below /usr, where a package speaks, not the administrator.
	Vendor bool
}

// Fail says what is wrong with a line of it, or with the whole file (0).
func (s Source) Fail(line int, format string, args ...any) *FileError {
	return &FileError{File: s.Path, Line: line, Reason: fmt.Sprintf(format, args...)}
}

// cannot is for errors of the file system, which name the path themselves.
func (s Source) cannot(do string, err error) *FileError {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err
	}
	return s.Fail(0, "cannot %s: %v", do, err)
}

const (
	maxLine = unit.SYSTEMD_LINE_MAX - 1
	// MaxErrors ends the reading of what was never meant to be such a file.
	MaxErrors = 16
)

// Parse reads one file, and adds what it says to t. It reports everything that
// is wrong with the file; t is of no use then.
func (f *Format[T]) Parse(t *T, src Source, data []byte) []*FileError {
	text, lines, errs := canonical(src, data, f.Section)
	if errs != nil {
		return errs
	}
	options, err := unit.DeserializeOptions(strings.NewReader(text))
	if err == nil && len(options) != len(lines) {
		err = errors.New("not every line was understood")
	}
	if err != nil {
		return []*FileError{src.Fail(0, "%v", err)}
	}
	for i, o := range options {
		if len(errs) >= MaxErrors {
			break
		}
		set := f.Key(o.Section, o.Name)
		if set == nil {
			errs = append(errs, src.Fail(lines[i], "unknown key %.64q in section [%s]", o.Name, o.Section))
		} else if err := set(t, src, o.Value); err != nil {
			errs = append(errs, src.Fail(lines[i], "%s=: %v", o.Name, err))
		}
	}
	return errs
}

// canonical rewrites a file so that each section and each assignment is one
// line of its own and nothing else is left. Comments and continuation lines
// are taken as systemd takes them. It gives the number of the line, in the
// file, of each assignment in the text: unit doesn't tell, and on such a text
// it has nothing to understand differently.
func canonical(src Source, data []byte, known func(section string) bool) (text string, lines []int, errs []*FileError) {
	if !utf8.Valid(data) {
		return "", nil, []*FileError{src.Fail(0, "not valid UTF-8")}
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
			if !known(section) || line != "["+section+"]" {
				return fmt.Errorf("unknown section %.64q", line)
			}
		case !strings.Contains(line, "="):
			return fmt.Errorf("neither a section nor KEY=VALUE: %.64q", line)
		case !known(section):
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
		if len(errs) >= MaxErrors {
			break
		}
		physical = strings.TrimSuffix(physical, "\r")
		if strings.ContainsFunc(physical, func(r rune) bool { return r != '\t' && unicode.IsControl(r) }) {
			errs = append(errs, src.Fail(n, "control character"))
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
			errs = append(errs, src.Fail(start, "%v", err))
		}
	}
	// A file may end in a continuation.
	if err := add(); err != nil {
		errs = append(errs, src.Fail(start, "%v", err))
	}
	return out.String(), lines, errs
}
