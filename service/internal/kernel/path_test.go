// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"strings"
	"testing"
)

func TestValidPath(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/", "/a", "/sys/fs/bpf", "/a/..b/...", "/a b\n/é", "/" + strings.Repeat("a", 4094)} {
		if err := ValidPath(path); err != nil {
			t.Errorf("%.80q: %v", path, err)
		}
	}
	for _, path := range invalidPaths {
		if err := ValidPath(path); !errors.Is(err, ErrPathInvalid) {
			t.Errorf("%.80q: got %v", path, err)
		}
	}
}

var invalidPaths = []string{
	"", ".", "..", "a", "sys/fs/bpf", "./a", "~",
	"/..", "/a/..", "/a/../b", "/./a", "/a/.",
	"//", "//a", "/a//b", "/a/",
	"\x00", "/a\x00", "/\x00b", "/a\x00/b",
	"/" + strings.Repeat("a", 4095), "/" + strings.Repeat("a", 5000), strings.Repeat("/a", 2500),
}
