// SPDX-License-Identifier: Apache-2.0

package export

import (
	"errors"
	"fmt"
	"math"
	"strings"

	dto "github.com/prometheus/client_model/go"

	"github.com/bpfbroker/bpfbroker/service/client"
	"github.com/bpfbroker/bpfbroker/service/client/typed"
)

const (
	maxLabels   = 32
	maxFamilies = 256
	// maxList is how long a list may be whose elements get an "index" each.
	maxList = 64
)

// plan says what is made of a map's entries.
type plan struct {
	labels   []label
	families []*family
}

// label is made of a part of the key.
type label struct {
	name   string
	typ    *typed.Type
	offset int
}

// family is a metric, made of a part of the value.
type family struct {
	name, help, unit string
	kind             dto.MetricType
	typ              *typed.Type // of a number
	offset           int
	divisor          float64
	histogram        *histogram
	list             int // how many numbers there are, each with an "index"; 0: it is no list
}

// histogram is a struct with slots for powers of two.
type histogram struct {
	slot   *typed.Type
	offset int // of the slots
	slots  int
	sum    *typed.Type // nil: there is none
	sumAt  int
	bounds []float64 // of all slots but the last
}

var errNoFigures = errors.New("its values have no figures")

// newPlan finds labels in the key and figures in the value.
func newPlan(object, name string, t *client.Table) (*plan, error) {
	if t.Key == nil {
		return nil, fmt.Errorf("a %v has no entries", t.Type())
	}
	p := &plan{}
	p.addLabels(t.Key, nil, 0)
	p.addFamilies(t.Value, []string{object, name}, 0)
	seen := make(map[string]bool)
	for _, l := range p.labels {
		if seen[l.name] {
			return nil, fmt.Errorf("two parts of its key would be label %q", l.name)
		}
		seen[l.name] = true
	}
	switch {
	case len(p.families) == 0:
		return nil, errNoFigures
	case len(p.labels) > maxLabels:
		return nil, fmt.Errorf("its key has more than %d parts", maxLabels)
	case len(p.families) > maxFamilies:
		return nil, fmt.Errorf("its values have more than %d figures", maxFamilies)
	}
	for _, f := range p.families {
		f.help = "From map " + name + " of object " + object + "."
	}
	return p, nil
}

func (p *plan) addLabels(t *typed.Type, path []string, offset int) {
	if t.Kind != typed.Struct {
		name := metricName(path...)
		switch {
		case len(path) == 0:
			name = "key"
		case name == "le" || name == "quantile" || name == "index" || strings.HasPrefix(name, "__"):
			name = "key_" + strings.TrimLeft(name, "_") // they mean something else
		}
		p.labels = append(p.labels, label{name, t, offset})
		return
	}
	for _, f := range t.Fields {
		p.addLabels(f.Type, append(path[:len(path):len(path)], f.Name), offset+f.Offset)
	}
}

func (p *plan) addFamilies(t *typed.Type, path []string, offset int) {
	switch t.Kind {
	case typed.Integer, typed.Float:
		p.add(&family{typ: t, offset: offset, kind: kindOf(t)}, path)
	case typed.List:
		if (t.Elem.Kind == typed.Integer || t.Elem.Kind == typed.Float) && t.Count > 0 && t.Count <= maxList {
			p.add(&family{typ: t.Elem, offset: offset, list: t.Count, kind: kindOf(t.Elem)}, path)
		}
	case typed.Struct:
		h := newHistogram(t, offset)
		if h != nil {
			p.add(&family{histogram: h, kind: dto.MetricType_HISTOGRAM}, path)
		}
		for _, f := range t.Fields {
			if h == nil || f.Name != "slots" && f.Name != "sum" {
				p.addFamilies(f.Type, append(path[:len(path):len(path)], f.Name), offset+f.Offset)
			}
		}
	}
}

// kindOf is a number's: by its typedef, since BTF doesn't say whether a number
// can become smaller.
func kindOf(t *typed.Type) dto.MetricType {
	switch {
	case t.Kind == typed.Integer && t.Name == "counter":
		return dto.MetricType_COUNTER
	case t.Name == "gauge":
		return dto.MetricType_GAUGE
	}
	return dto.MetricType_UNTYPED
}

// newHistogram returns what a struct with numbers called "slots" is, nil for
// another: slots[i] counts figures from 2^i to 2^(i+1)-1.
func newHistogram(t *typed.Type, offset int) *histogram {
	var h histogram
	for _, f := range t.Fields {
		switch {
		case f.Name == "slots" && f.Type.Kind == typed.List && f.Type.Elem.Kind == typed.Integer && f.Type.Count > 0 && f.Type.Count <= 64:
			h.slot, h.slots, h.offset = f.Type.Elem, f.Type.Count, offset+f.Offset
		case f.Name == "sum" && f.Type.Kind == typed.Integer:
			h.sum, h.sumAt = f.Type, offset+f.Offset
		}
	}
	if h.slots == 0 {
		return nil
	}
	return &h
}

// add gives a family its name, its unit and its divisor, by the last part of the
// name.
func (p *plan) add(f *family, path []string) {
	f.name, f.divisor = strings.TrimSuffix(metricName(path...), "_total"), 1
	switch {
	case strings.HasSuffix(f.name, "_ns"):
		f.name, f.unit, f.divisor = strings.TrimSuffix(f.name, "_ns")+"_seconds", "seconds", 1e9
	case strings.HasSuffix(f.name, "_us"):
		f.name, f.unit, f.divisor = strings.TrimSuffix(f.name, "_us")+"_seconds", "seconds", 1e6
	case strings.HasSuffix(f.name, "_ms"):
		f.name, f.unit, f.divisor = strings.TrimSuffix(f.name, "_ms")+"_seconds", "seconds", 1e3
	case strings.HasSuffix(f.name, "_bytes"):
		f.unit = "bytes"
	}
	if f.kind == dto.MetricType_COUNTER {
		f.name += "_total"
	}
	if h := f.histogram; h != nil {
		for i := range h.slots - 1 {
			h.bounds = append(h.bounds, (math.Ldexp(1, i+1)-1)/f.divisor)
		}
	}
	p.families = append(p.families, f)
}

// metricName joins words to a name as OpenMetrics has them.
func metricName(words ...string) string {
	name := strings.Map(func(r rune) rune {
		if r == '_' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' {
			return r
		}
		return '_'
	}, strings.Join(words, "_"))
	if name == "" || '0' <= name[0] && name[0] <= '9' {
		name = "_" + name
	}
	return name
}
