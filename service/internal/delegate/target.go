// SPDX-License-Identifier: Apache-2.0

// Package delegate makes BPF tokens possible in a target: it says which
// namespaces may have one, and makes the file system that they come from.
package delegate

import (
	"errors"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// What makes namespaces no target.
var (
	// ErrInitial: a process in the host's own user namespace.
	ErrInitial = errors.New("the process is in the initial user namespace")
	// ErrNested: a namespace inside somebody else's.
	ErrNested = errors.New("the user namespace is inside another user's")
	// ErrMountNotOwned: a user namespace without a mount namespace of its own.
	ErrMountNotOwned = errors.New("the process's mount namespace does not belong to its user namespace")
	// ErrMoved: the process has left the namespaces that were checked.
	ErrMoved = errors.New("the process has changed its namespaces")
)

// Target is a user namespace with its mount namespace, and the process that
// they were found by. It holds them by file descriptors until Close.
type Target struct {
	Process    *kernel.Process
	namespaces *kernel.Namespaces
	// Owner is the uid that owns the user namespace.
	Owner uint32
	// Namespace is its number (kernel.Relation).
	Namespace uint64
}

// NewTarget takes hold of a process's namespaces and checks what the kernel
// says of them. The process stays the caller's and must outlive the target.
func NewTarget(process *kernel.Process) (*Target, error) {
	namespaces, err := process.Namespaces()
	if err != nil {
		return nil, err
	}
	r, err := namespaces.Relation()
	switch {
	case err != nil:
	case r.Initial:
		err = ErrInitial
	case !r.Unmixed:
		err = ErrNested
	case !r.OwnsMount:
		err = ErrMountNotOwned
	}
	if err != nil {
		namespaces.Close()
		return nil, err
	}
	return &Target{Process: process, namespaces: namespaces, Owner: r.Owner, Namespace: r.Inode}, nil
}

// Recheck asks whether the process is alive and still in the namespaces that
// NewTarget checked, which may have been minutes ago.
func (t *Target) Recheck() error {
	now, err := t.Process.Namespaces()
	if err != nil {
		return err
	}
	defer now.Close()
	same, err := t.namespaces.Same(now)
	if err != nil {
		return err
	}
	if !same {
		return ErrMoved
	}
	if !t.Process.Alive() {
		return kernel.ErrProcessGone
	}
	return nil
}

// Namespaces lends the namespaces. They stay the target's own.
func (t *Target) Namespaces() *kernel.Namespaces { return t.namespaces }

// Close gives the namespaces up.
func (t *Target) Close() { t.namespaces.Close() }

// Filesystem makes a BPF file system for the target that delegates what the
// profile says. The caller closes it.
func (t *Target) Filesystem(p *profile.Profile) (*kernel.Filesystem, error) {
	return kernel.Delegate(t.namespaces, kernel.Delegation{
		Commands:    uint64(p.Commands),
		Maps:        uint64(p.Maps),
		Programs:    uint64(p.Programs),
		Attachments: uint64(p.Attachments),
	}, t.Owner)
}
