// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"github.com/bpfbroker/bpfbroker/service/client"
)

// agentProgram is polkit's authentication agent for terminals.
const agentProgram = "pkttyagent"

// agentUseful says whether an agent could ask somebody: polkit doesn't ask
// root.
func agentUseful() bool {
	if os.Geteuid() == 0 || !isTerminal(os.Stdin) {
		return false
	}
	_, err := exec.LookPath(agentProgram)
	return err == nil
}

// ask makes a request, for which polkit asks for a password where it has to, if
// there is anybody to be asked. endAgent ends the agent that asks on the terminal,
// if there is one.
func (a *app) ask(ctx context.Context, request func(c *client.Client, endAgent func()) error) error {
	try := func(endAgent func(), options ...client.Option) error {
		c := a.client(options...)
		defer c.Close()
		return request(c, endAgent)
	}
	agent := !a.noAskPassword && agentUseful()
	var options []client.Option
	if !a.noAskPassword && !agent {
		options = append(options, client.WithInteraction())
	}
	err := try(func() {}, options...)
	var refusal *client.Error
	if !agent || !errors.As(err, &refusal) || refusal.Name != "InteractionRequired" {
		return err
	}
	// An agent takes longer to start than the request takes without, and most
	// requests need none.
	stop := startAgent(ctx)
	defer stop()
	return try(stop, client.WithInteraction())
}

// startAgent starts an agent that asks on the terminal for this process, unless
// its session has an agent already, and waits until it is registered. Without
// one polkit says that nobody can be asked, so that errors need no mention. stop
// ends it, and may be called again.
func startAgent(ctx context.Context) (stop func()) {
	registered, notify, err := os.Pipe()
	if err != nil {
		return func() {}
	}
	defer registered.Close()
	agent := exec.Command(agentProgram, "--notify-fd", "3", "--fallback")
	agent.Stdin, agent.Stderr = os.Stdin, os.Stderr
	agent.ExtraFiles = []*os.File{notify}
	agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	err = agent.Start()
	_ = notify.Close()
	if err != nil {
		return func() {}
	}
	defer context.AfterFunc(ctx, func() { _ = registered.Close() })()
	_, _ = registered.Read(make([]byte, 1)) // ends when the agent closes the other end
	return sync.OnceFunc(func() {
		_ = agent.Process.Signal(syscall.SIGTERM)
		_ = agent.Process.Signal(syscall.SIGCONT) // should the terminal have stopped it
		_ = agent.Wait()
	})
}
