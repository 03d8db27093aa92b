// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

// listing makes a command that lists what the broker has, a row of t each.
func listing[T any](a *app, use, short string, list func(*client.Client, context.Context) ([]T, error), t table, row func(T) []string) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			c := a.client()
			defer c.Close()
			all, err := list(c, command.Context())
			if err != nil {
				return err
			}
			if a.wantsJSON() {
				return a.printJSON(all)
			}
			for _, one := range all {
				t.rows = append(t.rows, row(one))
			}
			return a.printTable(t)
		},
	}
}

// showing makes a command that shows one of what the broker has, by its name.
func showing[T any](a *app, short string, complete cobra.CompletionFunc, describe func(*client.Client, context.Context, string) (T, error), write func(T) string) *cobra.Command {
	return &cobra.Command{
		Use:               "show NAME",
		Short:             short,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: complete,
		RunE: func(command *cobra.Command, args []string) error {
			c := a.client()
			defer c.Close()
			one, err := describe(c, command.Context(), args[0])
			if err != nil {
				return err
			}
			if a.wantsJSON() {
				return a.printJSON(one)
			}
			return a.print(write(one))
		},
	}
}

// completions offers what the broker has to the shell.
func completions[T any](a *app, list func(*client.Client, context.Context) ([]T, error), offer func(T) cobra.Completion) ([]cobra.Completion, cobra.ShellCompDirective) {
	c := a.client()
	defer c.Close()
	all, err := list(c, context.Background())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var offers []cobra.Completion
	for _, one := range all {
		offers = append(offers, offer(one))
	}
	return offers, cobra.ShellCompDirectiveNoFileComp
}

const (
	labelWidth = 13
	lineWidth  = 79
)

// sheet is text in lines, with labels before them.
type sheet struct{ strings.Builder }

func (s *sheet) line(label, text string) {
	fmt.Fprintf(s, "%*s %s\n", labelWidth, label, printable(text))
}

func (s *sheet) lines(label string, items []string) {
	for _, item := range items {
		s.line(label, item)
		label = ""
	}
}

// available says whether something can be had, and if not why.
func (s *sheet) available(is bool, reason, remedy string) {
	s.line("Available:", yesNo(is))
	if reason != "" {
		s.line("Reason:", reason)
	}
	if remedy != "" {
		s.line("To change it:", remedy)
	}
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
