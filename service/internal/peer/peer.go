// SPDX-License-Identifier: Apache-2.0

// Package peer says who asks: what the kernel verified of the process at the
// other end, and nothing that was said.
package peer

import (
	"net"
	"strings"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// Peer is the process that connected a socket. It owns its Process.
type Peer struct {
	*kernel.Credentials
	key uint32
}

// New makes a peer of what the kernel or the bus verified. The caller closes the
// peer, and the credentials with it.
func New(credentials *kernel.Credentials) *Peer {
	return &Peer{credentials, Account(credentials.UID)}
}

// FromConn asks the kernel who connected. The caller closes the peer.
func FromConn(conn *net.UnixConn) (*Peer, error) {
	credentials, err := kernel.PeerCredentials(conn)
	if err != nil {
		return nil, err
	}
	return New(credentials), nil
}

// Key is what the limits of a user count by, see Account.
func (p *Peer) Key() uint32 { return p.key }

// Close gives up the hold on the process.
func (p *Peer) Close() { _ = p.Process.Close() }

// Unit is where systemd runs a process.
type Unit struct {
	// System is the system manager's unit, such as "cron.service" or
	// "user@1000.service".
	System string
	// User is a user manager's unit, "" for a process of none. The user can
	// name it as it likes; System can't be had without root.
	User string
}

// UnitOf finds the units of a process by its cgroup, the zero Unit where there
// are none. systemd.unit(5) and CGROUP_DELEGATION.md say how paths are made.
func UnitOf(p *kernel.Process) (Unit, error) {
	path, err := p.Cgroup()
	if err != nil {
		return Unit{}, err
	}
	return parseUnit(path), nil
}

func parseUnit(path string) Unit {
	var u Unit
	u.System, path = nextUnit(path)
	if strings.HasPrefix(u.System, "user@") {
		u.User, _ = nextUnit(path)
	}
	return u
}

// unitCharacters are those that a unit's name may have (systemd.unit(5)). Who
// owns a cgroup can make directories of any name in it.
const unitCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\@"

// nextUnit returns the first unit below the slices at the path's beginning,
// and what follows it.
func nextUnit(path string) (unit, rest string) {
	for path != "" {
		var name string
		name, path, _ = strings.Cut(strings.TrimPrefix(path, "/"), "/")
		// systemd escapes names that the kernel reserves with a '_'.
		name = strings.TrimPrefix(name, "_")
		switch {
		case strings.Trim(name, unitCharacters) != "":
			return "", ""
		case strings.HasSuffix(name, ".slice"):
		case strings.HasSuffix(name, ".service"), strings.HasSuffix(name, ".scope"):
			return name, path
		default:
			return "", ""
		}
	}
	return "", ""
}

// Name is the innermost unit, for people.
func (u Unit) Name() string {
	if u.User != "" {
		return u.User
	}
	return u.System
}
