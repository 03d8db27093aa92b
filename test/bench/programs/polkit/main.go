// SPDX-License-Identifier: Apache-2.0

// Command polkit takes samples (sample.h) of one bare CheckAuthorization that
// polkit answers with yes: polkit KIND UID ACTION [KEY=VALUE...]. The subject is
// of that kind and that user's: a process in namespaces of its own (unix-process),
// or a connection to the bus (system-bus-name).
package main

import (
	"bufio"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"
)

func main() {
	if len(os.Args) < 4 {
		log.Fatal("usage: polkit KIND UID ACTION [KEY=VALUE...]")
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4:]); err != nil {
		log.Fatal(err)
	}
}

func run(kind, user, action string, pairs []string) error {
	uid, err := strconv.Atoi(user)
	if err != nil {
		return err
	}
	details := map[string]string{}
	for _, pair := range pairs {
		key, value, _ := strings.Cut(pair, "=")
		details[key] = value
	}

	subject := struct {
		Kind    string
		Details map[string]dbus.Variant
	}{Kind: kind}
	if kind == "system-bus-name" {
		peer, err := connectAs(uid)
		if err != nil {
			return err
		}
		defer peer.Close()
		subject.Details = map[string]dbus.Variant{"name": dbus.MakeVariant(peer.Names()[0])}
	} else {
		pidfd, end, err := processOf(uid)
		if err != nil {
			return err
		}
		defer end()
		subject.Details = map[string]dbus.Variant{"pidfd": dbus.MakeVariant(dbus.UnixFD(pidfd)), "uid": dbus.MakeVariant(int32(uid))}
	}

	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		return err
	}
	defer conn.Close()
	polkit := conn.Object("org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority")
	input := bufio.NewScanner(os.Stdin)
	for input.Scan() {
		var result struct {
			Authorized, Challenge bool
			Details               map[string]string
		}
		start := time.Now()
		call := polkit.Call("org.freedesktop.PolicyKit1.Authority.CheckAuthorization", 0, subject, action, details, uint32(0), "")
		if err := call.Store(&result); err != nil {
			return err
		}
		took := time.Since(start)
		if !result.Authorized {
			return errors.New("polkit doesn't say yes")
		}
		fmt.Println(took.Nanoseconds())
	}
	return input.Err()
}

// processOf starts a process of a user's.
func processOf(uid int) (pidfd int, end func(), err error) {
	process := exec.Command("unshare", "-Urm", "sleep", "infinity")
	process.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)},
		PidFD:      &pidfd,
	}
	if err := process.Start(); err != nil {
		return 0, nil, err
	}
	return pidfd, func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	}, nil
}

// connectAs connects to the bus as a user: it takes the credentials of the thread
// that connects.
func connectAs(uid int) (*dbus.Conn, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := setThreadUID(uid); err != nil {
		return nil, err
	}
	conn, err := dbus.SystemBusPrivate()
	if err := setThreadUID(0); err != nil {
		return nil, err
	}
	if err == nil {
		err = conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(uid))})
	}
	if err == nil {
		err = conn.Hello()
	}
	return conn, err
}

func setThreadUID(uid int) error {
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
		return errno
	}
	return nil
}
