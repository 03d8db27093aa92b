// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the guard's BPF programs, as service/internal/guard loads
// them. What is generated is committed: only who changes the C needs clang.
package bpf

import (
	"crypto/sha256"
	"encoding/hex"
)

// BPF_OUT is another directory to write to.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -no-global-types -output-dir $BPF_OUT -type grant -type usage -type lesson -type object -type event -type slip -target bpfel Guard guard.bpf.c -- -O2 -mcpu=v3 -Wall -Werror -Wno-unused-function

// Version tells this guard's programs from those of another build.
func Version() string {
	sum := sha256.Sum256(_GuardBytes)
	return hex.EncodeToString(sum[:8])
}
