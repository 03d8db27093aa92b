// SPDX-License-Identifier: Apache-2.0

//go:build kernels

// Package kernels runs test suites on other kernels than the host's. It needs root, QEMU and, the first time, the network.
package kernels

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/bpfbroker/bpfbroker/test/machines"
)

// What a suite's tests, and those of a whole system, have on a slow machine that does other things, too. They take a tenth
// of the first, and a quarter of the second.
const (
	suiteTime  = 8 * time.Minute
	systemTime = 12 * time.Minute
)

// attacks is a variable for the guard's tests: "full" has them attack as often as it takes to believe the result, which takes a
// quarter of an hour and up to attacksTime.
const (
	attacks     = "BPFBROKER_TEST_ATTACKS"
	attacksTime = 90 * time.Minute
)

// suites are the packages whose tests run on each kernel.
var suites = []struct {
	kernel   string
	packages []string
}{
	// It has neither BPF tokens nor the pidfd of a socket's peer.
	{"6.1", []string{"test/kernels/daemon"}},
	{"6.12", []string{"service/internal/kernel", "service/internal/delegate", "service/internal/grant", "service/internal/guard", "service/internal/broker", "service/internal/catalog", "bpf/objects"}},
	{"7.2", []string{"service/internal/kernel", "service/internal/delegate", "service/internal/grant", "service/internal/guard", "service/internal/broker", "service/internal/catalog", "bpf/objects"}},
}

// systems are the packages whose tests boot a whole system on a kernel, and drive it from the host.
var systems = []struct {
	kernel   string
	packages []string
}{
	{"7.2", []string{"test/scenarios"}},
}

// here are the scenarios that "make test" runs in an emulated system, too: what the guard does, and a share of everything else, for the
// time that they take here. "make test-systems" runs all.
const here = "^Test(Guard(Attach|AttachCgroup|Helpers|Quotas|Revoke)|ExplainLayers|MonitorAndExplain|Bus|OpenMap|ObjectsOnTheBus|ObjectKinds|" +
	"OpenSocket|ReaderThatNeverReads|RunUnmodifiedPrograms|RunHoldsToTheProfile|ListAndRevoke|GrantEndsWithProcess|TokenForOneself|DaemonKilled)$"

// results holds a line for each suite that has run.
var results struct {
	sync.Mutex
	lines map[string]string
}

func TestMain(m *testing.M) {
	results.lines = map[string]string{}
	code := m.Run()
	for _, s := range append(suites, systems...) {
		for _, pkg := range s.packages {
			fmt.Print(results.lines[s.kernel+" "+path.Base(pkg)])
		}
	}
	os.Exit(code)
}

func TestSuites(t *testing.T) {
	for _, s := range suites {
		for _, pkg := range s.packages {
			t.Run(s.kernel+"/"+path.Base(pkg), func(t *testing.T) {
				t.Parallel()
				start := time.Now()
				defer func() { record(t, s.kernel, pkg, time.Since(start)) }()
				runSuite(t, s.kernel, pkg)
			})
		}
	}
}

func TestSystems(t *testing.T) {
	for _, s := range systems {
		for _, pkg := range s.packages {
			t.Run(s.kernel+"/"+path.Base(pkg), func(t *testing.T) {
				t.Parallel()
				start := time.Now()
				defer func() { record(t, s.kernel, pkg, time.Since(start)) }()
				runSystem(t, pkg)
			})
		}
	}
}

// runSystem runs a package's tests here, with the machines that they have under the build tag "kernels".
func runSystem(t *testing.T, pkg string) {
	suite := filepath.Join(t.TempDir(), "suite")
	compile(t, "test", "-c", "-tags", "kernels", "-o", suite, "./"+pkg)
	cmd := exec.CommandContext(t.Context(), suite, "-test.v", "-test.timeout="+systemTime.String(), "-test.run="+here)
	cmd.Dir = filepath.Join("../..", pkg)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about the thread
	defer runtime.UnlockOSThread()
	output, err := cmd.CombinedOutput()
	check(t, output, err)
}

// check fails the test if one of a suite's tests was skipped, or if none has run, or if the suite ended with an error.
func check(t *testing.T, output []byte, err error) {
	t.Helper()
	switch {
	case err != nil:
		t.Error(err)
	case !passed.Match(output):
		t.Error("no test has run")
	case skipped.Match(output):
		t.Error("a test was skipped")
	}
	if t.Failed() {
		t.Logf("the suite printed:\n%s", output)
	}
}

// record keeps a suite's line for the end.
func record(t *testing.T, kernel, pkg string, took time.Duration) {
	verdict := "ok"
	if t.Failed() {
		verdict = "FAILED"
	}
	results.Lock()
	defer results.Unlock()
	name := kernel + " " + path.Base(pkg)
	results.lines[name] = fmt.Sprintf("%s %s (%.1f s)\n", name, verdict, took.Seconds())
}

var (
	passed = regexp.MustCompile(`(?m)^--- PASS: `)
	// What the guard's matrix sums up to, and what attacks there were.
	sums    = regexp.MustCompile(`(?m)^(matrix|attack): .*`)
	skipped = regexp.MustCompile(`(?m)^\s*--- SKIP: `)
)

// runSuite runs a package's tests on a kernel, and fails the test if one of them fails or is skipped, or if there are none.
func runSuite(t *testing.T, kernel, pkg string) {
	suite, daemon := filepath.Join(t.TempDir(), "suite"), filepath.Join(t.TempDir(), "bpfbrokerd")
	compile(t, "test", "-c", "-tags", "root kernels", "-o", suite, "./"+pkg)
	if _, err := os.Stat(suite); err != nil {
		t.Fatalf("%s has no tests", pkg) // which is no error to the go command
	}
	compile(t, "build", "-o", daemon, "./cmd/bpfbrokerd")
	image, err := machines.Kernel(t.Context(), kernel)
	if err != nil {
		t.Fatal(err)
	}
	limit := suiteTime
	if os.Getenv(attacks) != "" {
		limit = attacksTime
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit+time.Minute) // to boot
	defer cancel()
	files := map[string]string{
		"/suite":                  suite,
		"/usr/libexec/bpfbrokerd": daemon,
		// What the broker's tests publish, where they find it here.
		"/catalog/testdata/kinds.bpf.o": "../../service/internal/catalog/testdata/kinds.bpf.o",
	}
	if path.Base(pkg) == "guard" {
		// What its tests attach to that Debian doesn't build into the kernel.
		for _, module := range []string{"act_bpf", "cls_bpf", "sch_ingress"} {
			files["/modules/"+module+".ko.xz"] = filepath.Join(image.Modules, "kernel/net/sched", module+".ko.xz")
		}
	}
	output, code, err := machines.RunInKernel(ctx, image, files, []string{"/suite", "-test.v", "-test.timeout=" + limit.String()}, []string{"CI=true", attacks + "=" + os.Getenv(attacks)})
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d", code)
	}
	check(t, output, err)
	for _, line := range sums.FindAll(output, -1) {
		fmt.Printf("%s %s\n", kernel, line)
	}
}

// compile has the go command make a static program, from the top of the source tree.
func compile(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cannot run go %s: %v\n%s", strings.Join(args, " "), err, output)
	}
}
