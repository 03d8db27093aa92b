// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"net"
	"runtime"
	"syscall"
	"time"
)

// firstUser is the uid of the first of many users that no account is for.
const firstUser = 20_000

// open has n users ask for a published map at once, and prints how many have got
// it. The users are of one process: a connection's are those of the thread that
// makes it.
func open(n int, object, mapName string) error {
	conns := make([]*net.UnixConn, n)
	for i := range conns {
		var err error
		if conns[i], err = dialAs(firstUser + i); err != nil {
			return err
		}
		defer conns[i].Close()
	}
	call := fmt.Appendf(nil, `{"method":"org.bpfbroker.Broker.OpenMap","parameters":{"object":%q,"map":%q,"access":"read-only"}}`+"\x00", object, mapName)
	for _, conn := range conns {
		if _, err := conn.Write(call); err != nil {
			return err
		}
	}
	opened := 0
	for _, conn := range conns {
		if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			return err
		}
		answer, control := make([]byte, 4096), make([]byte, 64)
		length, controlLength, _, _, err := conn.ReadMsgUnix(answer, control)
		if err != nil {
			return fmt.Errorf("cannot read an answer: %w", err)
		}
		if controlLength == 0 || bytes.Contains(answer[:length], []byte(`"error"`)) {
			fmt.Printf("%s\n", answer[:length])
			continue
		}
		opened++
	}
	fmt.Println(opened)
	return nil
}

func dialAs(uid int) (*net.UnixConn, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := setThreadUID(uid); err != nil {
		return nil, err
	}
	conn, err := dial()
	if err := setThreadUID(0); err != nil {
		return nil, err
	}
	return conn, err
}

func setThreadUID(uid int) error {
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
		return errno
	}
	return nil
}
