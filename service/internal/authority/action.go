// SPDX-License-Identifier: Apache-2.0

package authority

// An Action is a polkit action. There is one constant for each action of
// polkit/org.bpfbroker.policy; a test compares the two.
type Action string

// The actions for a token, by the tier of the profile as it would be enforced.
// The Others twin is for a user namespace that the peer doesn't own.
const (
	TokenBasic           Action = "org.bpfbroker.token-basic"
	TokenBasicOthers     Action = "org.bpfbroker.token-basic-others"
	TokenNetwork         Action = "org.bpfbroker.token-network"
	TokenNetworkOthers   Action = "org.bpfbroker.token-network-others"
	TokenTracing         Action = "org.bpfbroker.token-tracing"
	TokenTracingOthers   Action = "org.bpfbroker.token-tracing-others"
	TokenUnlimited       Action = "org.bpfbroker.token-unlimited"
	TokenUnlimitedOthers Action = "org.bpfbroker.token-unlimited-others"
)

// The actions for what an object publishes: to read it, and to change it.
const (
	OpenObject         Action = "org.bpfbroker.open-object"
	OpenObjectWritable Action = "org.bpfbroker.open-object-writable"
)

// ManageGrants is the action for seeing, renewing and ending the grants of other
// users. It has no details: a dialog would tell what it is asked for.
const ManageGrants Action = "org.bpfbroker.manage-grants"
