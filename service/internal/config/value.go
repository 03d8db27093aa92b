// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// MaxDescription is how long a description may be, in bytes.
const MaxDescription = 256

// CheckDescription says what keeps a text from being shown on terminals and by
// polkit: no escapes, no reordering of text.
func CheckDescription(value string) error {
	if strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return errors.New("not printable")
	}
	if len(value) > MaxDescription {
		return fmt.Errorf("longer than %d bytes", MaxDescription)
	}
	return nil
}

// Words splits a list at white space, or at systemd's commas.
func Words(value string) []string {
	return strings.FieldsFunc(value, func(r rune) bool { return r == ' ' || r == '\t' || r == ',' })
}

// ParseSize reads a size in bytes, as systemd does: "4096", "64M"; not 0.
func ParseSize(value string) (uint64, error) {
	number, factor := value, uint64(1)
	if i := strings.IndexByte("KMGT", value[len(value)-1]); i >= 0 {
		number, factor = value[:len(value)-1], 1<<(10*(i+1))
	}
	n, err := strconv.ParseUint(number, 10, 64)
	over, size := bits.Mul64(n, factor)
	if err != nil || n == 0 || over != 0 {
		return 0, fmt.Errorf("%.64q is no size: bytes, or with K, M, G or T", value)
	}
	return size, nil
}

// spanUnits are systemd's, with its lengths of months and years; see
// systemd.time(7).
var spanUnits = map[string]time.Duration{
	"us": time.Microsecond, "usec": time.Microsecond,
	"ms": time.Millisecond, "msec": time.Millisecond,
	"s": time.Second, "sec": time.Second, "second": time.Second, "seconds": time.Second,
	"m": time.Minute, "min": time.Minute, "minute": time.Minute, "minutes": time.Minute,
	"h": time.Hour, "hr": time.Hour, "hour": time.Hour, "hours": time.Hour,
	"d": 24 * time.Hour, "day": 24 * time.Hour, "days": 24 * time.Hour,
	"w": 168 * time.Hour, "week": 168 * time.Hour, "weeks": 168 * time.Hour,
	"M": 2629800 * time.Second, "month": 2629800 * time.Second, "months": 2629800 * time.Second,
	"y": 31557600 * time.Second, "year": 31557600 * time.Second, "years": 31557600 * time.Second,
}

// ParseSpan reads a time span as systemd does: "8h", "1h 30min", "1.5d"; a
// number alone is seconds.
func ParseSpan(value string) (time.Duration, error) {
	wrong := fmt.Errorf("%.64q is no time span", value)
	rest := value
	if strings.Trim(rest, "0123456789.") == "" {
		rest += "s"
	}
	var sum time.Duration
	for rest != "" {
		number := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789."))]
		rest = strings.TrimLeft(rest[len(number):], " \t")
		name := rest
		if i := strings.IndexAny(rest, "0123456789. \t"); i >= 0 {
			name = rest[:i]
		}
		rest = strings.TrimLeft(rest[len(name):], " \t")

		length, ok := spanUnits[name]
		whole, fraction, _ := strings.Cut(number, ".")
		n, err := strconv.ParseUint(whole, 10, 63)
		over, product := bits.Mul64(n, uint64(length))
		if !ok || err != nil || over != 0 || product > math.MaxInt64 {
			return 0, wrong
		}
		part := time.Duration(product)
		for _, c := range []byte(fraction) {
			if c < '0' || c > '9' {
				return 0, wrong
			}
			length /= 10
			part += time.Duration(c-'0') * length
		}
		sum += part
		// Both were positive, so is their sum unless it overflows.
		if part < 0 || sum < 0 {
			return 0, wrong
		}
	}
	return sum, nil
}

// FormatSpan writes a time span of whole seconds as systemd does: "1h 30min".
func FormatSpan(d time.Duration) string {
	var parts []string
	for _, unit := range []struct {
		length time.Duration
		name   string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "min"}, {time.Second, "s"}} {
		if n := d / unit.length; n > 0 {
			parts = append(parts, strconv.FormatInt(int64(n), 10)+unit.name)
			d -= n * unit.length
		}
	}
	return strings.Join(parts, " ")
}
