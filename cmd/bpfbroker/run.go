// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func (a *app) runCommand() *cobra.Command {
	var profile string
	var root bool
	command := &cobra.Command{
		Use:   "run -p PROFILE [-- COMMAND [ARGUMENT…]]",
		Short: "Run a command, or a shell, with a profile",
		RunE: func(command *cobra.Command, args []string) error {
			if profile == "" {
				return a.usageError("run: no profile given, see \"bpfbroker profiles\"")
			}
			if len(args) == 0 {
				args = []string{cmp.Or(os.Getenv("SHELL"), "/bin/sh")}
			}
			return a.run(command.Context(), profile, root, args)
		},
	}
	flags := command.Flags()
	flags.SetInterspersed(false)
	flags.StringVarP(&profile, "profile", "p", "", "the profile's name")
	flags.BoolVar(&root, "root", false, "run as root of the new user namespace")
	a.completeProfileFlag(command)
	return command
}

// run runs a command. Its error is nil or an exitStatus once it has started.
func (a *app) run(ctx context.Context, profile string, root bool, args []string) error {
	// Nobody should type a password for what isn't there.
	path, err := lookUp(args[0])
	if err != nil {
		return err
	}
	signals := watchSignals(ctx)
	managed := underManager()
	if managed {
		// As in systemd's other services (IgnoreSIGPIPE=): Go takes the signal,
		// and doesn't say whether it was ignored.
		signal.Ignore(syscall.SIGPIPE)
	}
	command, err := a.start(signals.ctx, func(c *client.Client) *client.Command {
		command := c.Command(profile, path)
		command.Args, command.Root = args, root
		command.Heir, command.Sibling = true, managed
		if managed {
			command.Granted = func(*client.Grant) error { return handOver(signals.ctx, command.PID()) }
		}
		return command
	})
	if err != nil {
		return notStarted(args[0], err)
	}
	if managed {
		return nil // the service manager has the command now
	}
	return finish(signals, command, args[0])
}

// notStarted is for the error of start.
func notStarted(name string, err error) error {
	var interrupted interruption
	var notExecuted *fs.PathError
	switch {
	case errors.As(err, &interrupted):
		return exitStatus(exitSignal + int(interrupted))
	case errors.As(err, &notExecuted):
		return cannotRun(name, notExecuted.Err, exitNotExecutable)
	}
	return err
}

// finish waits for a command to end. Its error is nil or an exitStatus, if it has.
func finish(signals *signalWatch, command *client.Command, name string) error {
	signals.forwardTo(command)
	status, err := command.Wait()
	switch {
	case err != nil:
		return fmt.Errorf("cannot wait for %s: %w", name, err)
	case status.Signaled():
		return exitStatus(exitSignal + int(status.Signal()))
	case status.ExitStatus() != 0:
		return exitStatus(status.ExitStatus())
	}
	return nil
}

// start starts the command that make makes.
func (a *app) start(ctx context.Context, make func(*client.Client) *client.Command) (command *client.Command, err error) {
	err = a.ask(ctx, func(c *client.Client, endAgent func()) error {
		command = make(c)
		// The terminal is the command's alone.
		granted := command.Granted
		command.Granted = func(g *client.Grant) error {
			endAgent()
			if granted == nil {
				return nil
			}
			return granted(g)
		}
		return command.Start(ctx)
	})
	return command, err
}

// lookUp finds a program as shells do.
func lookUp(name string) (string, error) {
	path, err := exec.LookPath(name)
	switch {
	case err == nil, errors.Is(err, exec.ErrDot):
		return path, nil
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return "", cannotRun(name, err, exitNotFound)
	}
	return "", cannotRun(name, err, exitNotExecutable)
}

// cannotRun prints why and returns the status.
func cannotRun(name string, err error, status exitStatus) error {
	var lookup *exec.Error
	if errors.As(err, &lookup) {
		err = lookup.Err
	}
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	fmt.Fprintf(os.Stderr, "bpfbroker: cannot run %s: %v\n", printable(name), err)
	return status
}
