// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package guard

import (
	"errors"
	"io/fs"
	"os"
	"testing"
)

// TestUnload is the last test, by the name of its file: it ends the guard that all
// of them have used.
func TestUnload(t *testing.T) {
	open(t).Close()
	current = nil
	if err := Unload(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is there: %v", dir, err)
	}
}
