// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func (a *app) explainCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "explain [GRANT]",
		Short: "Tell what was refused, by what, and what would allow it",
		Long: `Tell what was refused to a grant, which may have ended, or without GRANT to all
of the user's grants and requests; by what, and which line of the profile would
allow it.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeGrants,
		RunE: func(command *cobra.Command, args []string) error {
			id := strings.Join(args, "")
			var e *client.Explanation
			err := a.ask(command.Context(), func(c *client.Client, _ func()) (err error) {
				e, err = c.ExplainGrant(command.Context(), id)
				return err
			})
			if err != nil {
				return err
			}
			if id != "" {
				e.Withheld = append(e.Withheld, client.ExplainLocal()...)
			}
			if a.wantsJSON() {
				return a.printJSON(e)
			}
			return a.print(explanation(id, e))
		},
	}
}

func explanation(id string, e *client.Explanation) string {
	var out strings.Builder
	line := func(format string, args ...any) { fmt.Fprintln(&out, printable(fmt.Sprintf(format, args...))) }
	if id != "" {
		ended := ""
		if e.Ended {
			ended = " (ended)"
		}
		line("Grant %s of the profile %s%s", id, e.Profile, ended)
		line("")
	}
	if len(e.Denials) == 0 {
		line("Nothing was refused that bpfbroker remembers; the journal may have more.")
	}
	for _, d := range e.Denials {
		about := []string{d.Event.Reason}
		switch {
		case id == "" && d.Event.Grant != "":
			about = append(about, "grant "+d.Event.Grant)
		case id != "" && d.Event.Grant == "":
			about = append(about, "perhaps of another grant")
		}
		if d.Event.Program != "" {
			about = append(about, "for "+d.Event.Program)
		}
		if d.Event.Process != 0 {
			about = append(about, fmt.Sprintf("by %s[%d]", cmp.Or(d.Event.Command, "process"), d.Event.Process))
		}
		if d.Count > 1 {
			about = append(about, fmt.Sprintf("%d times", d.Count))
		}
		line("%s %s refused: %s", time.UnixMicro(d.Event.Time).Format(time.Stamp), d.Event.Layer, strings.Join(about, ", "))
		if d.Allow != "" {
			line("  To allow it: %s", d.Allow)
		}
	}
	if len(e.Withheld) > 0 {
		line("")
		line("What the kernel refuses without a word:")
	}
	for _, w := range e.Withheld {
		first := "  lacks "
		if w.Layer == "sysctl" {
			first = "  refuses "
		}
		line("%s: %s", w.Layer, w.Setting)
		for _, words := range wrap(strings.Fields(strings.Join(w.Names, " "))) {
			line("%s%s", first, words)
			first = "        "
		}
	}
	return out.String()
}
