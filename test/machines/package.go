// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
)

// machineSuite is the one that recipe.sh names.
const machineSuite = "forky"

// Package returns a directory in which a package of Debian's, of the machines' suite, is unpacked. It is for programs that
// are too large for the common root: what a test needs of them it writes into a machine. The newest that the suite has is
// fetched once, which takes the network, and kept beside the common root (see Root); to have a newer one, remove it there.
func Package(ctx context.Context, name string) (dir string, err error) {
	if os.Geteuid() != 0 {
		return "", errNotRoot
	}
	if runtime.GOARCH != "amd64" {
		return "", fmt.Errorf("cannot get a package for %s: the mirror's lists are read for amd64 only", runtime.GOARCH)
	}
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	packages := filepath.Join(cache, "packages")
	if err := os.MkdirAll(packages, 0o700); err != nil {
		return "", err
	}
	lock, err := lockFile(ctx, filepath.Join(packages, "lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close()

	dir = filepath.Join(packages, name)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		if err := fetchPackage(ctx, name, dir); err != nil {
			return "", fmt.Errorf("cannot get Debian's package %s: %w", name, errors.Join(ctx.Err(), err))
		}
	}
	return dir, nil
}

// fetchPackage makes dir. The caller holds the lock of the directory that dir is in.
func fetchPackage(ctx context.Context, name, dir string) error {
	if err := needTools("apt-get", "dpkg-deb"); err != nil {
		return err
	}
	building := filepath.Join(filepath.Dir(dir), "building")
	if err := os.RemoveAll(building); err != nil { // of a process that was killed
		return err
	}
	defer os.RemoveAll(building)
	apt, err := openSuite(ctx, machineSuite, filepath.Join(building, "apt"))
	if err != nil {
		return err
	}
	root := filepath.Join(building, "root")
	if err := apt.unpack(ctx, []string{name}, root); err != nil {
		return err
	}
	return os.Rename(root, dir)
}
