// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"log/slog"

	"github.com/bpfbroker/bpfbroker/service/internal/authority"
	"github.com/bpfbroker/bpfbroker/service/internal/catalog"
	"github.com/bpfbroker/bpfbroker/service/internal/config"
	"github.com/bpfbroker/bpfbroker/service/internal/delegate"
	"github.com/bpfbroker/bpfbroker/service/internal/grant"
	"github.com/bpfbroker/bpfbroker/service/internal/guard"
	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// Error is a refusal, the same on every front.
type Error struct {
	// Name is the error's name without its interface's.
	Name string
	// Reason is a sentence without its full stop.
	Reason string
	// Layer is what refused: request, profile, object, target, polkit, kernel,
	// guard or limit.
	Layer string
	// Remedy is what would change it, "" if nothing would.
	Remedy string
}

// Error returns the reason.
func (e *Error) Error() string { return e.Reason }

// refusals gives the errors of the layers below their names on the fronts.
// The reason is the error's own text.
var refusals = []struct {
	err                 error
	name, layer, remedy string
}{
	{delegate.ErrInitial, "NamespaceInitial", "target", "ask from inside a user namespace of your own, as \"bpfbroker run\" does"},
	{delegate.ErrNested, "NamespaceNested", "target", "use a user namespace that is inside none but the user's own"},
	{delegate.ErrMountNotOwned, "MountNamespaceNotOwned", "target", "make a mount namespace along with the user namespace"},
	{delegate.ErrMoved, "ProcessGone", "target", "ask again"},
	{kernel.ErrOwnerNotMapped, "OwnerNotMapped", "target", "map the uid that owns the user namespace into it first, or a root"},
	{kernel.ErrProcessGone, "ProcessGone", "target", "ask for a process that runs"},
	{kernel.ErrNotPidFD, "NotAPidFD", "request", "pass a file descriptor from pidfd_open(2)"},
	{kernel.ErrPathInvalid, "PathInvalid", "request", "pass an absolute path without \".\", \"..\" and double slashes"},
	{kernel.ErrPathNotFound, "PathNotFound", "target", "make the directory in the target first"},
	{kernel.ErrPathIsLink, "PathIsLink", "target", "name the directory itself"},
	{kernel.ErrPathNotDirectory, "PathNotDirectory", "target", "name a directory"},
	{kernel.ErrPathDenied, "PathDenied", "target", "name a directory that the owner of the user namespace can reach"},
	{kernel.ErrTooManyHelpers, "Busy", "limit", "ask again later"},
	{kernel.ErrHelperKilled, "Busy", "target", "ask again, and let bpfbroker's helper process in the target live"},
	{kernel.ErrTargetHangs, "TargetHangs", "target", "name a path outside of file systems that don't answer"},
	{kernel.ErrTokenMismatch, "NotDelegatable", "kernel", "report the kernel and the profile"},
	{kernel.ErrNotSupported, "KernelNotSupported", "kernel", "use Linux 6.11 or newer, with CONFIG_BPF_SYSCALL"},
	{grant.ErrQuotaUser, "QuotaExceeded", "limit", "revoke grants that are no longer needed"},
	{grant.ErrQuotaTotal, "QuotaExceeded", "limit", "try again when other users' grants have ended"},
	{guard.ErrTooMany, "QuotaExceeded", "limit", "end what holds tokens, programs and maps of grants that have ended"},
	{grant.ErrNotFound, "NoSuchGrant", "request", "see \"bpfbroker list\""},
	{catalog.ErrNoSuchObject, "NoSuchObject", "object", "see \"bpfbroker objects\""},
	{catalog.ErrNoSuchMap, "NoSuchMap", "object", "see \"bpfbroker object show\""},
	{catalog.ErrNoSuchProgram, "NoSuchProgram", "object", "see \"bpfbroker object show\""},
	{catalog.ErrNoSuchLink, "NoSuchLink", "object", "see \"bpfbroker object show\""},
	{catalog.ErrNotOffered, "AccessNotOffered", "object", "ask for an access that \"bpfbroker object show\" has"},
	{kernel.ErrQueueTaken, "QueueTaken", "object", "ask for another queue, or when the other one has ended"},
	{catalog.ErrNotAttached, "NoSuchQueue", "object", "ask when the interface is there"},
	{kernel.ErrQueueUnknown, "NoSuchQueue", "request", "ask for a queue that both the interface and the map have"},
	{catalog.ErrTooManyUsers, "QuotaExceeded", "limit", "try again when others have ended"},
	{profile.ErrNotFound, "NoSuchProfile", "profile", "see \"bpfbroker profiles\""},
	{authority.ErrDenied, "NotAuthorized", "polkit", "ask the administrator for a polkit rule"},
	{authority.ErrChallenge, "InteractionRequired", "polkit", "allow interactive authorization and have an authentication agent, or ask the administrator for a polkit rule"},
	{authority.ErrDismissed, "NotAuthorized", "polkit", "authenticate when asked"},
	{authority.ErrTooManyPrompts, "QuotaExceeded", "limit", "answer or dismiss those that are there"},
	{authority.ErrUnavailable, "AuthorityUnavailable", "polkit", "have the administrator start polkit.service"},
	{context.DeadlineExceeded, "AuthorizationTimeout", "polkit", "answer sooner, or ask the administrator for a polkit rule"},
	{context.Canceled, "Canceled", "request", ""},
}

// failures bounds what errors without a name write into the journal, as users
// may find out how to cause them.
var failures refusalLog

// Refuse turns an error of a layer below into an *Error. What has no name
// there is nothing that a peer could understand or should learn.
func Refuse(err error) *Error {
	var already *Error
	if errors.As(err, &already) {
		return already
	}
	var file *config.FileError
	if errors.As(err, &file) {
		return &Error{Name: "InvalidProfile", Reason: file.Error(), Layer: "profile", Remedy: "have the administrator mend the file"}
	}
	for _, r := range refusals {
		if errors.Is(err, r.err) {
			return &Error{Name: r.name, Reason: err.Error(), Layer: r.layer, Remedy: r.remedy}
		}
	}
	if failures.next(0) <= refusalsLogged {
		slog.Error("a request failed", "error", err)
	}
	return &Error{Name: "Internal", Reason: "cannot do it: an internal error, which the journal has", Layer: "kernel", Remedy: "see \"journalctl -u bpfbroker.service\""}
}
