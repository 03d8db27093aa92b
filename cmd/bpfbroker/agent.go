// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"os/exec"
	"sync"
	"syscall"
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
