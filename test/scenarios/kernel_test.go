// SPDX-License-Identifier: Apache-2.0

//go:build kernels

package scenarios

// LSM programs and kprobes work in this machine: tests that need them have the
// build tag "kernels", too.
const (
	kernel         = "7.2"   // what the machine runs
	readOnlyHolder = "guard" // what holds maps to reading, and not those that are published for writing too
	slow           = 5       // how many times as long things take as on a real machine
	share          = 20      // of what is done many times, one in so many is done here
	// machineRules lets alice have the profiles "basic" and "network".
	machineRules = "10-bpf-group.rules"
)

// tiers are those of the profiles.
var tiers = map[string]string{"basic": "basic", "network": "network", "tracing": "tracing", "unlimited": "unlimited"}
