// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"fmt"
	"testing"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// What no machine at hand can be made to do has its name and its text all the same.
func TestErrorsOfTheKernel(t *testing.T) {
	for _, test := range []struct {
		err        error
		name, text string
	}{
		{kernel.ErrTokenMismatch, "NotDelegatable", "x: the kernel delegates something else than was asked for (refused by kernel; remedy: report the kernel and the profile)"},
		{kernel.ErrTargetHangs, "TargetHangs", "x: the target does not answer (refused by target; remedy: name a path outside of file systems that don't answer)"},
	} {
		err := fmt.Errorf("x: %w", test.err)
		if name, text := errorName(err), errorText(err); name != errorPrefix+test.name || text != test.text {
			t.Errorf("got %s: %s", name, text)
		}
	}
}
