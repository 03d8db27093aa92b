// SPDX-License-Identifier: Apache-2.0

// Package journal writes slog's records to the systemd journal, with a field for
// each attribute.
package journal

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"unicode"

	"github.com/coreos/go-systemd/v22/journal"
)

const (
	// fieldPrefix sets our fields apart from the journal's own.
	fieldPrefix = "BPFBROKER_"
	// messageID is the attribute, and the field, that says which event a record is.
	messageID = "MESSAGE_ID"

	// maxFields and maxValue (bytes) keep a record within one datagram, whatever
	// a peer puts into names and paths. journald takes no longer names than maxName.
	maxFields = 32
	maxValue  = 4096
	maxName   = 64
)

// NewHandler returns a handler for records from level on. They go to the journal
// by its native protocol if standard error is connected to it ($JOURNAL_STREAM),
// or else as text to standard error. An attribute "target" becomes the field
// BPFBROKER_TARGET, in a group "peer" it is BPFBROKER_PEER_TARGET; MESSAGE_ID
// stays as it is. The attributes stand in MESSAGE too, as key=value. Values are
// cut at 4096 bytes, and a record has 32 attributes at most.
func NewHandler(level slog.Leveler) slog.Handler {
	// An unreadable $JOURNAL_STREAM isn't a journal.
	if connected, err := journal.StderrIsJournalStream(); err != nil || !connected {
		return slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})
	}
	return &handler{level: level}
}

type handler struct {
	level  slog.Leveler
	group  string // with a dot at the end, or empty
	fields []field
}

type field struct{ key, value string }

func (h *handler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level.Level()
}

func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	with := *h
	with.group += name + "."
	return &with
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.fields = with.fields[:len(h.fields):len(h.fields)]
	for _, attr := range attrs {
		with.fields = appendField(with.fields, h.group, attr)
	}
	return &with
}

func (h *handler) Handle(_ context.Context, record slog.Record) error {
	fields := h.fields[:len(h.fields):len(h.fields)]
	record.Attrs(func(attr slog.Attr) bool {
		fields = appendField(fields, h.group, attr)
		return true
	})
	vars := make(map[string]string, len(fields))
	message := new(strings.Builder)
	message.WriteString(record.Message)
	for _, field := range fields {
		vars[fieldName(field.key)] = field.value
		if field.key != messageID {
			fmt.Fprintf(message, " %s=%s", field.key, quoted(field.value))
		}
	}
	return journal.Send(clean(message.String()), priority(record.Level), vars)
}

// appendField adds an attribute, or those in it if it is a group.
func appendField(fields []field, group string, attr slog.Attr) []field {
	value := attr.Value.Resolve()
	if value.Kind() == slog.KindGroup {
		if attr.Key != "" {
			group += attr.Key + "."
		}
		for _, member := range value.Group() {
			fields = appendField(fields, group, member)
		}
		return fields
	}
	if attr.Equal(slog.Attr{}) || len(fields) == maxFields {
		return fields
	}
	key := group + attr.Key
	if attr.Key == messageID {
		key = messageID
	}
	return append(fields, field{key, clean(value.String())})
}

// clean cuts a text to its bound, and makes it UTF-8.
func clean(text string) string {
	const cut = "…"
	if len(text) > maxValue {
		text = strings.ToValidUTF8(text[:maxValue-len(cut)], "") + cut
	}
	return strings.ToValidUTF8(text, "\ufffd")
}

// quoted gives a value for MESSAGE so that it can't be taken for other
// attributes, or do anything to a terminal.
func quoted(value string) string {
	plain := func(r rune) bool { return r != ' ' && r != '"' && r != '=' && unicode.IsPrint(r) }
	if value != "" && strings.IndexFunc(value, func(r rune) bool { return !plain(r) }) < 0 {
		return value
	}
	return strconv.Quote(value)
}

// fieldName makes a field's name of an attribute's key.
func fieldName(key string) string {
	if key == messageID {
		return messageID
	}
	name := fieldPrefix + strings.Map(func(r rune) rune {
		switch {
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		default:
			return '_'
		}
	}, key)
	return name[:min(len(name), maxName)]
}

func priority(level slog.Level) journal.Priority {
	switch {
	case level >= slog.LevelError:
		return journal.PriErr
	case level >= slog.LevelWarn:
		return journal.PriWarning
	case level >= slog.LevelInfo:
		return journal.PriInfo
	default:
		return journal.PriDebug
	}
}
