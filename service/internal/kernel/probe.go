// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// ProbeTokens says whether the kernel has BPF tokens, by asking for one
// of a file descriptor that can't be: a kernel that knows the command says
// EBADF, another one EINVAL. The error wraps ErrNotSupported.
func ProbeTokens() error {
	attr := tokenCreateAttr{bpffs: ^uint32(0)}
	if _, err := createToken(&attr); err != unix.EBADF {
		return fmt.Errorf("cannot create BPF tokens: %w", ErrNotSupported)
	}
	return nil
}
