// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"testing"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// ops are what this package's tests tell their processes to do.
var ops = map[string]testtarget.Op{}

func startHelpers() error {
	return StartHelpers(func() { panic("no helpers any more") })
}

func TestMain(m *testing.M) {
	testtarget.Main(m, ops, startHelpers)
}
