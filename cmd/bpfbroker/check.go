// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func (a *app) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Tell what this kernel, this system and this user can and cannot do",
		Long: `Tell what this kernel, this system and this user can and cannot do, and what
would change it. The exit status is 0 if the user can get a profile.`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			c := a.client()
			defer c.Close()
			findings := client.CheckLocal()
			usable := !slices.ContainsFunc(findings, isNo)
			more, err := c.Check(command.Context())
			broker := client.Finding{Subject: "broker", State: client.Yes, Reason: "it answers at " + a.socket}
			if err != nil {
				broker.State, broker.Reason, broker.Remedy = client.No, err.Error(), remedyFor(err)
			}
			findings = append(append(findings, broker), more...)
			usable = usable && slices.ContainsFunc(more, func(f client.Finding) bool {
				return strings.HasPrefix(f.Subject, "profile ") && !isNo(f)
			})
			if err := a.printFindings(findings); err != nil {
				return err
			}
			if !usable {
				return exitStatus(exitFailure)
			}
			return nil
		},
	}
}

func isNo(f client.Finding) bool { return f.State == client.No }

func (a *app) printFindings(findings []client.Finding) error {
	if a.wantsJSON() {
		return a.printJSON(findings)
	}
	t := table{header: []string{"SUBJECT", "STATE", "REASON"}, state: 1}
	for _, f := range findings {
		state, reason := string(f.State), f.Reason
		if f.State == client.Yes {
			state = "ok"
		}
		if f.Remedy != "" {
			reason += "; to change it: " + f.Remedy
		}
		t.rows = append(t.rows, []string{f.Subject, state, reason})
	}
	return a.printTable(t)
}
