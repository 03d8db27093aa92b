// SPDX-License-Identifier: Apache-2.0

// Command polkit takes samples (sample.h) of one bare CheckAuthorization that
// polkit answers with yes: polkit UID ACTION [KEY=VALUE...]. The subject is a
// process of that user's in namespaces of its own.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"
)

func main() {
	if len(os.Args) < 3 {
		log.Fatal("usage: polkit UID ACTION [KEY=VALUE...]")
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		log.Fatal(err)
	}
}

func run(user, action string, pairs []string) error {
	uid, err := strconv.ParseUint(user, 10, 31)
	if err != nil {
		return err
	}
	details := map[string]string{}
	for _, pair := range pairs {
		key, value, _ := strings.Cut(pair, "=")
		details[key] = value
	}

	var pidfd int
	process := exec.Command("unshare", "-Urm", "sleep", "infinity")
	process.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)},
		PidFD:      &pidfd,
	}
	if err := process.Start(); err != nil {
		return err
	}
	defer func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	}()
	subject := struct {
		Kind    string
		Details map[string]dbus.Variant
	}{"unix-process", map[string]dbus.Variant{
		"pidfd": dbus.MakeVariant(dbus.UnixFD(pidfd)),
		"uid":   dbus.MakeVariant(int32(uid)),
	}}

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
