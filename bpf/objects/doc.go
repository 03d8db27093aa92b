// SPDX-License-Identifier: Apache-2.0

// Package objects holds the objects that are shipped, in C and as what clang
// makes of it. Nothing is built from the Go here: it is for their tests.
package objects
