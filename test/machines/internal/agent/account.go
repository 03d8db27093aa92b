// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"strconv"
	"strings"
)

// What login sets PATH to, in Debian.
const (
	RootPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	userPath = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
)

// Account is what a machine knows of a user.
type Account struct {
	User        string
	UID, GID    uint32
	Home, Shell string
}

// FindAccount looks a user up in the content of a passwd(5) file.
func FindAccount(passwd []byte, user string) (Account, error) {
	for line := range strings.Lines(string(passwd)) {
		fields := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(fields) != 7 || fields[0] != user {
			continue
		}
		uid, err := strconv.ParseUint(fields[2], 10, 32)
		if err != nil {
			return Account{}, err
		}
		gid, err := strconv.ParseUint(fields[3], 10, 32)
		if err != nil {
			return Account{}, err
		}
		return Account{User: user, UID: uint32(uid), GID: uint32(gid), Home: fields[5], Shell: fields[6]}, nil
	}
	return Account{}, fmt.Errorf("the test machine has no user %q", user)
}

// Env returns a clean environment for the user.
func (a Account) Env() []string {
	return []string{
		"PATH=" + a.path(), "LANG=C.UTF-8", "USER=" + a.User, "LOGNAME=" + a.User, "HOME=" + a.Home, "SHELL=" + a.Shell,
	}
}

func (a Account) path() string {
	if a.UID == 0 {
		return RootPath
	}
	return userPath
}
