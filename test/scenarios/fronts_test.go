// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// front is a way to call the broker. Its commands have PID where the id of a
// process in a namespace of alice's belongs, and GRANT for a grant of hers.
type front struct {
	name string
	// parse makes a verdict of what a command did.
	parse func(*testing.T, result) verdict
}

// verdict is what a caller learns: an error, or the words in the answer.
type verdict struct {
	Error, Reason, Layer, Remedy string
	words                        []string
}

var bothFronts = []front{{"the socket", parseSocket}, {"the bus", parseBus}}

// call calls a method on the socket and on the bus. The arguments are JSON, and as
// busctl has them, with the signature.
func call(method, parameters, arguments string) [2]string {
	object, iface, member := "/org/bpfbroker/Broker1", "Manager", method
	if method == "RenewGrant" || method == "RevokeGrant" {
		object, iface, member = object+"/grant/GRANT", "Grant", strings.TrimSuffix(method, "Grant")
	}
	return [2]string{
		"varlinkctl -j call " + broker + " org.bpfbroker.Broker." + method + " '" + parameters + "'",
		// The name of an error is in busctl's debugging messages alone.
		"SYSTEMD_LOG_LEVEL=debug busctl -j --system call org.bpfbroker.Broker1 " + object + " org.bpfbroker.Broker1." + iface + " " + member + " " + arguments,
	}
}

func parseSocket(t *testing.T, r result) verdict {
	t.Helper()
	var v verdict
	if r.code != 0 {
		_, v.Error, _ = strings.Cut(strings.TrimSpace(r.err), "failed: org.bpfbroker.Broker.")
		if err := json.Unmarshal([]byte(r.out), &v); err != nil {
			t.Errorf("%v: %+v", err, r)
		}
		return v
	}
	v.words = wordsOf(t, r.out)
	return v
}

var (
	busErrorName = regexp.MustCompile(`error-name=org\.bpfbroker\.Broker1\.Error\.(\w+)`)
	busErrorText = regexp.MustCompile(`(?s)Call failed: (.*) \(refused by (\w+)(?:; remedy: (.*))?\)\n`)
)

func parseBus(t *testing.T, r result) verdict {
	t.Helper()
	if r.code != 0 {
		name, text := busErrorName.FindStringSubmatch(r.err), busErrorText.FindStringSubmatch(r.err)
		if name == nil || text == nil {
			t.Errorf("no error of the broker's: %+v", r)
			return verdict{}
		}
		return verdict{Error: name[1], Reason: text[1], Layer: text[2], Remedy: text[3]}
	}
	return verdict{words: wordsOf(t, r.out)}
}

// parseClient makes a verdict of what token-client did, which passes a pidfd over
// the socket.
func parseClient(t *testing.T, r result) verdict {
	t.Helper()
	if r.code == 0 {
		return verdict{words: []string{unnamed(strings.TrimSpace(r.out))}}
	}
	var v verdict
	if _, err := fmt.Sscan(r.out, &v.Error, &v.Layer); err != nil {
		t.Errorf("%v: %+v", err, r)
	}
	v.Reason = strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(r.err), "token-client: "), " ("+v.Layer+")")
	return v
}

var grantID = regexp.MustCompile(`(/org/bpfbroker/Broker1/grant/)?\b[0-9a-f]{16}\b`)

// unnamed takes out what differs from one grant to the next.
func unnamed(text string) string { return grantID.ReplaceAllString(text, "GRANT") }

// wordsOf gives the texts in an answer.
func wordsOf(t *testing.T, answer string) []string {
	t.Helper()
	var value any
	if err := json.Unmarshal([]byte(answer), &value); err != nil {
		t.Errorf("%v: %s", err, answer)
	}
	words := map[string]bool{}
	var walk func(any)
	walk = func(value any) {
		switch v := value.(type) {
		case string:
			words[unnamed(v)] = true
		case []any:
			for _, v := range v {
				walk(v)
			}
		case map[string]any:
			_, file := v["fd"]
			_, variant := v["data"]
			for key, v := range v {
				// What busctl says of types and descriptors is its own.
				if !file && !(variant && key == "type") {
					walk(v)
				}
			}
		}
	}
	walk(value)
	var all []string
	for word := range words {
		if word != "" {
			all = append(all, word)
		}
	}
	slices.Sort(all)
	return all
}

// journalEnd is where the broker's records end, for records.
func journalEnd(t *testing.T) string {
	t.Helper()
	_, cursor, _ := strings.Cut(strings.TrimSpace(must(t, "root", "journalctl --sync; journalctl --unit=bpfbroker.service --lines=0 --show-cursor")), "-- cursor: ")
	return cursor
}

// records gives the broker's fields in the journal behind a cursor, without what
// differs from one grant and process to the next.
func records(t *testing.T, cursor string) []map[string]string {
	t.Helper()
	var all []map[string]string
	out := must(t, "root", "journalctl --sync; journalctl --quiet --unit=bpfbroker.service --output=json --after-cursor='"+cursor+"'")
	for line := range strings.Lines(out) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatal(err)
		}
		record := map[string]string{}
		for key, value := range fields {
			text, ok := value.(string)
			switch {
			case !ok || key != "MESSAGE_ID" && !strings.HasPrefix(key, "BPFBROKER_"):
			case key == "BPFBROKER_PROCESS":
				record[key] = "PID"
			default:
				record[key] = unnamed(text)
			}
		}
		if record["MESSAGE_ID"] != "" {
			all = append(all, record)
		}
	}
	return all
}

// Every verb gives the same verdict on both fronts, with the same error, and leaves
// the same records.
func TestEveryVerbOnBothFronts(t *testing.T) {
	publish(t, "packets", packets)
	must(t, "bob", "object-client packets packets read-only") // which loads it
	leavesNothing(t)
	const inside = "unshare -cUm env "
	within := func(commands [2]string) [2]string { return [2]string{inside + commands[0], inside + commands[1]} }
	mount := func(profile, path string) [2]string {
		return [2]string{"token-client mount PID " + profile + " " + path, call("MountToken", "", "susa{sv} "+profile+" PID "+path+" 0")[1]}
	}
	one := func(method string) [2]string {
		arguments := "a{sv} 0"
		if method == "GetGrant" {
			arguments = "sa{sv} GRANT 0"
		}
		return call(method, `{"grant":"GRANT"}`, arguments)
	}
	// What is a method's answer on the socket is a published object's properties on the bus.
	properties := func(object string) [2]string {
		return [2]string{call("DescribeObject", `{"object":"`+object+`"}`, "")[0],
			"SYSTEMD_LOG_LEVEL=debug busctl -j --system call org.bpfbroker.Broker1 /org/bpfbroker/Broker1/object/" + object +
				" org.freedesktop.DBus.Properties GetAll s org.bpfbroker.Broker1.Object"}
	}
	part := func(method, kind, name, more, arguments string) [2]string {
		return call(method, `{"object":"packets","`+kind+`":"`+name+`"`+more+`}`, arguments)
	}
	tests := []struct {
		name, user string
		commands   [2]string
		// want is the error's name, and records how many there are of the call.
		want    string
		records int
	}{
		{"the profiles", "alice", call("ListProfiles", "{}", "a{sv} 0"), "", 0},
		{"a profile", "alice", call("DescribeProfile", `{"profile":"network"}`, "sa{sv} network 0"), "", 0},
		{"no profile", "alice", call("DescribeProfile", `{"profile":"nonesuch"}`, "sa{sv} nonesuch 0"), "NoSuchProfile", 0},
		{"what can be had", "alice", call("Check", "{}", "a{sv} 0"), "", 0},
		{"what bob can have", "bob", call("Check", "{}", "a{sv} 0"), "", 0},
		{"a token", "alice", within(call("AcquireToken", `{"profile":"network"}`, "sa{sv} network 0")), "", 2},
		{"a token of no profile", "alice", within(call("AcquireToken", `{"profile":"nonesuch"}`, "sa{sv} nonesuch 0")), "NoSuchProfile", 1},
		{"a token for the host", "alice", call("AcquireToken", `{"profile":"network"}`, "sa{sv} network 0"), "NamespaceInitial", 1},
		{"a token for a password", "alice", within(call("AcquireToken", `{"profile":"tracing"}`, "sa{sv} tracing 0")), "InteractionRequired", 1},
		{"a token for bob", "bob", within(call("AcquireToken", `{"profile":"network"}`, "sa{sv} network 0")), "InteractionRequired", 1},
		{"a mount", "alice", mount("network", "/mnt"), "", 1},
		{"a mount of no profile", "alice", mount("nonesuch", "/mnt"), "NoSuchProfile", 1},
		{"a mount nowhere", "alice", mount("network", "/nonesuch"), "PathNotFound", 1},
		{"a mount in alice's, for bob", "bob", mount("network", "/mnt"), "NamespaceNotOwned", 1},
		{"a mount in alice's, for root", "root", mount("network", "/mnt"), "", 1},
		{"the grants", "alice", call("ListGrants", "{}", "a{sv} 0"), "", 0},
		{"bob's grants", "bob", call("ListGrants", "{}", "a{sv} 0"), "", 0},
		{"all grants", "alice", call("ListGrants", `{"all":true}`, "a{sv} 1 all b true"), "InteractionRequired", 0},
		{"all grants, for root", "root", call("ListGrants", `{"all":true}`, "a{sv} 1 all b true"), "", 0},
		{"a grant", "alice", one("GetGrant"), "", 0},
		{"a grant, for root", "root", one("GetGrant"), "", 0},
		{"a grant, for bob", "bob", one("GetGrant"), "NoSuchGrant", 0},
		{"no grant", "alice", call("GetGrant", `{"grant":"nonesuch"}`, "sa{sv} nonesuch 0"), "NoSuchGrant", 0},
		{"a renewal", "alice", one("RenewGrant"), "", 0},
		{"a renewal, for root", "root", one("RenewGrant"), "", 0},
		{"a renewal, for bob", "bob", one("RenewGrant"), "NoSuchGrant", 0},
		{"why there is no grant", "alice", call("ExplainGrant", `{"grant":"nonesuch"}`, "sa{sv} nonesuch 0"), "NoSuchGrant", 0},
		{"the objects", "alice", call("ListObjects", "{}", "a{sv} 0"), "", 0},
		{"an object", "alice", call("DescribeObject", `{"object":"packets"}`, "sa{sv} packets 0"), "", 0},
		{"an object's properties", "alice", properties("packets"), "", 0},
		{"no object", "alice", call("DescribeObject", `{"object":"nonesuch"}`, "sa{sv} nonesuch 0"), "NoSuchObject", 0},
		{"the properties of none", "alice", properties("nonesuch"), "NoSuchObject", 0},
		{"a map", "bob", part("OpenMap", "map", "packets", `,"access":"read-only"`, "sssa{sv} packets packets read-only 0"), "", 1},
		{"a map for writing", "bob", part("OpenMap", "map", "packets", `,"access":"read-write"`, "sssa{sv} packets packets read-write 0"), "InteractionRequired", 1},
		{"a map for nothing", "bob", part("OpenMap", "map", "packets", `,"access":"receive"`, "sssa{sv} packets packets receive 0"), "AccessNotOffered", 1},
		{"no map", "bob", part("OpenMap", "map", "nonesuch", `,"access":"read-only"`, "sssa{sv} packets nonesuch read-only 0"), "NoSuchMap", 1},
		{"a map for alice", "alice", part("OpenMap", "map", "packets", `,"access":"read-only"`, "sssa{sv} packets packets read-only 0"), "InteractionRequired", 1},
		{"a socket without packets", "root", part("OpenSocket", "map", "packets", `,"queue":0`, "ssua{sv} packets packets 0 0"), "AccessNotOffered", 1},
		{"a program", "bob", part("OpenProgram", "program", "count", "", "ssa{sv} packets count 0"), "InteractionRequired", 1},
		{"a program, for root", "root", part("OpenProgram", "program", "count", "", "ssa{sv} packets count 0"), "", 1},
		{"a link", "alice", part("OpenLink", "link", "count", "", "ssa{sv} packets count 0"), "", 0},
		{"no link", "alice", part("OpenLink", "link", "nonesuch", "", "ssa{sv} packets nonesuch 0"), "NoSuchLink", 0},
		{"objects in a file system", "bob", within(call("MountObjects", `{"objects":["packets"],"path":"/mnt"}`, "asusa{sv} 1 packets 0 /mnt 0")), "", 1},
		{"objects for the host", "bob", call("MountObjects", `{"objects":["packets"],"path":"/mnt"}`, "asusa{sv} 1 packets 0 /mnt 0"), "NamespaceInitial", 1},
		{"an end, for bob", "bob", one("RevokeGrant"), "NoSuchGrant", 0},
		{"an end", "alice", one("RevokeGrant"), "", 1},
		{"an end, for root", "root", one("RevokeGrant"), "", 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			eventually(t, "the grants of the test before have ended", func() bool { return run(t, "root", "bpfbroker list --all --no-legend").out == "" })
			var verdicts [2]verdict
			var left [2][]map[string]string
			for i, f := range bothFronts {
				command := test.commands[i]
				if strings.Contains(command, "PID") || strings.Contains(command, "GRANT") || strings.Contains(test.name, "grants") {
					_, pid := start(t, "alice", "exec unshare -Urm bash -c 'echo $$; exec sleep 60'")
					command = strings.ReplaceAll(command, "PID", strings.TrimSpace(pid))
					if !strings.Contains(test.commands[1], "MountToken") {
						id := strings.TrimSpace(must(t, "alice", "token-client mount "+strings.TrimSpace(pid)+" network /mnt"))
						t.Cleanup(func() { run(t, "root", "bpfbroker -q revoke "+id) })
						command = strings.ReplaceAll(command, "GRANT", id)
					}
				}
				cursor := journalEnd(t)
				r := run(t, test.user, command)
				parse := f.parse
				if strings.HasPrefix(command, "token-client") {
					parse = parseClient
				}
				verdicts[i] = parse(t, r)
				eventually(t, fmt.Sprintf("%d records", test.records), func() bool {
					left[i] = records(t, cursor)
					return len(left[i]) >= test.records
				})
				if verdicts[i].Error != test.want {
					t.Errorf("%s says %q, want %q: %+v", f.name, verdicts[i].Error, test.want, r)
				}
			}
			socket, bus := verdicts[0], verdicts[1]
			for _, word := range bus.words {
				// The bus says less of a grant in a list, and nothing that is empty.
				if !slices.Contains(socket.words, word) {
					t.Errorf("only the bus says %q; the socket says %q", word, socket.words)
				}
			}
			if (len(bus.words) == 0) != (len(socket.words) == 0) && !strings.HasPrefix(test.name, "a renewal") {
				t.Errorf("one of them says nothing: %q, %q", socket.words, bus.words)
			}
			socket.words, bus.words = nil, nil
			if strings.Contains(test.commands[0], "token-client") {
				socket.Remedy, bus.Remedy = "", "" // which the client doesn't print
			}
			if test.want == "NoSuchGrant" {
				socket.Reason, bus.Reason = unnamed(socket.Reason), unnamed(bus.Reason)
			}
			if diff := cmp.Diff(socket, bus, cmp.AllowUnexported(verdict{})); diff != "" {
				t.Errorf("verdicts (-socket +bus):\n%s", diff)
			}
			if diff := cmp.Diff(left[0], left[1]); diff != "" || len(left[0]) != test.records {
				t.Errorf("%d records, want %d (-socket +bus):\n%s", len(left[0]), test.records, diff)
			}
		})
	}
}
