// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
	"github.com/bpfbroker/bpfbroker/service/client/container"
)

func (a *app) cdiCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cdi",
		Short: "Write the CDI specification, which makes profiles devices of containers",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			c := a.client()
			defer c.Close()
			profiles, err := c.ListProfiles(command.Context())
			if err != nil {
				return err
			}
			program, err := os.Executable()
			if err != nil {
				return fmt.Errorf("cannot find this program: %w", err)
			}
			var names []string
			for _, p := range profiles {
				names = append(names, p.Name)
			}
			return container.WriteSpecification(container.SpecificationPath, program, names)
		},
	}
}

// hookTime bounds a hook. Container engines wait as long as a hook takes.
const hookTime = 30 * time.Second

func (a *app) hookCommand() *cobra.Command {
	command := &cobra.Command{
		Use:    "hook",
		Short:  "Run as a hook of a container engine",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(*cobra.Command, []string) error { return a.usageError("no hook given") },
	}
	hook := func(use string, run func(context.Context, []byte) error) *cobra.Command {
		return &cobra.Command{
			Use:  use,
			Args: cobra.NoArgs,
			RunE: func(command *cobra.Command, _ []string) error {
				ctx, cancel := context.WithTimeout(command.Context(), hookTime)
				defer cancel()
				data, err := container.ReadAll(os.Stdin)
				if err != nil {
					return err
				}
				return run(ctx, data)
			},
		}
	}
	var profile string
	createRuntime := hook("createRuntime", func(ctx context.Context, data []byte) error {
		return a.createRuntime(ctx, data, profile)
	})
	createRuntime.Flags().StringVarP(&profile, "profile", "p", "", "the profile's name")
	command.AddCommand(hook("precreate", a.precreate), createRuntime)
	return command
}

// precreate copies a container's configuration, and adds what its profile needs
// if it names one. Nobody would see an error of this hook: what is wrong is for
// the next one to say.
func (a *app) precreate(ctx context.Context, data []byte) error {
	config, err := container.ParseConfiguration(data)
	if err != nil {
		return err
	}
	if len(config.Profiles) > 0 {
		program, err := os.Executable()
		if err != nil {
			return fmt.Errorf("cannot find this program: %w", err)
		}
		if data, err = config.Edit(program, a.capabilities(ctx, config.Profiles), engineErrors()); err != nil {
			return err
		}
	}
	if _, err := os.Stdout.Write(data); err != nil {
		return fmt.Errorf("cannot print: %w", err)
	}
	return nil
}

// capabilities returns those that the profiles need, as far as there are such
// profiles.
func (a *app) capabilities(ctx context.Context, profiles []string) []string {
	c := a.client()
	defer c.Close()
	var all []string
	for _, name := range profiles {
		if p, err := c.DescribeProfile(ctx, name); err == nil {
			all = append(all, p.Capabilities...)
		}
	}
	return all
}

// engineErrors is a path to the container engine's standard error, "" if that
// can't be opened again, as a socket can't.
func engineErrors() string {
	path := fmt.Sprintf("/proc/%d/fd/2", os.Getppid())
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return ""
	}
	_ = file.Close()
	return path
}

// createRuntime grants a container its profile before its program runs.
func (a *app) createRuntime(ctx context.Context, data []byte, profile string) error {
	state, err := container.ParseState(data)
	if err != nil {
		return err
	}
	pidfd, err := client.OpenProcess(state.PID)
	if err != nil {
		return fmt.Errorf("cannot open the container's process %d: %w", state.PID, err)
	}
	defer pidfd.Close()
	c := a.client()
	defer c.Close()
	_, err = c.MountTokenBelow(ctx, profile, pidfd, state.Root, container.TokenPath)
	return err
}
