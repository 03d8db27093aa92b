// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"fmt"
	"slices"
	"unicode"
	"unicode/utf8"
)

// The keys of the details that go with a check. Rules read them with
// action.lookup("profile"), and the policy's messages as $(profile). The broker
// computes every value from verified facts; none is copied from the peer.
const (
	// DetailProfile is the profile's name. Every check for a token has it: the
	// messages use it.
	DetailProfile = "profile"
	// DetailTier is the tier as it would be enforced: basic, network, tracing, unlimited.
	DetailTier = "tier"
	// DetailGuard is "active" when the guard holds what the profile limits beyond
	// the kernel's masks, "absent" when it should and doesn't (Guard=optional), and
	// "unneeded" when the masks are all there is.
	DetailGuard = "guard"
	// DetailPrograms are the program types, in the kernel's lower-case spelling,
	// in the enum's order, with one space between.
	DetailPrograms = "programs"
	// DetailPeerUnit is the system manager's unit that the peer runs in, which
	// nobody but root can give it. Empty when there is none.
	DetailPeerUnit = "peer.unit"
	// DetailPeerUserUnit is the unit of a user manager's that the peer runs in.
	// Empty when there is none. Users give their own units any name they like.
	DetailPeerUserUnit = "peer.user-unit"
	// DetailTargetUID is the uid that owns the target, in decimal. Every check
	// for a token has it: the messages of the Others twins use it.
	DetailTargetUID = "target.uid"
	// DetailTargetUnit and DetailTargetUserUnit are the same for the target's
	// process.
	DetailTargetUnit     = "target.unit"
	DetailTargetUserUnit = "target.user-unit"
	// DetailObject is the object's name. Every check for a part of one has it: the
	// messages use it.
	DetailObject = "object"
	// DetailMap and DetailProgram are the name under which the part is published.
	// One of them is empty.
	DetailMap     = "map"
	DetailProgram = "program"
	// DetailAccess is what the descriptor is good for: read-only, read-write,
	// write-only, consume (a ring buffer), or receive (packets).
	DetailAccess = "access"
)

var detailKeys = []string{
	DetailProfile, DetailTier, DetailGuard, DetailPrograms,
	DetailPeerUnit, DetailPeerUserUnit,
	DetailTargetUID, DetailTargetUnit, DetailTargetUserUnit,
	DetailObject, DetailMap, DetailProgram, DetailAccess,
}

// maxDetail is the longest value, in bytes. The names of all program types are
// half of it.
const maxDetail = 1024

// checkDetails refuses what must not reach a rule or a dialog: unknown keys
// (polkit gives those that begin with "polkit." a meaning of its own), and
// values that are long or that a terminal agent wouldn't print as they are.
func checkDetails(details map[string]string) error {
	for key, value := range details {
		switch {
		case !slices.Contains(detailKeys, key):
			return fmt.Errorf("cannot pass detail %.64q to polkit: unknown key", key)
		case len(value) > maxDetail:
			return fmt.Errorf("cannot pass detail %q to polkit: %d bytes are more than %d", key, len(value), maxDetail)
		case !printable(value):
			return fmt.Errorf("cannot pass detail %q to polkit: not printable UTF-8", key)
		}
	}
	return nil
}

func printable(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}
