// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func (a *app) listCommand() *cobra.Command {
	var all bool
	command := &cobra.Command{
		Use:   "list",
		Short: "List grants",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			var grants []client.Grant
			err := a.ask(command.Context(), func(c *client.Client, _ func()) (err error) {
				grants, err = c.ListGrants(command.Context(), all)
				return err
			})
			if err != nil {
				return err
			}
			if a.wantsJSON() {
				return a.printJSON(grants)
			}
			t := table{header: []string{"GRANT", "PROFILE", "TIER", "PROCESS", "UNIT", "PATH", "SINCE", "LEFT"}, state: -1, noun: "grants"}
			for _, g := range grants {
				left := "-"
				if g.Expires != 0 {
					left = timeSpan(time.Until(time.UnixMicro(g.Expires)))
				}
				t.rows = append(t.rows, []string{g.ID, g.Profile, g.Tier, strconv.Itoa(g.Process),
					cmp.Or(g.Unit, "-"), cmp.Or(g.Path, "-"),
					time.UnixMicro(g.Created).Format("Mon 2006-01-02 15:04:05 MST"), left})
			}
			return a.printTable(t)
		},
	}
	command.Flags().BoolVar(&all, "all", false, "list the grants of all users")
	return command
}

func (a *app) renewCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "renew GRANT…",
		Short:             "Begin the leases of grants anew",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeGrants,
		RunE: func(command *cobra.Command, ids []string) error {
			return each(ids, func(id string) error {
				return a.ask(command.Context(), func(c *client.Client, _ func()) error {
					_, err := c.RenewGrant(command.Context(), id)
					return err
				})
			})
		},
	}
}

func (a *app) revokeCommand() *cobra.Command {
	var kill bool
	command := &cobra.Command{
		Use:               "revoke GRANT…",
		Short:             "End grants",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeGrants,
		RunE: func(command *cobra.Command, ids []string) error {
			c := a.client()
			defer c.Close()
			return each(ids, func(id string) error {
				notReached, err := c.RevokeGrant(command.Context(), id, kill)
				if a.quiet {
					return err
				}
				for _, what := range notReached {
					fmt.Fprintf(os.Stderr, "bpfbroker: revoking %s did not reach %s\n", id, printable(what))
				}
				return err
			})
		},
	}
	command.Flags().BoolVar(&kill, "kill", false, "kill all processes in the grants' user namespaces")
	return command
}

// each does something with each grant, also after errors, which are reported.
func each(ids []string, do func(id string) error) error {
	status := 0
	for _, id := range ids {
		if err := do(id); err != nil {
			status = cmp.Or(status, report(err))
		}
	}
	if status != 0 {
		return exitStatus(status)
	}
	return nil
}

// completeGrants offers the grants' ids to the shell.
func (a *app) completeGrants(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	own := func(c *client.Client, ctx context.Context) ([]client.Grant, error) { return c.ListGrants(ctx, false) }
	return completions(a, own, func(g client.Grant) cobra.Completion {
		return cobra.CompletionWithDesc(g.ID, fmt.Sprintf("%s, process %d", g.Profile, g.Process))
	})
}
