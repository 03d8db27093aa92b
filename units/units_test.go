// SPDX-License-Identifier: Apache-2.0

// Package units holds the units to what systemd has.
package units

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// oldest is the oldest version of systemd that the README names. An older one
// ignores what it doesn't know, and says so in the journal at most.
const oldest = 253

// since is the version that brought a directive, by "Added in version" of
// systemd's manual; 0 is before such notes.
var since = map[string]int{
	"After": 201, "Description": 201, "Documentation": 201, "Requires": 201, "WantedBy": 201,
	"Backlog": 0, "DirectoryMode": 0, "FileDescriptorName": 227, "ListenStream": 0, "SocketMode": 0, "Symlinks": 214,
	"BusName": 0, "ExecReload": 0, "ExecStart": 0, "ExecStartPre": 0, "PropagatesReloadTo": 209, "RemainAfterExit": 0, "NotifyAccess": 0, "RestartPreventExitStatus": 189, "Type": 0, "WatchdogSec": 0,
	"EnvironmentFile": 0, "Restart": 0, "RestartSec": 0,
	"RuntimeDirectory": 211, "RuntimeDirectoryMode": 234, "RuntimeDirectoryPreserve": 235, "UMask": 0,
	"LimitCORE": 0, "LimitMEMLOCK": 0, "LimitNOFILE": 0, "MemoryMax": 231, "TasksMax": 227,
	"CapabilityBoundingSet": 0, "DevicePolicy": 208, "IPAddressDeny": 235, "LockPersonality": 235, "MemoryDenyWriteExecute": 231,
	"NoNewPrivileges": 187, "PrivateDevices": 209, "PrivateNetwork": 0, "PrivateTmp": 0, "ProcSubset": 247,
	"ProtectClock": 245, "ProtectControlGroups": 232, "ProtectHome": 214, "ProtectHostname": 242, "ProtectKernelLogs": 244,
	"ProtectKernelModules": 232, "ProtectKernelTunables": 232, "ProtectProc": 247, "ProtectSystem": 214, "ReadWritePaths": 231, "RemoveIPC": 232,
	"RestrictAddressFamilies": 211, "RestrictNamespaces": 233, "RestrictRealtime": 231, "RestrictSUIDSGID": 242,
	"SystemCallArchitectures": 209, "SystemCallErrorNumber": 209, "SystemCallFilter": 187,
}

// Nothing in the units is newer than the oldest systemd.
func TestDirectives(t *testing.T) {
	t.Parallel()
	for _, pattern := range []string{"*.in", "*.socket", "examples/*.conf"} {
		names, err := filepath.Glob(pattern)
		if err != nil || len(names) == 0 {
			t.Fatalf("no %s: %v", pattern, err)
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`(?m)^(\w+)=`).FindAllStringSubmatch(string(text), -1) {
				switch version, known := since[m[1]]; {
				case !known:
					t.Errorf("%s: since when does systemd have %s=?", name, m[1])
				case version > oldest:
					t.Errorf("%s: systemd %d ignores %s=, which came with %d", name, oldest, m[1], version)
				}
			}
		}
	}
}
