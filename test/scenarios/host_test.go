// SPDX-License-Identifier: Apache-2.0

//go:build !kernels

package scenarios

const (
	kernel         = ""       // what the machine runs: the host's
	readOnlyHolder = "kernel" // what holds maps to reading, and not those that are published for writing too
	slow           = 1        // how many times as long things take as on a real machine
	share          = 1        // of what is done many times, one in so many is done here
	// machineRules lets alice have the profile "network".
	machineRules = "20-network-without-guard.rules"
)

// tiers are those of the profiles.
var tiers = map[string]string{"basic": "tracing", "network": "unlimited", "tracing": "unlimited", "unlimited": "unlimited"}
