// SPDX-License-Identifier: Apache-2.0

package machines

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"

	"github.com/bpfbroker/bpfbroker/test/machines/internal/agent"
)

// kernelSuites says which of Debian's suites have the kernels of a version, the one that changes least first.
var kernelSuites = map[string][]string{
	"6.1":  {"bookworm"},
	"6.12": {"trixie"},
	"7.2":  {"forky", "sid"},
}

// Image is a Debian kernel for virtual machines, unpacked and not installed.
type Image struct {
	// Release is the kernel's full version, as "uname -r" says it.
	Release string
	// Path is the file to boot.
	Path string
	// Modules is the directory with the kernel's modules.
	Modules string
	// busybox is a guest's shell and mount, from the kernel's suite.
	busybox string
}

// Kernel returns Debian's cloud kernel of a version ("6.1", "6.12" or "7.2"), which there is for amd64 only. The newest that
// a suite has is fetched once, which takes some seconds and the network, and kept beside the common root of the machines
// (see Root); to have a newer one, remove it there. The system's own apt, but for its mirror and proxy, isn't involved.
func Kernel(ctx context.Context, version string) (*Image, error) {
	if os.Geteuid() != 0 {
		return nil, errNotRoot
	}
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("cannot test kernels on %s: the virtual machine is made for amd64 only", runtime.GOARCH)
	}
	suites, ok := kernelSuites[version]
	if !ok {
		return nil, fmt.Errorf("cannot get Linux %s: it is not known which suite has it", version)
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	kernels := filepath.Join(cache, "kernels")
	if err := os.MkdirAll(kernels, 0o700); err != nil {
		return nil, err
	}
	lock, err := lockFile(ctx, filepath.Join(kernels, "lock"))
	if err != nil {
		return nil, err
	}
	defer lock.Close()

	dir := filepath.Join(kernels, version)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		if err := fetchKernel(ctx, version, suites, dir); err != nil {
			return nil, fmt.Errorf("cannot get Linux %s: %w", version, errors.Join(ctx.Err(), err))
		}
	}
	modules, err := only(filepath.Join(dir, "modules/*"))
	if err != nil {
		return nil, err
	}
	return &Image{
		Release: filepath.Base(modules),
		Path:    filepath.Join(dir, "vmlinuz"),
		Modules: modules,
		busybox: filepath.Join(dir, "busybox"),
	}, nil
}

// fetchKernel makes dir, from the first suite that has the version. The caller holds the lock of the directory that dir is in.
func fetchKernel(ctx context.Context, version string, suites []string, dir string) error {
	if err := needTools("apt-get", "apt-cache", "dpkg", "dpkg-deb"); err != nil {
		return err
	}
	building := filepath.Join(filepath.Dir(dir), "building")
	defer os.RemoveAll(building)
	var failures []error
	for _, suite := range suites {
		// Of the suite before, or of a process that was killed.
		if err := os.RemoveAll(building); err != nil {
			return err
		}
		complete := filepath.Join(building, "complete")
		err := unpackKernel(ctx, version, suite, building, complete)
		if err == nil {
			return os.Rename(complete, dir)
		}
		failures = append(failures, fmt.Errorf("%s: %w", suite, err))
	}
	return errors.Join(failures...)
}

// unpackKernel puts the files of an Image into complete. The rest of dir is for its work.
func unpackKernel(ctx context.Context, version, suite, dir, complete string) error {
	apt, err := openSuite(ctx, suite, filepath.Join(dir, "apt"))
	if err != nil {
		return err
	}
	packages, err := apt.kernelPackages(ctx, version)
	if err != nil {
		return err
	}
	root := filepath.Join(dir, "root")
	if err := apt.unpack(ctx, append(packages, "busybox-static"), root); err != nil {
		return err
	}
	if err := os.Mkdir(complete, 0o700); err != nil {
		return err
	}
	// Where they are depends on the suite. The kernel can be among its modules, so it goes first.
	for _, file := range []struct{ name, path, newPath string }{
		{"vmlinuz", "boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz"},
		{"modules", "lib/modules", "usr/lib/modules"},
		{"busybox", "bin/busybox", "usr/bin/busybox"},
	} {
		found, err := only(filepath.Join(root, file.path), filepath.Join(root, file.newPath))
		if err != nil {
			return err
		}
		if err := os.Rename(found, filepath.Join(complete, file.name)); err != nil {
			return err
		}
	}
	return nil
}

// only returns the one file that matches one of the patterns.
func only(patterns ...string) (string, error) {
	var found []string
	for _, pattern := range patterns {
		matches, err := filepath.Glob(pattern)
		if err != nil {
			return "", err
		}
		found = append(found, matches...)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("cannot find %s: there are %d", strings.Join(patterns, " or "), len(found))
	}
	return found[0], nil
}

// suite is an apt of its own, whose only source is one of Debian's suites.
type suite struct {
	dir string
	env []string
}

// aptConfig leaves the system's configuration and state out. Mirrors can be frozen: those say of themselves that they are
// out of date, which debootstrap doesn't look at either. What is fetched is only ever read by root.
const aptConfig = `Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::State "%[1]s";
Dir::State::status "/dev/null";
Dir::Cache "%[1]s";
Acquire::Languages "none";
Acquire::Check-Valid-Until "false";
APT::Architecture "amd64";
APT::Sandbox::User "root";
`

// openSuite makes an apt in dir and fetches its package lists, from the mirror that the system's apt uses.
func openSuite(ctx context.Context, name, dir string) (*suite, error) {
	mirror, err := aptMirror(ctx)
	if err != nil {
		return nil, err
	}
	if mirror == "" {
		return nil, errors.New("cannot find a mirror of Debian in the system's apt sources, or its package lists: run apt-get update")
	}
	proxies, err := aptProxies(ctx)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	source := fmt.Sprintf("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", mirror, name)
	if err := os.WriteFile(filepath.Join(dir, "sources.list"), []byte(source), 0o600); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "apt.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, aptConfig, dir), 0o600); err != nil {
		return nil, err
	}
	s := &suite{dir, append([]string{"PATH=" + agent.RootPath, "LANG=C.UTF-8", "APT_CONFIG=" + config}, proxies...)}
	_, err = s.run(ctx, "apt-get", "--quiet", "--error-on=any", "update")
	return s, err
}

// kernelPackages returns the packages that make up the newest cloud kernel of a version.
func (s *suite) kernelPackages(ctx context.Context, version string) ([]string, error) {
	output, err := s.run(ctx, "apt-cache", "pkgnames", "linux-")
	if err != nil {
		return nil, err
	}
	// The kernel and its modules have packages of their own since 7.0, or are in the first one.
	name := regexp.MustCompile(`^linux-(image|binary|modules)-(` + regexp.QuoteMeta(version) + `\..*-cloud-amd64)$`)
	packages := map[string][]string{}
	newest := ""
	for _, line := range strings.Fields(output) {
		match := name.FindStringSubmatch(line)
		if match == nil {
			continue
		}
		release := match[2]
		packages[release] = append(packages[release], line)
		if newest == "" || exec.CommandContext(ctx, "dpkg", "--compare-versions", release, "gt", newest).Run() == nil {
			newest = release
		}
	}
	if newest == "" {
		return nil, errors.New("cannot find a cloud kernel of that version")
	}
	return packages[newest], nil
}

// unpack fetches packages and unpacks them to root.
func (s *suite) unpack(ctx context.Context, packages []string, root string) error {
	if _, err := s.run(ctx, "apt-get", append([]string{"--quiet", "download"}, packages...)...); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(s.dir, "*.deb"))
	if err != nil {
		return err
	}
	for _, file := range files {
		if _, err := s.run(ctx, "dpkg-deb", "--extract", file, root); err != nil {
			return err
		}
	}
	return nil
}

// run runs a command in the suite's directory and returns what it prints.
func (s *suite) run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = s.dir, s.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about the thread
	defer runtime.UnlockOSThread()
	output, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("cannot run %s %s: %w, after this output:\n%s", name, args[0], err, lastLines(string(output), 20))
	}
	return string(output), nil
}
