// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

const (
	buildDir   = "build/bench"
	sourceDir  = "test/bench/programs"
	programDir = "/usr/local/lib/bench" // in the machine
)

type command = *exec.Cmd

// build makes the measuring programs.
func build(ctx context.Context) error {
	if err := os.MkdirAll(buildDir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"client", "raw", "spawn"} {
		err := host(ctx, "gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", filepath.Join(buildDir, name), filepath.Join(sourceDir, name+".c"))
		if err != nil {
			return err
		}
	}
	for _, name := range []string{"acquire", "getinfo", "polkit"} {
		err := host(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(buildDir, name), "./"+filepath.Join(sourceDir, name))
		if err != nil {
			return err
		}
	}
	return nil
}

// options installs the product and the measuring programs, and lets alice use
// the profile, with an example from the documentation.
func options(ctx context.Context) machines.Options {
	product := machines.Product(ctx, "").Install
	return machines.Options{Install: func(root string) error {
		if err := product(root); err != nil {
			return err
		}
		for _, args := range [][]string{
			{"install", "-D", "-t", root + programDir, buildDir + "/client", buildDir + "/raw", buildDir + "/spawn", buildDir + "/getinfo", buildDir + "/polkit", buildDir + "/acquire"},
			{"install", "-m", "0644", "-t", root + "/etc/systemd/system", sourceDir + "/getinfo/getinfo.socket", sourceDir + "/getinfo/getinfo.service"},
			{"cp", root + "/usr/share/doc/bpfbroker/polkit/20-network-without-guard.rules", root + "/etc/polkit-1/rules.d"},
			{"gpasswd", "--root", root, "--add", "alice", "bpf"},
		} {
			if err := host(ctx, args[0], args[1:]...); err != nil {
				return err
			}
		}
		return nil
	}}
}

// host runs a command on the host.
func host(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}

// do runs a command as the machine's root.
func (b *bench) do(ctx context.Context, name string, args ...string) error {
	if out, err := b.Command(ctx, "root", name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// sampler takes one sample, in nanoseconds.
type sampler func() (int64, error)

// group is the measuring programs of a figure. Each runs for as long as samples
// are taken, and has no more than its turn to use the processors in.
type group []func() error

// start starts a measuring program. What goes wrong shows in the sampler.
func (g *group) start(cmd command) sampler {
	in, out, err := pipes(cmd)
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return func() (int64, error) { return 0, err }
	}
	*g = append(*g, func() error { return errors.Join(in.Close(), cmd.Wait()) })
	reader := bufio.NewReader(out)
	return func() (int64, error) {
		if _, err := fmt.Fprintln(in); err != nil {
			return 0, err
		}
		return readNumber(reader)
	}
}

func pipes(cmd command) (in io.WriteCloser, out io.ReadCloser, err error) {
	cmd.Stderr = os.Stderr
	if in, err = cmd.StdinPipe(); err != nil {
		return nil, nil, err
	}
	out, err = cmd.StdoutPipe()
	return in, out, err
}

func readNumber(reader *bufio.Reader) (int64, error) {
	line, err := reader.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("cannot read a sample: %w", err)
	}
	return strconv.ParseInt(strings.TrimSuffix(line, "\n"), 10, 64)
}

// close ends the programs.
func (g *group) close() (err error) {
	for _, end := range *g {
		err = errors.Join(err, end())
	}
	return err
}
