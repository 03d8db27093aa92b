// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/bpfbroker/bpfbroker/service/client"
)

func (a *app) learnCommand() *cobra.Command {
	var profile, output string
	var root bool
	command := &cobra.Command{
		Use:   "learn [-p PROFILE] [-o FILE] [--] COMMAND [ARGUMENT…]",
		Short: "Run a command, and write the smallest profile that it needs",
		Long: `Run a command with a profile that gives enough, and write the smallest profile
that it would have needed. The administrator has to look at it before it is one.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			return a.learn(command.Context(), profile, output, root, args)
		},
	}
	flags := command.Flags()
	flags.SetInterspersed(false)
	flags.StringVarP(&profile, "profile", "p", "unlimited", "the profile that gives enough")
	flags.StringVarP(&output, "output", "o", "", "the file to write to, instead of standard output")
	flags.BoolVar(&root, "root", false, "run as root of the new user namespace")
	a.completeProfileFlag(command)
	return command
}

// lesson is what was learnt.
type lesson struct {
	profile string
	err     error
}

func (a *app) learn(ctx context.Context, profile, output string, root bool, args []string) error {
	path, err := lookUp(args[0])
	if err != nil {
		return err
	}
	out := os.Stdout
	if output != "" {
		if out, err = os.OpenFile(output, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644); err != nil {
			return err
		}
		defer out.Close()
	}
	signals := watchSignals(ctx)
	lessons := make(chan lesson, 1)
	command, err := a.start(signals.ctx, func(c *client.Client) *client.Command {
		command := c.Command(profile, path)
		command.Args, command.Root = args, root
		command.Granted = func(g *client.Grant) error { return a.listen(ctx, g.ID, lessons) }
		return command
	})
	if err != nil {
		return notStarted(args[0], err)
	}
	status := finish(signals, command, args[0])
	learnt := <-lessons // the grant has ended with the command
	if learnt.err != nil {
		return learnt.err
	}
	if _, err := out.WriteString(commented(profile, args) + learnt.profile); err != nil {
		return fmt.Errorf("cannot write the profile: %w", err)
	}
	return status
}

// listen begins to learn from a grant, and returns when nothing is missed any more.
func (a *app) listen(ctx context.Context, id string, lessons chan<- lesson) error {
	ready, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		c := a.client()
		defer c.Close()
		profile, err := c.LearnGrant(ctx, id, sync.OnceFunc(func() { close(ready) }))
		failed <- err
		lessons <- lesson{profile, err}
	}()
	select {
	case <-ready:
		return nil
	case err := <-failed:
		return err
	}
}

// commented is the command line in a comment.
func commented(profile string, args []string) string {
	var words []string
	for _, arg := range args {
		if arg == "" || strings.ContainsFunc(arg, func(r rune) bool { return r <= ' ' || r == 0x7f || r > '~' || strings.ContainsRune("\"'\\$`", r) }) {
			arg = strconv.QuoteToASCII(arg)
		}
		words = append(words, arg)
	}
	const most = 1000 // bytes, which are characters
	line := strings.Join(words, " ")
	if len(line) > most {
		line = line[:most] + "..."
	}
	return fmt.Sprintf("# bpfbroker learn -p %s -- %s\n", profile, line)
}
