// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"fmt"

	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// denial says what the guard refused, and which setting of the profile would
// allow it, "" if none would.
func denial(e guard.Event) (what, setting string) {
	switch e.Reason {
	case guard.Lease:
		return "the grant was revoked, or its lease is over", ""
	case guard.Namespace:
		return fmt.Sprintf("%s with a token outside of its user namespace", profile.CommandName(e.Detail)), ""
	case guard.Capability:
		return capabilityName(e.Detail), "[Guard] Capabilities="
	case guard.Helper:
		return "the helper " + profile.HelperName(e.Detail), "[Guard] Helpers="
	case guard.Kfunc:
		return fmt.Sprintf("the kernel function with BTF id %d", e.Detail), "[Guard] Kfuncs="
	case guard.ModuleKfunc:
		return fmt.Sprintf("a kernel module's function, with BTF id %d", e.Detail), "[Guard] Kfuncs="
	case guard.QuotaPrograms:
		return fmt.Sprintf("more than %d programs", e.Detail), "[Guard] MaxPrograms="
	case guard.QuotaMaps:
		return fmt.Sprintf("more than %d maps", e.Detail), "[Guard] MaxMaps="
	case guard.QuotaMapBytes:
		return fmt.Sprintf("more than %d bytes of maps", e.Detail), "[Guard] MaxMapBytes="
	case guard.QuotaTokens:
		return "too many tokens", ""
	case guard.MapType:
		if name := profile.MapName(e.Detail); name != "struct_ops" {
			return fmt.Sprintf("a map of type %s, which reaches other devices", name), "[Attach] Interfaces="
		}
		return fmt.Sprintf("a map of type %s, which attaches programs", profile.MapName(e.Detail)), "[Attach] Processes="
	case guard.Link:
		return fmt.Sprintf("a link of type %d beyond what the profile lets programs be attached to", e.Detail), "[Attach] " + linkTarget(e.Detail) + "="
	case guard.Command:
		command, kind := e.CommandKind()
		setting := "[Attach]"
		if kind != guard.AnyKind {
			setting += " " + attachKeys[kind] + "="
		}
		return fmt.Sprintf("%s beyond what the profile lets programs be attached to", profile.CommandName(command)), setting
	case guard.PerfEvent:
		return "a program for a perf event", "[Attach] Processes="
	case guard.Descriptor:
		return "a program's descriptor leaving its user namespace", ""
	case guard.Slip:
		return "a program was attached beyond what the profile lets it; its process was killed, and it is detached", "[Attach]"
	case guard.SlippedLink:
		return fmt.Sprintf("link %d was attached beyond what the profile lets it; it is detached, or the user's processes that hold it are killed", e.Detail), "[Attach]"
	}
	return e.Reason.String(), ""
}

// attachKeys are the keys of [Attach].
var attachKeys = [...]string{guard.Interfaces: "Interfaces", guard.Cgroups: "Cgroups", guard.Processes: "Processes"}

// capabilityName is the name of a capability that has to do with BPF.
func capabilityName(number uint64) string {
	switch number {
	case 12:
		return "CAP_NET_ADMIN"
	case 21:
		return "CAP_SYS_ADMIN"
	case 38:
		return "CAP_PERFMON"
	case 39:
		return "CAP_BPF"
	}
	return fmt.Sprintf("capability %d", number)
}
