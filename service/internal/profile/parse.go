// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
)

const (
	maxNames      = 1024
	maxIdentifier = 127
)

// ErrNotFound is what Get answers for a name that no profile has.
var ErrNotFound = errors.New("no such profile")

// Set is the profiles that Load found. It isn't changed afterwards.
type Set = config.Set[Profile]

// DefaultDirs are those of an installed system.
func DefaultDirs() config.Dirs { return config.DefaultDirs("profiles.d") }

// Load reads the profiles in NAME.profile and NAME.profile.d/*.conf.
func Load(dirs config.Dirs) *Set { return config.Load(dirs, &format) }

var format = config.Format[Profile]{
	Suffix:  ".profile",
	Noun:    "a profile",
	Missing: ErrNotFound,
	Key:     func(section, key string) setter { return keys[section][key] },
	Section: func(section string) bool { return keys[section] != nil },
	New:     func(name string) *Profile { return &Profile{Name: name} },
	Finish: func(p *Profile, files []string) error {
		p.Files = files
		p.finish()
		return nil
	},
}

type setter = config.Setter[Profile]

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

func setDescription(p *Profile, _ config.Source, value string) error {
	p.Description = value
	return config.CheckDescription(value)
}

func setGuard(p *Profile, src config.Source, value string) error {
	switch value {
	case "":
		p.Guard = GuardUnneeded
	case "required":
		p.Guard = GuardRequired
	case "optional":
		if src.Vendor {
			return errors.New("optional is the administrator's word, for a file below /etc or /run")
		}
		p.Guard = GuardOptional
	default:
		return fmt.Errorf("%.64q is neither required nor optional", value)
	}
	return nil
}

func setMask(e *enum, field func(*Profile) *Mask) setter {
	return func(p *Profile, _ config.Source, value string) error {
		if value == "" {
			*field(p) = 0
		}
		for _, word := range config.Words(value) {
			m, err := e.parse(word)
			if err != nil {
				return err
			}
			*field(p) |= m
		}
		return nil
	}
}

func setCapabilities(p *Profile, _ config.Source, value string) error {
	if value == "" {
		p.Capabilities = nil
	}
	for _, word := range config.Words(value) {
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
	return func(p *Profile, _ config.Source, value string) error {
		n := field(p)
		if value == "" {
			*n = Names{}
		}
		for _, word := range config.Words(value) {
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
	return func(p *Profile, _ config.Source, value string) error {
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
