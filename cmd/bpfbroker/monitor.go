// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func (a *app) monitorCommand() *cobra.Command {
	var all bool
	command := &cobra.Command{
		Use:   "monitor",
		Short: "Show what happens to grants, as it happens",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			a.noPager = true // there is no end to wait for
			var failed error
			ctx, cancel := context.WithCancel(command.Context())
			defer cancel()
			err := a.ask(ctx, func(c *client.Client, endAgent func()) error {
				return c.Monitor(ctx, all, func() {
					endAgent()
					if !a.quiet {
						fmt.Fprintln(os.Stderr, "Monitoring grants.")
					}
				}, func(e *client.Event) {
					if failed = a.printEvent(e, all); failed != nil {
						cancel()
					}
				})
			})
			if failed != nil {
				return failed
			}
			return err
		},
	}
	command.Flags().BoolVar(&all, "all", false, "show those of all users")
	return command
}

func (a *app) printEvent(e *client.Event, all bool) error {
	if a.wantsJSON() {
		return a.printJSON(e)
	}
	return a.print(eventLine(e, all) + "\n")
}

// eventLine says what happened in a line.
func eventLine(e *client.Event, all bool) string {
	var about []string
	add := func(format string, args ...any) { about = append(about, fmt.Sprintf(format, args...)) }
	process := func() {
		if e.Command != "" {
			add("by %s[%d]", e.Command, e.Process)
		}
	}
	switch e.Kind {
	case "made", "leased":
		add("%s, process %d", e.Profile, e.Process)
		if e.Expires != 0 {
			add("until %s", time.UnixMicro(e.Expires).Format(time.DateTime))
		}
	case "loaded":
		add("%s, tag %s", e.Program, e.Tag)
		process()
	case "denied":
		add("%s", e.Reason)
		if e.Program != "" {
			add("for %s", e.Program)
		}
		process()
		add("(%s)", strings.TrimSuffix(e.Layer+": "+e.Setting, ": "))
	case "lost":
		add("%d events: %s", e.Lost, e.Reason)
	default:
		if e.Profile != "" {
			add("%s", e.Profile)
		}
		add("%s", e.Reason)
		if e.Layer != "" {
			add("(%s)", e.Layer)
		}
	}
	owner := ""
	if all {
		owner = fmt.Sprintf(" user %d", e.Owner)
	}
	return printable(fmt.Sprintf("%s%s %-7s %-16s %s", time.UnixMicro(e.Time).Format(time.Stamp), owner, e.Kind,
		cmp.Or(e.Grant, "-"), strings.Join(about, ", ")))
}
