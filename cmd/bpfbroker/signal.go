// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/bpfbroker/bpfbroker/service/client"
)

// signals are those that are meant for the command when they are sent to
// bpfbroker. The ones that stop a process aren't: whoever stops bpfbroker alone
// means bpfbroker.
var signals = []os.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM,
	syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH, syscall.SIGCONT,
}

// interruption is the signal that ended bpfbroker's wait for the broker.
type interruption syscall.Signal

func (i interruption) Error() string { return syscall.Signal(i).String() }

// signalWatch takes the signals that are sent to bpfbroker.
type signalWatch struct {
	// ctx ends when a signal comes that would end bpfbroker.
	ctx     context.Context
	command chan *client.Command
}

func watchSignals(ctx context.Context) *signalWatch {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &signalWatch{ctx: ctx, command: make(chan *client.Command)}
	received := make(chan os.Signal, 16)
	for _, s := range signals {
		// What nohup made bpfbroker ignore, the command ignores too.
		if !signal.Ignored(s) {
			signal.Notify(received, s)
		}
	}
	go w.watch(received, cancel)
	return w
}

// forwardTo has the command get the signals from now on.
func (w *signalWatch) forwardTo(command *client.Command) { w.command <- command }

func (w *signalWatch) watch(received <-chan os.Signal, cancel context.CancelCauseFunc) {
	var command *client.Command
	var early []os.Signal
	for {
		select {
		case command = <-w.command:
			// The command may have run for a while by now.
			for _, s := range early {
				_ = command.Signal(s.(syscall.Signal))
			}
		case s := <-received:
			switch {
			case command == nil && (s == syscall.SIGHUP || s == syscall.SIGINT || s == syscall.SIGQUIT || s == syscall.SIGTERM):
				early = append(early, s)
				cancel(interruption(s.(syscall.Signal)))
			case fromTerminal(s):
			case command == nil:
				if !slices.Contains(early, s) {
					early = append(early, s)
				}
			default:
				_ = command.Signal(s.(syscall.Signal)) // it may have ended
			}
		}
	}
}

// fromTerminal says whether the signal came by a key on the terminal, or by its
// change of size. Such a signal goes to every process of the terminal's
// foreground process group, and so to the command itself. Who sent a signal Go
// does not say; but in the foreground these hardly come from elsewhere.
func fromTerminal(s os.Signal) bool {
	switch s {
	case syscall.SIGINT, syscall.SIGQUIT, syscall.SIGWINCH:
		return inForeground()
	}
	return false
}
