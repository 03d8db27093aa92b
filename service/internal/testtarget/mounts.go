// SPDX-License-Identifier: Apache-2.0

package testtarget

import (
	"errors"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// mountsEnv tells a test's binary that it has its own mounts.
const mountsEnv = "BPFBROKER_TEST_MOUNTS"

// OwnMounts gives the test's process a mount namespace of its own, by executing it
// anew, so that what it mounts isn't there for tests that run beside it. TestMain
// calls it first.
func OwnMounts() {
	if os.Getenv(mountsEnv) != "" {
		return
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), mountsEnv+"=yes")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		panic(err)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}
