// SPDX-License-Identifier: Apache-2.0

package scenarios

import "testing"

// mapsProfile offers a profile of the tier basic, which needs no guard, until the
// test's end.
func mapsProfile(t *testing.T) {
	t.Helper()
	must(t, "root", `cat >/etc/bpfbroker/profiles.d/maps.profile <<END
[Profile]
Description=Maps alone
[Delegate]
Commands=map_create
Maps=array hash
END
systemctl try-reload-or-restart bpfbroker.service`)
	t.Cleanup(func() {
		must(t, "root", "rm /etc/bpfbroker/profiles.d/maps.profile; systemctl try-reload-or-restart bpfbroker.service")
	})
}

// session makes a command of root's run in a session of a user's without a seat,
// as by ssh.
func session(user string) string {
	return "systemd-run --quiet --collect --wait --pipe -p User=" + user + " -p PAMName=login -E XDG_SESSION_CLASS=user -E XDG_SESSION_TYPE=tty -- "
}

// Who comes from elsewhere is asked for a password where who sits at the machine
// isn't.
func TestRemoteSession(t *testing.T) {
	leavesNothing(t)
	mapsProfile(t)
	refused(t, "root", session("bob")+"bpfbroker run --no-ask-password -p maps -- true", 77, "(polkit)")
}
