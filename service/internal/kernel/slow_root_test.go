// SPDX-License-Identifier: Apache-2.0

//go:build root && kernels

package kernel

// rounds is what an emulated processor does in good time.
const rounds = 10
