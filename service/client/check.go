// SPDX-License-Identifier: Apache-2.0

package client

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// CheckLocal returns what the calling process needs on its own side for a
// Command to run: a user namespace, and a place for the BPF file system.
func CheckLocal() []Finding {
	return []Finding{checkNamespaces(), checkPlace()}
}

func checkNamespaces() Finding {
	f := Finding{Subject: "user namespaces", State: No}
	if cause, remedy := restriction(); cause != "" {
		f.Reason, f.Remedy = cause, remedy
		return f
	}
	process, err := kernel.Suspend("/bin/true", []string{"true"}, nil, kernel.SuspendOptions{})
	if err != nil {
		f.Reason = err.Error()
		f.Remedy = "have the administrator find out what forbids it: seccomp, a security module or a container's limits"
		return f
	}
	process.Kill()
	return Finding{Subject: f.Subject, State: Yes, Reason: "this user can make user namespaces"}
}

// restriction names the setting that keeps the user from making user
// namespaces, or from having capabilities in them, "" if there is none.
func restriction() (cause, remedy string) {
	if sysctl("user/max_user_namespaces") == "0" {
		return "user.max_user_namespaces is 0", "have the administrator set user.max_user_namespaces to more than 0"
	}
	if os.Geteuid() == 0 {
		return "", ""
	}
	if sysctl("kernel/unprivileged_userns_clone") == "0" {
		return "kernel.unprivileged_userns_clone is 0", "have the administrator set kernel.unprivileged_userns_clone=1"
	}
	// AppArmor lets the namespace be made, but gives its processes no
	// capability, unless a profile of the program's own allows them.
	if sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1" && unconfined() {
		return "AppArmor gives no capabilities in user namespaces (kernel.apparmor_restrict_unprivileged_userns=1)",
			"have the administrator load an AppArmor profile with the userns permission for this program"
	}
	return "", ""
}

// ExplainLocal returns what the kernel refuses to everybody without privileges,
// whatever their profiles.
func ExplainLocal() []Withheld {
	var all []Withheld
	if value := sysctl("kernel/unprivileged_bpf_disabled"); value != "0" && value != "" {
		all = append(all, Withheld{Layer: "sysctl", Setting: "kernel.unprivileged_bpf_disabled=" + value,
			Names: []string{"bpf(2) of programs that do not use the token"}})
	}
	if value := sysctl("kernel/perf_event_paranoid"); value != "" {
		names := []string{"perf_event_open(2) for kprobes"}
		if level, err := strconv.Atoi(value); err == nil && level >= 3 {
			names = []string{"perf_event_open(2): kprobe, tracepoint and perf_event programs are attached by that"}
		}
		all = append(all, Withheld{Layer: "sysctl", Setting: "kernel.perf_event_paranoid=" + value, Names: names})
	}
	return all
}

func sysctl(name string) string { return readLine(filepath.Join("/proc/sys", name)) }

func unconfined() bool { return readLine("/proc/self/attr/apparmor/current") == "unconfined" }

// readLine returns a file's only line, "" for a file that isn't there.
func readLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

func checkPlace() Finding {
	f := Finding{Subject: "mount point", State: Yes, Reason: tokenPath + " is there"}
	path, err := filepath.EvalSymlinks(tokenPath)
	switch {
	case err != nil:
		f.State, f.Reason = No, err.Error()
		f.Remedy = "use a kernel with CONFIG_BPF_SYSCALL, and mount sysfs at /sys"
	case path != tokenPath:
		f.State, f.Reason = No, tokenPath+" is reached by a symbolic link"
		f.Remedy = "mount sysfs at /sys itself"
	}
	return f
}
