// SPDX-License-Identifier: Apache-2.0

//go:build !export

package main

import (
	"context"
	"fmt"
	"os"
	"syscall"
)

// exporter is this program with the build tag "export"; the linker sets it. The
// libraries of the exporter are larger than all the rest, and each start of
// "bpfbroker run" would take the longer for them.
var exporter string

// export has the exporter do it, as the same process.
func (a *app) export(context.Context, string, []string) error {
	err := syscall.Exec(exporter, os.Args, os.Environ())
	return fmt.Errorf("cannot execute %s: %w", exporter, err)
}
