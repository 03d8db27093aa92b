// SPDX-License-Identifier: Apache-2.0

// Package rlimit remembers the limit on open files that the process was
// started with. Go's os package raises the soft limit to the hard one when it
// is initialized, and its own way of starting processes gives them the old one
// back; what bpfbroker starts by itself must do the same, for programs that
// use select(2).
//
// The specification has packages initialized in the order of their import
// paths, as far as their own imports allow. This one imports only syscall, and
// its path sorts before "os".
package rlimit

import "syscall"

// NoFile is RLIMIT_NOFILE as it was.
var NoFile syscall.Rlimit

func init() {
	// It can't fail for the own process and a valid resource.
	_ = syscall.Getrlimit(syscall.RLIMIT_NOFILE, &NoFile)
}
