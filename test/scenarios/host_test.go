// SPDX-License-Identifier: Apache-2.0

//go:build !kernels

package scenarios

// kernel is what the machine runs: the host's.
const kernel = ""
