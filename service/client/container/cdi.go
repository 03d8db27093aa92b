// SPDX-License-Identifier: Apache-2.0

package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// SpecificationPath is where the CDI specification is kept. Container engines
// read all files there (/var/run/cdi).
const SpecificationPath = "/run/cdi/bpfbroker.org-profile.json"

// The parts of a CDI specification. 0.5.0 is the first version in which a
// device's name may begin with a digit.
const (
	cdiVersion = "0.5.0"
	cdiKind    = "bpfbroker.org/profile"
)

type specification struct {
	Version string   `json:"cdiVersion"`
	Kind    string   `json:"kind"`
	Devices []device `json:"devices"`
}

type device struct {
	Name  string `json:"name"`
	Edits edits  `json:"containerEdits"`
}

type edits struct {
	Env   []string `json:"env"`
	Hooks []hook   `json:"hooks"`
}

// WriteSpecification writes a CDI specification with a device for each profile,
// named like it, to the file at path. program is bpfbroker's. Readers see the
// old file or the new one. Without profiles there is to be no file, as a
// specification needs devices.
func WriteSpecification(path, program string, profiles []string) (err error) {
	spec := specification{Version: cdiVersion, Kind: cdiKind}
	for _, profile := range profiles {
		if !validDevice(profile) {
			continue // one bad name would spoil the whole file
		}
		h := newHook(program, profile)
		h.Name = createRuntime
		spec.Devices = append(spec.Devices, device{profile, edits{[]string{tokenVariable + TokenPath}, []hook{h}}})
	}
	if len(spec.Devices) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot remove the CDI specification: %w", err)
		}
		return nil
	}
	data, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		return fmt.Errorf("cannot encode the CDI specification: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot write the CDI specification: %w", err)
		}
	}()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	// Engines read files of certain endings, and this isn't one.
	file, err := os.CreateTemp(filepath.Dir(path), ".bpfbroker-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(file.Name())
		}
	}()
	_, err = file.Write(append(data, '\n'))
	if err == nil {
		err = file.Chmod(0o644)
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), path)
}

// validDevice says whether CDI takes the name for a device's: letters, digits
// and "_-.:", with a letter or a digit at both ends.
func validDevice(name string) bool {
	for i, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && i < len(name)-1 && (c == '_' || c == '-' || c == '.' || c == ':'):
		default:
			return false
		}
	}
	return name != ""
}
