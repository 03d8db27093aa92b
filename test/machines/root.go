// SPDX-License-Identifier: Apache-2.0

// Package machines makes test machines: a whole Debian with systemd, D-Bus and polkit, booted in a container on the host's
// kernel. Tests, the demo and the benchmarks drive it from outside, as its users would. It needs root.
package machines

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// recipe makes a root; its hash is part of the root's name.
//
//go:embed recipe.sh
var recipe string

// errNotRoot is what everything here says to ordinary users.
var errNotRoot = errors.New("test machines need root: mounts, namespaces and a booted system")

// Root returns the directory with the machines' common root, which nothing may write to. It is made once, which takes
// about a minute and the network, and kept under $BPFBROKER_CACHE, else /var/cache/bpfbroker. Roots of other recipes
// which no machine uses are removed.
func Root(ctx context.Context) (dir string, err error) {
	root, err := openRoot(ctx)
	if err != nil {
		return "", err
	}
	return root.Name(), root.Close()
}

// openRoot returns the open directory of the root, made if need be. While it is open no other process removes the root.
func openRoot(ctx context.Context) (*os.File, error) {
	if os.Geteuid() != 0 {
		return nil, errNotRoot
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	lock, err := lockFile(ctx, filepath.Join(cache, "lock"))
	if err != nil {
		return nil, err
	}
	defer lock.Close()

	sum := sha256.Sum256([]byte(runtime.GOARCH + "\n" + recipe))
	dir := filepath.Join(cache, fmt.Sprintf("root-%x", sum[:6]))
	if err := removeStale(cache, dir); err != nil {
		return nil, err
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		if err := buildRoot(ctx, cache, dir); err != nil {
			return nil, fmt.Errorf("cannot make the root of the test machine: %w", errors.Join(ctx.Err(), err))
		}
	}
	root, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(root.Fd()), unix.LOCK_SH); err != nil {
		root.Close()
		return nil, fmt.Errorf("cannot lock %s: %w", dir, err)
	}
	return root, nil
}

// cacheDir returns the directory that roots are kept in. It is root's alone: the roots hold set-user-ID programs.
func cacheDir() (string, error) {
	dir := os.Getenv("BPFBROKER_CACHE")
	if dir == "" {
		dir = "/var/cache/bpfbroker"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if strings.ContainsAny(dir, `:,\`) {
		return "", fmt.Errorf(`cannot use BPFBROKER_CACHE=%q: a mount option cannot have ":", "," or "\" in it`, dir)
	}
	// The machines' mount point; each machine sees something else there.
	return dir, os.MkdirAll(filepath.Join(dir, "machine"), 0o700)
}

// lockFile opens and locks the file at path; closing it unlocks it.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file, nil
		}
		// A blocking flock could not be cancelled.
		if !errors.Is(err, unix.EWOULDBLOCK) {
			file.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			file.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", path, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// removeStale removes what interrupted builds left, and the roots other than keep, and their images, that nobody holds.
// The caller holds the cache's lock.
func removeStale(cache, keep string) error {
	unfinished, err := filepath.Glob(filepath.Join(cache, "building-*"))
	if err != nil {
		return err
	}
	roots, err := filepath.Glob(filepath.Join(cache, "root-*"))
	if err != nil {
		return err
	}
	images, err := filepath.Glob(filepath.Join(cache, "image-*"))
	if err != nil {
		return err
	}
	for _, dir := range slices.Concat(unfinished, roots, images) {
		if dir == keep || dir == imagePath(keep) {
			continue
		}
		file, err := os.Open(dir)
		if err != nil {
			return err
		}
		if unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			err = os.RemoveAll(dir)
		}
		file.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// buildRoot runs the recipe in a new directory under cache, which becomes dir when it is complete.
func buildRoot(ctx context.Context, cache, dir string) error {
	if err := needTools("debootstrap", "systemd-machine-id-setup", "unshare"); err != nil {
		return err
	}
	building, err := os.MkdirTemp(cache, "building-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(building)
	if err := os.Chmod(building, 0o755); err != nil {
		return err
	}
	proxies, err := aptProxies(ctx)
	if err != nil {
		return err
	}
	mirror, err := aptMirror(ctx)
	if err != nil {
		return err
	}
	// The init of a process namespace takes everything it started, and the mounts of its mount namespace, with it.
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
		"sh", "-c", recipe, "recipe.sh", building, mirror)
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}, proxies...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	runtime.LockOSThread() // Pdeathsig is about the thread
	defer runtime.UnlockOSThread()
	output, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w, after this output:\n%s", err, lastLines(string(output), 30))
	}
	return os.Rename(building, dir)
}

// aptMirror returns the address of the mirror that the host's apt takes Debian's main component from, or "" if
// debootstrap cannot use that one. apt itself reads its files, whatever their format.
func aptMirror(ctx context.Context) (string, error) {
	codename, err := exec.CommandContext(ctx, "sh", "-c", `. /etc/os-release && echo "$VERSION_CODENAME"`).Output()
	if err != nil {
		return "", fmt.Errorf("cannot read /etc/os-release: %w", err)
	}
	targets, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
		"Created-By: Packages").Output()
	if err != nil {
		return "", fmt.Errorf("cannot ask apt for its sources: %w", err)
	}
	for line := range strings.Lines(string(targets)) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[1] != strings.TrimSpace(string(codename)) || fields[2] != "main" {
			continue
		}
		if strings.HasPrefix(fields[0], "http://") || strings.HasPrefix(fields[0], "https://") {
			return fields[0], nil
		}
	}
	return "", nil
}

// aptProxies returns the environment that makes debootstrap's downloads go the way that apt's go.
func aptProxies(ctx context.Context) ([]string, error) {
	var env []string
	for _, scheme := range []string{"http", "https"} {
		variable := scheme + "_proxy"
		value := os.Getenv(variable)
		if value == "" {
			output, err := exec.CommandContext(ctx, "apt-config", "dump", "--format", "%v", "Acquire::"+scheme+"::Proxy").Output()
			if err != nil {
				return nil, fmt.Errorf("cannot ask apt for its proxy: %w", err)
			}
			value = strings.TrimSpace(string(output))
		}
		if value != "" && value != "DIRECT" {
			env = append(env, variable+"="+value)
		}
	}
	return env, nil
}

// needTools returns an error that names the first program the host lacks.
func needTools(names ...string) error {
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("cannot find %s: run test/setup, which installs it", name)
		}
	}
	return nil
}

// lastLines returns the end of text, count lines at most.
func lastLines(text string, count int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-count):], "\n")
}
