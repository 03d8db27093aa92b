// SPDX-License-Identifier: Apache-2.0

package journal

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// inNamespace is set for a process with a /run, and so a journal, of its own.
const inNamespace = "BPFBROKER_TEST_JOURNAL"

func TestMain(m *testing.M) {
	if os.Getenv(inNamespace) == "" {
		os.Exit(m.Run())
	}
	if err := logToOwnJournal(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

type late struct{}

func (late) LogValue() slog.Value { return slog.StringValue("resolved") }

// records are what is logged to the journal of the test, and what it must get.
// MESSAGE and PRIORITY are in want too.
var records = []struct {
	name string
	log  func(*slog.Logger)
	want map[string]string
}{
	{
		"attributes",
		func(l *slog.Logger) {
			l.With("a", 1).WithGroup("g").With("b", true).Error("m", "c", "x", slog.Group("h", "d", late{}), "err", errors.New("bad luck"))
		},
		map[string]string{"PRIORITY": "3", "MESSAGE": `m a=1 g.b=true g.c=x g.h.d=resolved g.err="bad luck"`,
			"BPFBROKER_A": "1", "BPFBROKER_G_B": "true", "BPFBROKER_G_C": "x", "BPFBROKER_G_H_D": "resolved", "BPFBROKER_G_ERR": "bad luck"},
	},
	{
		"event",
		func(*slog.Logger) { GrantMade.Log(context.Background(), slog.String(KeyProfile, "network")) },
		map[string]string{"PRIORITY": "6", "MESSAGE": "Grant made profile=network", "MESSAGE_ID": GrantMade.id, "BPFBROKER_PROFILE": "network"},
	},
	{
		"new lines make no fields",
		func(l *slog.Logger) {
			l.Warn("m", KeyUnit, "x\nMESSAGE_ID="+GrantMade.id+"\nBPFBROKER_OWNER=0\n", KeyReason, "a=b\x1b[2J\x00")
		},
		map[string]string{"PRIORITY": "4",
			"MESSAGE":        `m unit="x\nMESSAGE_ID=` + GrantMade.id + `\nBPFBROKER_OWNER=0\n" reason="a=b\x1b[2J\x00"`,
			"BPFBROKER_UNIT": "x\nMESSAGE_ID=" + GrantMade.id + "\nBPFBROKER_OWNER=0\n", "BPFBROKER_REASON": "a=b\x1b[2J\x00"},
	},
	{
		"not UTF-8, no name",
		func(l *slog.Logger) { l.Debug("m", "é-1", "a\xffb", strings.Repeat("k", 100), "") },
		map[string]string{"PRIORITY": "7", "MESSAGE": "m é-1=a\ufffdb " + strings.Repeat("k", 100) + `=""`,
			"BPFBROKER___1": "a\ufffdb", "BPFBROKER_" + strings.Repeat("K", 54): ""},
	},
	{
		"the largest",
		func(l *slog.Logger) {
			for i := range 2 * maxFields {
				l = l.With(fmt.Sprintf("%02d", i), strings.Repeat("é\n", maxValue))
			}
			l.Info(strings.Repeat("m", 2*maxValue))
		},
		func() map[string]string {
			want := map[string]string{"PRIORITY": "6", "MESSAGE": strings.Repeat("m", maxValue-3) + "…"}
			for i := range maxFields {
				want[fmt.Sprintf("BPFBROKER_%02d", i)] = strings.Repeat("é\n", (maxValue-3)/3) + "…"
			}
			return want
		}(),
	},
}

// logToOwnJournal puts a journal's socket where go-systemd looks for it, logs the
// records and prints what arrives, in hexadecimal.
func logToOwnJournal() error {
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("cannot mount: %w", err)
	}
	if err := os.MkdirAll("/run/systemd/journal", 0o755); err != nil {
		return err
	}
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: "/run/systemd/journal/socket", Net: "unixgram"})
	if err != nil {
		return err
	}
	var stat syscall.Stat_t
	if err := syscall.Fstat(2, &stat); err != nil {
		return err
	}
	if err := os.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)); err != nil {
		return err
	}
	slog.SetDefault(slog.New(NewHandler(slog.LevelDebug)))
	buffer := make([]byte, 1<<20)
	for _, record := range records {
		record.log(slog.Default())
		if err := socket.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		n, err := socket.Read(buffer)
		if err != nil {
			return err
		}
		fmt.Println(hex.EncodeToString(buffer[:n]))
	}
	return nil
}

// parse reads a record as journald does.
func parse(t *testing.T, data []byte) map[string]string {
	t.Helper()
	fields := make(map[string]string)
	for len(data) != 0 {
		line, rest, ok := bytes.Cut(data, []byte("\n"))
		if !ok {
			t.Fatalf("no end of line: %q", data)
		}
		name, value, plain := strings.Cut(string(line), "=")
		if !plain {
			size := binary.LittleEndian.Uint64(rest)
			value = string(rest[8 : 8+size])
			rest = rest[8+size:]
			if rest[0] != '\n' {
				t.Fatalf("no end of line after %q", value)
			}
			rest = rest[1:]
		}
		if _, twice := fields[name]; twice {
			t.Errorf("%s comes twice", name)
		}
		fields[name] = value
		data = rest
	}
	return fields
}

func TestJournal(t *testing.T) {
	t.Parallel()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), inNamespace+"=1")
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	var stderr bytes.Buffer
	child.Stderr = &stderr
	output, err := child.Output()
	if err != nil || stderr.Len() != 0 {
		t.Fatalf("%v\n%s%s", err, output, &stderr)
	}
	lines := strings.Fields(string(output))
	if len(lines) != len(records) {
		t.Fatalf("%d records for %d", len(lines), len(records))
	}
	for i, record := range records {
		data, err := hex.DecodeString(lines[i])
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(record.want, parse(t, data)); diff != "" {
			t.Errorf("%s: %s", record.name, diff)
		}
	}
}

func TestNotJournal(t *testing.T) {
	for _, stream := range []string{"", "1:2", "x"} {
		t.Setenv("JOURNAL_STREAM", stream)
		if _, ok := NewHandler(slog.LevelInfo).(*slog.TextHandler); !ok {
			t.Errorf("JOURNAL_STREAM=%q: no text handler", stream)
		}
	}
}

func TestLevel(t *testing.T) {
	t.Parallel()
	level := new(slog.LevelVar)
	h := &handler{level: level}
	for _, enabled := range []bool{true, false} {
		if h.Enabled(t.Context(), slog.LevelInfo) != enabled {
			t.Errorf("info at level %v: not %t", level.Level(), enabled)
		}
		level.Set(slog.LevelWarn)
	}
}

// Attributes that are added to one logger don't show in another.
func TestSharedAttributes(t *testing.T) {
	t.Parallel()
	base := (&handler{}).WithAttrs([]slog.Attr{slog.Int("a", 1), slog.Int("b", 2), slog.Int("c", 3)})
	one := base.WithAttrs([]slog.Attr{slog.Int("one", 1)}).(*handler)
	base.WithAttrs([]slog.Attr{slog.Int("two", 2)})
	if got := one.fields[3].key; got != "one" {
		t.Errorf("got %q", got)
	}
}

func TestCatalog(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile(filepath.Join("..", "..", "..", "packaging", "journal", "bpfbroker.catalog"))
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, event := range []Event{GrantMade, GrantExpired, GrantRevoked, GrantProcessEnded, GrantNarrowed, GrantsKept, GrantUndone, RequestRefused, ProgramLoaded, GuardDenied,
		ObjectLoaded, ObjectUnloaded, ObjectFailed, ObjectOpened, ObjectsMounted, ObjectRefused, EventsLost, LimitExceeded} {
		want = append(want, event.id)
	}
	var got []string
	for _, match := range regexp.MustCompile(`(?m)^-- ([0-9a-f]{32})\nSubject: .+\nDefined-By: bpfbroker\n`).FindAllStringSubmatch(string(data), -1) {
		got = append(got, match[1])
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the events, and the entries of the catalog: %s", diff)
	}
	if entries := strings.Count(string(data), "\n-- "); entries != len(want) {
		t.Errorf("%d entries for %d events", entries, len(want))
	}

	var keys []string
	for _, key := range []string{KeyGrant, KeyProfile, KeyTier, KeyOwner, KeyProcess, KeyUnit, KeyTarget, KeyLayer, KeyReason, KeyBy, KeyKill, KeyLimit, KeyNotEnforced, KeyGrants, KeyUID, KeyCommand, KeyProgram, KeyTag, KeySetting,
		KeyObject, KeyFile, KeyMap, KeyAccess, KeyPath, KeyLost} {
		keys = append(keys, fieldName(key))
	}
	var used []string
	for _, match := range regexp.MustCompile(`@([A-Z_]+)@`).FindAllStringSubmatch(string(data), -1) {
		used = append(used, match[1])
	}
	slices.Sort(keys)
	slices.Sort(used)
	if diff := cmp.Diff(keys, slices.Compact(used)); diff != "" {
		t.Errorf("the keys, and the fields in the catalog: %s", diff)
	}
}
