// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
	"github.com/bpfbroker/bpfbroker/service/client/container"
)

func (a *app) mountCommand() *cobra.Command {
	var profile, path string
	var pid int
	command := &cobra.Command{
		Use:   "mount -p PROFILE --pid PID",
		Short: "Give a process that runs, or a container, a profile",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			switch {
			case profile == "":
				return a.usageError("mount: no profile given, see \"bpfbroker profiles\"")
			case pid <= 0:
				return a.usageError("mount: no process given")
			}
			return a.mount(command.Context(), profile, pid, path)
		},
	}
	flags := command.Flags()
	flags.StringVarP(&profile, "profile", "p", "", "the profile's name")
	flags.IntVar(&pid, "pid", 0, "the process's id")
	flags.StringVar(&path, "path", container.TokenPath, "the directory to mount at, as the process sees it")
	a.completeProfileFlag(command)
	return command
}

// mount prints the grant's id, or the grant as JSON.
func (a *app) mount(ctx context.Context, profile string, pid int, path string) error {
	pidfd, err := client.OpenProcess(pid)
	if err != nil {
		return fmt.Errorf("cannot open process %d: %w", pid, err)
	}
	defer pidfd.Close()
	var grant *client.Grant
	err = a.ask(ctx, func(c *client.Client, _ func()) (err error) {
		grant, err = c.MountToken(ctx, profile, pidfd, path)
		return err
	})
	if err != nil {
		return err
	}
	if a.wantsJSON() {
		return a.printJSON(grant)
	}
	return a.print(grant.ID + "\n")
}
