// SPDX-License-Identifier: Apache-2.0

package varlink

import (
	"errors"
	"fmt"
	"testing"

	"github.com/bpfbroker/bpfbroker/service/internal/kernel"
)

// What no machine at hand can be made to do has its name all the same.
func TestErrorsOfTheKernel(t *testing.T) {
	for err, name := range map[error]string{kernel.ErrTokenMismatch: "NotDelegatable", kernel.ErrTargetHangs: "TargetHangs"} {
		var e *Error
		if refused := refusal(fmt.Errorf("x: %w", err)); !errors.As(refused, &e) || e.Name != brokerInterface+"."+name {
			t.Errorf("%v: got %v", err, refused)
		}
	}
}
