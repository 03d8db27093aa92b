// SPDX-License-Identifier: Apache-2.0

// bpfbroker runs programs with rights to use eBPF, as the administrator offers
// them in profiles, and shows what there is to have.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

// version is set by the linker.
var version string

// Exit statuses beside 0. "run" has its command's as well.
const (
	exitFailure       = 1
	exitUsage         = 2
	exitDenied        = 77 // EX_NOPERM of sysexits.h
	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignal        = 128 // and the signal's number
)

func main() {
	os.Exit(execute(client.Socket))
}

// execute runs the command line with the broker at socket and returns the exit
// status.
func execute(socket string) int {
	a := &app{socket: socket}
	command := a.command()
	err := command.Execute()
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	case !a.started:
		fmt.Fprintf(os.Stderr, "bpfbroker: %v\nSee \"bpfbroker --help\".\n", err)
		return exitUsage
	}
	return report(err)
}

// exitStatus ends the program with that status and without a message.
type exitStatus int

func (exitStatus) Error() string { return "" }

// usageError is a mistake in the command line that cobra doesn't see.
func (a *app) usageError(format string, args ...any) error {
	a.started = false
	return fmt.Errorf(format, args...)
}

// report says what went wrong and what would change it, and returns the exit
// status.
func report(err error) int {
	fmt.Fprintf(os.Stderr, "bpfbroker: %s\n", printable(err.Error()))
	if remedy := remedyFor(err); remedy != "" {
		fmt.Fprintf(os.Stderr, "  To change it: %s\n", printable(remedy))
	}
	var refusal *client.Error
	if errors.As(err, &refusal) && refusal.Layer == "polkit" {
		return exitDenied
	}
	return exitFailure
}

// remedyFor returns what would change an error, "" if nothing is known.
func remedyFor(err error) string {
	var refusal *client.Error
	switch {
	case errors.As(err, &refusal):
		return refusal.Remedy
	case errors.Is(err, client.ErrUnreachable):
		return "have the administrator run \"systemctl enable --now bpfbroker.socket\""
	}
	return ""
}

// app is one run of the program: what its options say.
type app struct {
	socket string
	// started says that the command line was right, so far.
	started bool

	json          jsonFormat
	noPager       bool
	noLegend      bool
	noAskPassword bool
	quiet         bool
}

// client returns a client, which the caller closes.
func (a *app) client(options ...client.Option) *client.Client {
	return client.New(append(options, client.WithSocket(a.socket))...)
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:               "bpfbroker",
		Short:             "Run programs with rights to use eBPF",
		Version:           buildVersion(),
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRun:  func(*cobra.Command, []string) { a.started = true },
		RunE:              func(*cobra.Command, []string) error { return a.usageError("no command given") },
	}
	flags := root.PersistentFlags()
	flags.VarP(&a.json, "json", "j", "print JSON: pretty, short or off; -j alone is pretty on a terminal, else short")
	flags.Lookup("json").NoOptDefVal = string(jsonAuto)
	flags.BoolVar(&a.noPager, "no-pager", false, "do not page")
	flags.BoolVar(&a.noLegend, "no-legend", false, "print no headings and totals")
	flags.BoolVar(&a.noAskPassword, "no-ask-password", false, "do not ask for passwords")
	flags.BoolVarP(&a.quiet, "quiet", "q", false, "print no warnings")
	profile := &cobra.Command{
		Use:   "profile",
		Short: "Look at one profile",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return a.usageError("no command given after \"profile\"") },
	}
	profile.AddCommand(a.profileShowCommand())
	root.AddCommand(a.runCommand(), a.mountCommand(), a.profilesCommand(), profile, a.listCommand(), a.renewCommand(), a.revokeCommand(), a.checkCommand(), a.cdiCommand(), a.hookCommand())
	root.AddCommand(a.objectsCommand(), a.objectCommand(), a.exportCommand())
	root.AddCommand(a.monitorCommand(), a.explainCommand(), a.learnCommand())
	return root
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "(unknown)"
}

// completeProfiles offers the profiles' names to the shell.
func (a *app) completeProfiles(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completions(a, (*client.Client).ListProfiles, func(p client.ProfileSummary) cobra.Completion {
		return cobra.CompletionWithDesc(p.Name, p.Description)
	})
}

// completeProfileFlag offers the profiles' names for --profile.
func (a *app) completeProfileFlag(command *cobra.Command) {
	// It fails only if there is no such flag.
	_ = command.RegisterFlagCompletionFunc("profile",
		func(c *cobra.Command, _ []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.completeProfiles(c, nil, word)
		})
}

// printable replaces what could steer a terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || 0x7f <= r && r < 0xa0 {
			return '?'
		}
		return r
	}, text)
}
