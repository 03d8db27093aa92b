// SPDX-License-Identifier: Apache-2.0

// Package man holds the manual pages to what the program has.
package man

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	bpfbroker  = "bpfbroker.1.scd"
	bpfbrokerd = "bpfbrokerd.8.scd"
	profiles   = "bpfbroker-profiles.5.scd"
	objects    = "bpfbroker-objects.5.scd"
)

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// page returns a page as one line, without what scdoc takes for markup.
func page(t *testing.T, name string) string {
	t.Helper()
	text := strings.NewReplacer("*", " ", "`", "", "\\", "", ",", " ", ".", " ", ";", " ", "(", " ", ")", " ", "_/", " /").Replace(read(t, name))
	return " " + strings.Join(strings.Fields(text), " ") + " "
}

// Every name that a user or an administrator can meet is explained.
func TestNames(t *testing.T) {
	t.Parallel()
	const internal = "../../service/internal/"
	for _, test := range []struct {
		// Each match of the expression's group in the source stands in the page.
		source, match, page string
		// But for the text before that.
		after string
	}{
		{source: internal + "profile/parse.go", match: `\t\t"(\w+)": +set`, page: profiles, after: "var keys"},
		{source: internal + "profile/parse.go", match: `\t"(\w+)": +\{`, page: profiles, after: "var keys"},
		// The words of a group, in their order.
		{source: internal + "profile/mask.go", match: "(?s)`([^`]+)`", page: profiles, after: "var groups"},
		{source: internal + "profile/mask.go", match: `\t"(\w+)": +\{`, page: profiles, after: "var groups"},
		{source: internal + "profile/tier.go", match: `\d: +\{"(\w+)"`, page: profiles},
		{source: internal + "profile/tier.go", match: `"(bpf_\w+|\w*send_signal\w*|override_return|probe_write_user)"`, page: profiles, after: "var ("},
		{source: internal + "catalog/file.go", match: `\t"(\w+)": +(?:set|func)`, page: objects, after: "objectKeys ="},
		{source: internal + "catalog/file.go", match: `Access = "([a-z-]+)"`, page: objects},
		{source: internal + "varlink/org.bpfbroker.Broker.varlink", match: `\nerror (\w+)`, page: bpfbrokerd},
		{source: internal + "varlink/org.bpfbroker.Broker.varlink", match: `\nmethod (\w+)`, page: bpfbrokerd},
		{source: internal + "authority/action.go", match: `"org\.bpfbroker\.([a-z-]+)"`, page: bpfbrokerd},
		{source: internal + "authority/details.go", match: `Detail\w+ += "([a-z.-]+)"`, page: bpfbrokerd},
		{source: internal + "journal/event.go", match: `"([0-9a-f]{32})"`, page: bpfbrokerd},
		{source: internal + "journal/event.go", match: `Key\w+ += "(\w+)"`, page: bpfbrokerd},
		{source: "../../cmd/bpfbrokerd/main.go", match: `flag\.\w+\("([a-z-]+)"`, page: bpfbrokerd},
	} {
		text := page(t, test.page)
		matches := regexp.MustCompile(test.match).FindAllStringSubmatch(after(t, read(t, test.source), test.after), -1)
		if len(matches) == 0 {
			t.Errorf("%s has no %s", test.source, test.match)
		}
		for _, m := range matches {
			name := strings.Join(strings.Fields(strings.ReplaceAll(m[1], ".", " ")), " ")
			if !regexp.MustCompile(`(?i)[ @=[_~.-]` + regexp.QuoteMeta(name) + `[ =\]]`).MatchString(text) {
				t.Errorf("%s does not have %q of %s", test.page, name, test.source)
			}
		}
	}
}

func after(t *testing.T, text, mark string) string {
	t.Helper()
	i := strings.Index(text, mark)
	if i < 0 {
		t.Fatalf("%q is not in the source", mark)
	}
	return text[i:]
}

// Every type that can be delegated is explained; bpf(2) has the commands.
func TestTypes(t *testing.T) {
	t.Parallel()
	text := page(t, profiles)
	var all map[string]any
	if err := json.Unmarshal([]byte(read(t, "../../service/internal/profile/testdata/unlimited.golden")), &all); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"maps", "programs", "attachments"} {
		for _, name := range all[key].([]any) {
			if !strings.Contains(text, " "+name.(string)+" ") {
				t.Errorf("%s does not have %q of the %s", profiles, name, key)
			}
		}
	}
}

// Every command and option of the client is explained.
func TestCommandLine(t *testing.T) {
	t.Parallel()
	text := page(t, bpfbroker)
	program := filepath.Join(t.TempDir(), "bpfbroker")
	if out, err := exec.Command("go", "build", "-o", program, "../../cmd/bpfbroker").CombinedOutput(); err != nil {
		t.Fatalf("cannot build: %v\n%s", err, out)
	}
	for _, command := range []string{"", "run", "profiles", "profile", "profile show", "list", "renew", "revoke", "monitor", "explain", "learn", "check", "mount", "cdi",
		"objects", "object", "object show", "object dump", "object watch", "object open", "object mount", "export"} {
		help, err := exec.Command(program, append(strings.Fields(command), "--help")...).Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^ +(-\w), |(--[a-z-]+)|^  ([a-z]+)  `).FindAllStringSubmatch(string(help), -1) {
			name := m[1] + m[2] + m[3]
			if !strings.Contains(text, " "+name+" ") && !strings.Contains(text, " "+name+"[") {
				t.Errorf("%s does not have %q of \"bpfbroker %s --help\"", bpfbroker, name, command)
			}
		}
	}
}

// The limits in the README and in the manual are the same, and those of the
// source.
func TestLimits(t *testing.T) {
	t.Parallel()
	manual := limits(after(t, read(t, bpfbrokerd), "# LIMITS"), `(?m)^(\w[\w' ]+?)  +(\S.*)$`)
	readme := limits(after(t, read(t, "../../README.md"), "## Limits"), `(?m)^\| (\w[\w' ]+?) \| (\S.*?) \|$`)
	delete(readme, "Limit") // the heading
	if diff := cmp.Diff(readme, manual); diff != "" {
		t.Errorf("README.md and %s differ (-README +manual):\n%s", bpfbrokerd, diff)
	}
	sources := map[string]string{
		"Grants of a user":                    `grant/grant.go MaxPerUser += (\d+)`,
		"Grants of all users":                 `grant/grant.go MaxTotal += (\d+)`,
		"Connections of a user":               `varlink/server.go cmp.Or\(l.ConnectionsPerUser, (\d+)`,
		"Connections of all users":            `varlink/server.go cmp.Or\(l.Connections, (\d+)`,
		"Requests of a user under way":        `limit/limit.go Requests = (\d+)`,
		"Requests of a user in a second":      `limit/limit.go Rate     = (\d+)`,
		"Requests of a user in a burst":       `limit/limit.go Burst    = (\d+)`,
		"Length of a message":                 `varlink/server.go cmp.Or\(l.MessageBytes, (\d+)<<10`,
		"Nesting in a message":                `varlink/wire/message.go maxDepth = (\d+)`,
		"File descriptors with a message":     `broker/access.go "MountToken": .*Files: (\d+)`,
		"Time for a message to arrive":        `varlink/server.go cmp.Or\(l.Arrival, (\d+)\*time.Second`,
		"Time without a request":              `varlink/server.go cmp.Or\(l.Idle, (\d+)\*time.Second`,
		"Time for a request":                  `varlink/server.go cmp.Or\(l.Request, (\d+)\*time.Minute`,
		"Time for an answer to be taken":      `varlink/server.go cmp.Or\(l.Write, (\d+)\*time.Second`,
		"Time for a step in the target":       `kernel/child.go childTimeout = (\d+) \* time.Second`,
		"Requests at work in targets":         `kernel/mother.go maxHelpers = (\d+)`,
		"Hanging steps in a user's targets":   `kernel/child.go maxHanging = (\d+)`,
		"Questions to polkit under way":       `authority/authority.go maxAnswers += (\d+)`,
		"Password prompts of a user":          `authority/authority.go maxPromptsOfUser = (\d+)`,
		"Password prompts under way":          `authority/authority.go maxPrompts += (\d+)`,
		"Refusals of a user in the journal":   `broker/refusals.go refusalsLogged = (\d+)`,
		"Monitors of a user":                  `broker/monitor.go maxMonitorsPerUser = (\d+)`,
		"Monitors of all users":               `broker/monitor.go maxMonitors += (\d+)`,
		"Events that wait for a monitor":      `broker/monitor.go maxQueue = (\d+)`,
		"Events of a user in a second":        `../../bpf/guard.bpf.c user_events = (\d+)`,
		"Denials of a user remembered":        `broker/history.go maxDenials = (\d+)`,
		"Users whose denials are remembered":  `broker/history.go maxDenied += (\d+)`,
		"Ended grants remembered":             `broker/history.go maxPast = (\d+)`,
		"Length of a value in the journal":    `journal/journal.go maxValue += (\d+)`,
		"Length of a detail for polkit":       `authority/details.go maxDetail = (\d+)`,
		"Time without connections and grants": `../service.go idleTime = (\d+) \* time.Second`,
		"Programs of a user's grants":         `../../bpf/guard.bpf.c user_programs = (\d+)`,
		"Maps of a user's grants":             `../../bpf/guard.bpf.c user_maps = (\d+)`,
		"Memory of the maps of a user":        `../../bpf/guard.bpf.c user_map_bytes = (\d+)ULL << 30`,
		"Tokens of a user's grants":           `../../bpf/guard.bpf.c user_tokens = (\d+)`,
		"Tokens of a grant":                   `../../bpf/guard.bpf.c grant_tokens = (\d+)`,
		"Grants that left something":          `guard/grant.go MaxPerOwner = (\d+)`,
		"Kernel functions of a profile":       `../../bpf/guard.bpf.c MAX_KFUNCS = (\d+)`,
		"The guard's records about a user":    `../../bpf/guard.bpf.c user_events = (\d+)`,
		"Time for killing a grant's holders":  `broker/revoke.go killTime = (\d+) \* time.Second`,
	}
	for name, source := range sources {
		checkLimit(t, name, manual[name], source)
	}
	for name := range manual {
		if sources[name] == "" {
			t.Errorf("nobody looks where %q comes from", name)
		}
	}

	text := after(t, page(t, profiles), "# LIMITS")
	for format, source := range map[string]string{
		"most N KiB":                  `config/load.go MaxFileSize = (\d+) << 10`,
		"description N bytes":         `config/value.go MaxDescription = (\d+)`,
		"N names each":                `profile/parse.go maxNames += (\d+)`,
		"kernel function N bytes":     `profile/parse.go maxIdentifier += (\d+)`,
		"most N profiles":             `config/load.go MaxNames = (\d+)`,
		"N drop-ins":                  `config/load.go MaxDropIns = (\d+)`,
		"N entries":                   `config/load.go MaxEntries = (\d+)`,
		"errors in a file N are said": `config/parse.go MaxErrors = (\d+)`,
	} {
		m := regexp.MustCompile(strings.Replace(format, "N", `(\d+)`, 1)).FindStringSubmatch(text)
		if m == nil {
			t.Errorf("%s does not have %q", profiles, format)
			continue
		}
		checkLimit(t, format, m[1], source)
	}
}

// The limits of a scrape, and of the maps that are handed on, are those of the
// source.
func TestExportLimits(t *testing.T) {
	t.Parallel()
	text := page(t, bpfbroker)
	for format, source := range map[string]string{
		"most N maps":                  `../../cmd/bpfbroker/objects.go maxOpen = (\d+)`,
		"arrays of up to N numbers":    `../client/export/plan.go maxList = (\d+)`,
		"scrape has at most N entries": `../client/export/export.go maxEntries = (\d+)`,
		"and N samples":                `../client/export/export.go maxSamples = (\d+)`,
		"reads for at most N s":        `../client/export/export.go maxTime    = (\d+)`,
		"cut after N bytes":            `../client/export/export.go maxLabel   = (\d+)`,
		" N scrapes":                   `../client/export/server.go maxScrapes     = (\d+)`,
		" N connections":               `../client/export/server.go maxConnections = (\d+)`,
	} {
		m := regexp.MustCompile(strings.Replace(format, "N", `(\d+)`, 1)).FindStringSubmatch(text)
		if m == nil {
			t.Errorf("%s does not have %q", bpfbroker, format)
			continue
		}
		checkLimit(t, format, m[1], source)
	}
}

// The limits of objects are those of the source.
func TestObjectLimits(t *testing.T) {
	t.Parallel()
	text := page(t, objects)
	for format, source := range map[string]string{
		"most N MiB":                  `catalog/file.go maxFile = (\d+) << 20`,
		"NM if it":                    `catalog/file.go maxMapBytes = (\d+) << 20`,
		"most N long":                 `config/load.go MaxName = (\d+)`,
		"file has at most N KiB":      `config/load.go MaxFileSize = (\d+) << 10`,
		"most N objects":              `config/load.go MaxNames = (\d+)`,
		"with N maps":                 `catalog/file.go maxSections = (\d+)`,
		"and N programs":              `catalog/file.go maxSections = (\d+)`,
		"N places":                    `catalog/file.go maxTargets = (\d+)`,
		"and N variables":             `catalog/file.go maxData = (\d+)`,
		"rate up to NHz":              `catalog/attach.go maxFrequency = (\d+)`,
		"again for N seconds":         `catalog/catalog.go retryTime = (\d+) \* time.Second`,
		"kept for are N of a user":    `catalog/use.go maxUsersOfOwner = (\d+)`,
		"user and N in all":           `catalog/use.go maxUsers += (\d+)`,
		"copied into: N frames":       `kernel/xdp.go PacketFrames    = (\d+)`,
		"of N bytes":                  `kernel/xdp.go PacketFrameSize = (\d+)`,
		"mount has at most N objects": `broker/objects.go maxMounted = (\d+)`,
	} {
		m := regexp.MustCompile(strings.Replace(format, "N", `(\d+)`, 1)).FindStringSubmatch(text)
		if m == nil {
			t.Errorf("%s does not have %q", objects, format)
			continue
		}
		checkLimit(t, format, m[1], source)
	}
}

func limits(text, row string) map[string]string {
	text, _, _ = strings.Cut(text[1:], "\n#")
	all := make(map[string]string)
	for _, m := range regexp.MustCompile(row).FindAllStringSubmatch(text, -1) {
		all[m[1]] = m[2]
	}
	return all
}

// checkLimit compares the number at the beginning of value with the one in a
// source, given as a file and an expression.
func checkLimit(t *testing.T, name, value, source string) {
	t.Helper()
	file, match, _ := strings.Cut(source, " ")
	m := regexp.MustCompile(match).FindStringSubmatch(read(t, "../../service/internal/"+file))
	if m == nil {
		t.Errorf("%s has no %s", file, match)
		return
	}
	if number, _, _ := strings.Cut(strings.TrimRight(value, ",;"), " "); strings.TrimRight(number, ",;") != m[1] {
		t.Errorf("%s: the documentation says %q, %s says %s", name, value, file, m[1])
	}
}

// The pages are clean: scdoc and man have nothing to complain of.
func TestPages(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"scdoc", "man"} {
		if _, err := exec.LookPath(program); err != nil && os.Getenv("CI") != "true" {
			t.Skip(err)
		}
	}
	for _, name := range []string{bpfbroker, bpfbrokerd, profiles, objects} {
		scdoc := exec.Command("scdoc")
		scdoc.Stdin = strings.NewReader(read(t, name))
		roff, err := scdoc.Output()
		if err != nil {
			t.Errorf("scdoc %s: %v", name, err)
			continue
		}
		file := filepath.Join(t.TempDir(), strings.TrimSuffix(name, ".scd"))
		if err := os.WriteFile(file, roff, 0o644); err != nil {
			t.Fatal(err)
		}
		man := exec.Command("man", "--local-file", "--warnings", file)
		man.Env = append(os.Environ(), "MANWIDTH=80", "LC_ALL=C.UTF-8", "MAN_KEEP_FORMATTING=")
		var complaints strings.Builder
		man.Stderr = &complaints
		out, err := man.Output()
		if err != nil || complaints.Len() > 0 {
			t.Errorf("man %s: %v\n%s", name, err, &complaints)
		}
		for line := range strings.Lines(string(out)) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 {
				t.Errorf("%s: a line of %d characters: %s", name, n, line)
			}
		}
	}
}
