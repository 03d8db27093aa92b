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
// install" does, and the tests' programs. The administrator of the machine has
// said that every profile may do without the guard, because the host's kernel
// refuses to load it.
func Product(ctx context.Context) Options {
	return Options{Install: func(root string) error {
		for _, args := range [][]string{{"install", "PREFIX=/usr"}, {"install-programs"}} {
			install := exec.CommandContext(ctx, "make", append([]string{"-C", checkout(), "DESTDIR=" + root}, args...)...)
			if out, err := install.CombinedOutput(); err != nil {
				return fmt.Errorf("cannot install: %w\n%s", err, out)
			}
		}
		for _, profile := range []string{"basic", "network", "tracing", "unlimited"} {
			dir := filepath.Join(root, "etc/bpfbroker/profiles.d", profile+".profile.d")
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, "guard.conf"), []byte("[Profile]\nGuard=optional\n"), 0o644); err != nil {
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

// checkout is the top of the source tree that this file was compiled from.
func checkout() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}
