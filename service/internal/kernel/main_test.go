// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"testing"

	"github.com/bpfbroker/bpfbroker/service/internal/testtarget"
)

// ops are what this package's tests tell their processes to do.
var ops = map[string]testtarget.Op{}

func TestMain(m *testing.M) {
	if err := ReserveDescriptors(); err != nil {
		panic(err)
	}
	testtarget.Main(m, ops)
}
