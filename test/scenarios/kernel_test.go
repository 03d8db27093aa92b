// SPDX-License-Identifier: Apache-2.0

//go:build kernels

package scenarios

// kernel is what the machine runs. LSM programs and kprobes work there, so
// tests that need them have the build tag "kernels", too.
const kernel = "7.2"
