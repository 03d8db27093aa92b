// SPDX-License-Identifier: Apache-2.0

//go:build !kernels

package scenarios

const (
	kernel = "" // what the machine runs: the host's
	slow   = 1  // how many times as long things take as on a real machine
)
