// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// Product returns Options that install this checkout's product, as "make
// install" does, and the tests' programs, for a machine with a kernel (see
// Options). On the host's kernel, which refuses to load the guard, the
// administrator has said that every profile may do without it.
func Product(ctx context.Context, kernel string) Options {
	return Options{Kernel: kernel, Install: func(root string) error {
		for _, args := range [][]string{{"install", "PREFIX=/usr"}, {"install-programs"}} {
			install := exec.CommandContext(ctx, "make", append([]string{"-C", checkout(), "DESTDIR=" + root}, args...)...)
			if out, err := install.CombinedOutput(); err != nil {
				return fmt.Errorf("cannot install: %w\n%s", err, out)
			}
		}
		if kernel == "" {
			if err := withoutGuard(root); err != nil {
				return err
			}
		}
		enable := exec.CommandContext(ctx, "systemctl", "--root="+root, "enable", "bpfbroker.socket")
		if out, err := enable.CombinedOutput(); err != nil {
			return fmt.Errorf("cannot enable the socket: %w\n%s", err, out)
		}
		return nil
	}}
}

// withoutGuard has the administrator accept every profile without the guard.
func withoutGuard(root string) error {
	for _, profile := range []string{"basic", "network", "tracing", "unlimited"} {
		dir := filepath.Join(root, "etc/bpfbroker/profiles.d", profile+".profile.d")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "guard.conf"), []byte("[Profile]\nGuard=optional\n"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// checkout is the top of the source tree that this file was compiled from.
func checkout() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}
