// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/bpfbroker/bpfbroker/service/internal/config"
)

func setLease(p *Profile, _ config.Source, value string) error {
	if value == "" || value == "infinity" {
		p.Lease = 0
		return nil
	}
	d, err := config.ParseSpan(value)
	if err != nil {
		return err
	}
	if d < time.Second {
		return errors.New("shorter than a second")
	}
	p.Lease = d
	return nil
}

func setCount(field func(*Profile) *int) setter {
	return func(p *Profile, _ config.Source, value string) error {
		if value == "" {
			*field(p) = 0
			return nil
		}
		n, err := strconv.ParseUint(value, 10, 31)
		if err != nil || n == 0 {
			return fmt.Errorf("%.64q is no number from 1 to %d", value, math.MaxInt32)
		}
		*field(p) = int(n)
		return nil
	}
}

func setMapBytes(p *Profile, _ config.Source, value string) error {
	if value == "" {
		p.MaxMapBytes = 0
		return nil
	}
	size, err := config.ParseSize(value)
	if err != nil {
		return err
	}
	p.MaxMapBytes = size
	return nil
}
