#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Makes the root of the test machine: recipe.sh DIR [MIRROR]. Without MIRROR debootstrap takes its own default.
# A changed recipe makes a new root: the name of the cached one has this file's hash in it.
set -eu

root=$1
mirror=${2-}

# The script "sid" serves every suite since etch, so a host older than forky needs no script of forky's own.
debootstrap --force-check-gpg --variant=minbase \
	--include=systemd,systemd-sysv,dbus,dbus-user-session,polkitd,libpam-systemd,login,passwd,util-linux,iproute2,procps,bpftool,libbpf1,podman,crun,uidmap,fuse-overlayfs \
	forky "$root" "$mirror" /usr/share/debootstrap/scripts/sid

rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/var/log/*.log "$root"/var/log/apt
rm -f "$root/etc/resolv.conf"
echo machine >"$root/etc/hostname"
printf '127.0.0.1 localhost machine\n::1 localhost\n' >"$root/etc/hosts"
: >"$root/etc/default/locale" # which PAM asks for
systemd-machine-id-setup --root="$root"

chroot "$root" groupadd --system bpf
for user in alice:1000 bob:1001; do
	chroot "$root" useradd --create-home --shell /bin/bash --uid "${user#*:}" --user-group "${user%:*}"
done

units=$root/etc/systemd/system

# These write the settings of the kernel, which is the host's; the rest has nothing to do in a machine.
for unit in systemd-sysctl.service systemd-binfmt.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer; do
	ln -s /dev/null "$units/$unit"
done

# As on a real system: a bpffs at its place, which systemd leaves out in containers, and a /proc without nspawn's two
# covers, since a covered one may not be mounted in a user namespace.
cat >"$units/machine-mounts.service" <<'END'
[Unit]
Description=Mounts of a real system
DefaultDependencies=no
Before=sysinit.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=mount -t bpf -o nosuid,nodev,noexec,mode=0700 bpf /sys/fs/bpf
ExecStart=umount /proc/kmsg /proc/sys/kernel/random/boot_id

[Install]
WantedBy=sysinit.target
END

# Whose control group the commands of Machine.Command run in.
cat >"$units/machine-command.service" <<'END'
[Unit]
Description=Commands from outside

[Service]
Type=exec
ExecStart=sleep infinity
TasksMax=infinity
OOMPolicy=continue
KillSignal=SIGKILL
SuccessExitStatus=SIGKILL

[Install]
WantedBy=multi-user.target
END

# A login at the machine's seat, for Machine.Login: what it starts is the session's leader.
cat >"$units/machine-session@.service" <<'END'
[Unit]
Description=Session of %i
After=systemd-logind.service systemd-user-sessions.service

[Service]
Type=exec
User=%i
PAMName=login
Environment=XDG_SEAT=seat0 XDG_SESSION_CLASS=user XDG_SESSION_TYPE=unspecified
ExecStart=sleep infinity
KillSignal=SIGKILL
SuccessExitStatus=SIGKILL
END

systemctl --root="$root" enable machine-mounts.service machine-command.service

# Tests read what the journal says: nothing may be dropped.
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nRateLimitIntervalSec=0\n' >"$root/etc/systemd/journald.conf.d/machine.conf"

# A user's manager ends with the last session, so that tests see what sessions leave.
mkdir -p "$root/etc/systemd/logind.conf.d"
printf '[Login]\nUserStopDelaySec=0\n' >"$root/etc/systemd/logind.conf.d/machine.conf"
