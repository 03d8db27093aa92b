// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// Access says who may call a method.
type Access struct {
	// Actions are the polkit actions that may be asked.
	Actions []authority.Action
	// Details are the keys of what polkit is told.
	Details []string
	// Streams says that there are many answers, which only the socket can give:
	// the bus has no such method.
	Streams bool
	// Files is how many file descriptors may come in, on the socket alone.
	Files int
}

// Methods is the access table. A front serves a method only if it is here.
var Methods = map[string]Access{
	"ListProfiles":    {},
	"DescribeProfile": {},
	"ListGrants":      {Actions: manageActions},
	"GetGrant":        {Actions: manageActions},
	"RenewGrant":      {Actions: append(manageActions, tokenActions...), Details: tokenDetails},
	"RevokeGrant":     {Actions: manageActions},
	"Check":           {},
	"ExplainGrant":    {Actions: manageActions},
	"LearnGrant":      {Actions: manageActions, Streams: true},
	"Monitor":         {Actions: manageActions, Streams: true},
	"AcquireToken":    {Actions: tokenActions, Details: tokenDetails},
	"ListObjects":     {},
	"DescribeObject":  {},
	"OpenLink":        {},
	"OpenMap":         {Actions: objectActions, Details: objectDetails},
	"OpenSocket":      {Actions: objectActions[1:], Details: objectDetails},
	"OpenProgram":     {Actions: objectActions[1:], Details: objectDetails},
	"MountObjects":    {Actions: objectActions, Details: objectDetails, Files: 1},
	"MountToken":      {Actions: tokenActions, Details: tokenDetails, Files: 1},
}

// manageActions is for the grants of others. One's own need none.
var manageActions = []authority.Action{authority.ManageGrants}

var objectActions = []authority.Action{authority.OpenObject, authority.OpenObjectWritable}

var objectDetails = []string{
	authority.DetailObject, authority.DetailMap, authority.DetailProgram, authority.DetailAccess,
	authority.DetailPeerUnit, authority.DetailPeerUserUnit,
}

var tokenActions = []authority.Action{
	authority.TokenBasic, authority.TokenBasicOthers,
	authority.TokenNetwork, authority.TokenNetworkOthers,
	authority.TokenTracing, authority.TokenTracingOthers,
	authority.TokenUnlimited, authority.TokenUnlimitedOthers,
}

var tokenDetails = []string{
	authority.DetailProfile, authority.DetailTier, authority.DetailGuard, authority.DetailPrograms,
	authority.DetailPeerUnit, authority.DetailPeerUserUnit,
	authority.DetailTargetUID, authority.DetailTargetUnit, authority.DetailTargetUserUnit,
}

// tokenAction is the action for a token of a tier, in the peer's own namespace
// or somebody else's.
func tokenAction(tier profile.Tier, others bool) authority.Action {
	i := 2 * int(tier)
	if others {
		i++
	}
	return tokenActions[i]
}
