// SPDX-License-Identifier: Apache-2.0

// Command getinfo is a Varlink service that is activated by a socket and can
// only say what it is: the least that a Go program can do to answer at all.
package main

import (
	"bufio"
	"encoding/json"
	"log"
	"net"
	"os"
)

func main() {
	// sd_listen_fds(3) begins with 3.
	listener, err := net.FileListener(os.NewFile(3, "socket"))
	if err != nil {
		log.Fatal(err)
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(conn)
	}
}

func serve(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReader(conn)
	for {
		message, err := reader.ReadBytes(0)
		if err != nil {
			return
		}
		var request struct{ Method string }
		if json.Unmarshal(message[:len(message)-1], &request) != nil {
			return
		}
		reply := map[string]any{"error": "org.varlink.service.MethodNotFound", "parameters": map[string]string{"method": request.Method}}
		if request.Method == "org.varlink.service.GetInfo" {
			reply = map[string]any{"parameters": map[string]any{
				"vendor": "bpfbroker", "product": "getinfo", "version": "0", "url": "", "interfaces": []string{"org.varlink.service"},
			}}
		}
		data, err := json.Marshal(reply)
		if err != nil {
			return
		}
		if _, err := conn.Write(append(data, 0)); err != nil {
			return
		}
	}
}
