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
	return listing(a, "profiles", "List the profiles that there are", (*client.Client).ListProfiles,
		table{header: []string{"NAME", "TIER", "AVAILABLE", "DESCRIPTION"}, state: 2, noun: "profiles"},
		func(p client.ProfileSummary) []string {
			return []string{p.Name, p.Tier, yesNo(p.Available), p.Description}
		})
}

func (a *app) profileShowCommand() *cobra.Command {
	return showing(a, "Show what a profile allows, with every group written out", a.completeProfiles, (*client.Client).DescribeProfile, describe)
}

// describe writes a profile out: a label and its words, wrapped, or its lines.
func describe(p *client.Profile) string {
	var out sheet
	out.line("Profile:", p.Name)
	if p.Description != "" {
		out.line("Description:", p.Description)
	}
	out.line("Tier:", p.Tier)
	out.available(p.Available, p.Reason, p.Remedy)
	out.line("Guard:", p.Guard)
	if p.LeaseSeconds > 0 {
		out.line("Lease:", timeSpan(time.Duration(p.LeaseSeconds)*time.Second))
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
		out.lines(list.label, wrap(list.words))
	}
	out.lines("Limits:", p.Limits)
	out.lines("Not enforced:", p.NotEnforced)
	out.lines("Files:", p.Files)
	return out.String()
}

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
