// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func (a *app) profilesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "profiles",
		Short: "List the profiles that there are",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			c := a.client()
			defer c.Close()
			profiles, err := c.ListProfiles(command.Context())
			if err != nil {
				return err
			}
			if a.wantsJSON() {
				return a.printJSON(profiles)
			}
			t := table{header: []string{"NAME", "TIER", "AVAILABLE", "DESCRIPTION"}, state: 2, noun: "profiles"}
			for _, p := range profiles {
				t.rows = append(t.rows, []string{p.Name, p.Tier, yesNo(p.Available), p.Description})
			}
			return a.printTable(t)
		},
	}
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (a *app) profileShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "show NAME",
		Short:             "Show what a profile allows, with every group written out",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeProfiles,
		RunE: func(command *cobra.Command, args []string) error {
			c := a.client()
			defer c.Close()
			p, err := c.DescribeProfile(command.Context(), args[0])
			if err != nil {
				return err
			}
			if a.wantsJSON() {
				return a.printJSON(p)
			}
			return a.print(describe(p))
		},
	}
}

// describe writes a profile out: a label and its words, wrapped, or its lines.
func describe(p *client.Profile) string {
	var out strings.Builder
	line := func(label, text string) {
		fmt.Fprintf(&out, "%*s %s\n", labelWidth, label, printable(text))
	}
	lines := func(label string, items []string) {
		for _, item := range items {
			line(label, item)
			label = ""
		}
	}
	line("Profile:", p.Name)
	if p.Description != "" {
		line("Description:", p.Description)
	}
	line("Tier:", p.Tier)
	line("Available:", yesNo(p.Available))
	if p.Reason != "" {
		line("Reason:", p.Reason)
	}
	if p.Remedy != "" {
		line("To change it:", p.Remedy)
	}
	line("Guard:", p.Guard)
	if p.LeaseSeconds > 0 {
		line("Lease:", timeSpan(time.Duration(p.LeaseSeconds)*time.Second))
	}
	for _, list := range []struct {
		label string
		words []string
	}{
		{"Commands:", p.Commands},
		{"Maps:", p.Maps},
		{"Programs:", p.Programs},
		{"Attachments:", p.Attachments},
		{"Capabilities:", p.Capabilities},
	} {
		lines(list.label, wrap(list.words))
	}
	lines("Limits:", p.Limits)
	lines("Not enforced:", p.NotEnforced)
	lines("Files:", p.Files)
	return out.String()
}

const (
	labelWidth = 13
	lineWidth  = 79
)

// wrap makes lines of words.
func wrap(words []string) []string {
	var lines []string
	for _, word := range words {
		if last := len(lines) - 1; last >= 0 && labelWidth+1+len(lines[last])+1+len(word) <= lineWidth {
			lines[last] += " " + word
		} else {
			lines = append(lines, word)
		}
	}
	return lines
}

// timeSpan writes a duration as systemd does, in its two largest units.
func timeSpan(d time.Duration) string {
	if d < time.Second {
		return "0"
	}
	var parts []string
	for _, unit := range []struct {
		name   string
		length time.Duration
	}{{"d", 24 * time.Hour}, {"h", time.Hour}, {"min", time.Minute}, {"s", time.Second}} {
		if n := d / unit.length; n > 0 && len(parts) < 2 {
			parts = append(parts, fmt.Sprintf("%d%s", n, unit.name))
			d -= n * unit.length
		}
	}
	return strings.Join(parts, " ")
}
