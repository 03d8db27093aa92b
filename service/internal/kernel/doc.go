// SPDX-License-Identifier: Apache-2.0

// Package kernel is the only package of bpfbroker that makes raw system calls:
// namespaces, mounts, bpf(2), pidfds and what a Unix socket says of its peer.
//
// Everything here works on file descriptors that the kernel vouches for and
// never on a pid or path that somebody else named, except where a path is
// opened inside a target and with the target's own credentials.
package kernel

import "errors"

// ErrNotSupported means that the running kernel lacks what was asked for. It
// is wrapped in an error that names the missing part.
var ErrNotSupported = errors.New("not supported by this kernel")
