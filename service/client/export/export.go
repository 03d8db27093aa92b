// SPDX-License-Identifier: Apache-2.0

// Package export serves published maps as OpenMetrics, for Prometheus and its
// like.
//
// An entry's key becomes labels, one for each part of it; each integer in its
// value becomes a metric, whose name is that of the object, the map and the
// part. A part whose type is a typedef "counter" or "gauge" is such a metric, any
// other one is of unknown type. A struct with an array "slots" is a histogram by
// powers of two, with its "sum" beside it. Figures of _ns, _us and _ms are in
// seconds. What the processors have in a per-CPU map is added up.
package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"github.com/bpfbroker/bpfbroker/service/client"
	"github.com/bpfbroker/bpfbroker/service/client/typed"
)

// Limits of a scrape. What is beyond the first two is left out.
const (
	maxEntries = 20000           // of all maps together
	maxSamples = 200000          // lines, of all maps together
	maxLabel   = 256             // bytes of a label's value, then it is cut
	maxTime    = 5 * time.Second // reading maps
)

const (
	// renewal is how long an opened map is used before it is opened again: the
	// object may be another one by then, or the right to it gone.
	renewal = time.Minute
	// retry is how long none is tried to be opened after a failure.
	retry = 5 * time.Second
	// openTime bounds the opening of a map.
	openTime = 10 * time.Second
)

// Map names a map of an object.
type Map struct{ Object, Name string }

// Exporter reads maps. Its methods may be called from several goroutines.
type Exporter struct {
	open    func(context.Context, Map) (*client.Table, error)
	sources []*source
}

// source is a map that is exported.
type source struct {
	Map
	mu    sync.Mutex // guards what follows, and is held while the map is read
	table *client.Table
	plan  *plan
	due   time.Time // when it is opened again
}

// New opens maps by open, now and again later. The caller closes the Exporter.
func New(ctx context.Context, open func(context.Context, Map) (*client.Table, error), maps []Map) (*Exporter, error) {
	e := &Exporter{open: open}
	seen := map[string]Map{}
	for _, f := range newOwn() {
		seen[f.GetName()] = Map{"bpfbroker", "export"}
	}
	for _, m := range maps {
		s := &source{Map: m}
		e.sources = append(e.sources, s)
		if err := s.renew(ctx, open); err != nil {
			e.Close()
			return nil, err
		}
		for _, f := range s.plan.families {
			if other, ok := seen[f.name]; ok {
				e.Close()
				return nil, fmt.Errorf("cannot export %s/%s: %s/%s has a metric %s too", m.Object, m.Name, other.Object, other.Name, f.name)
			}
			seen[f.name] = m
		}
	}
	return e, nil
}

// Close closes the maps.
func (e *Exporter) Close() {
	for _, s := range e.sources {
		s.mu.Lock()
		s.drop()
		s.mu.Unlock()
	}
}

func (s *source) drop() {
	if s.table != nil {
		_ = s.table.Close()
	}
	s.table = nil
}

// renew opens the map.
func (s *source) renew(ctx context.Context, open func(context.Context, Map) (*client.Table, error)) error {
	table, err := open(ctx, s.Map)
	if err != nil {
		return err
	}
	p, err := newPlan(s.Object, s.Name, table)
	if err != nil {
		_ = table.Close()
		return fmt.Errorf("cannot export %s/%s: %w", s.Object, s.Name, err)
	}
	if s.plan != nil && !sameNames(s.plan, p) {
		_ = table.Close()
		return fmt.Errorf("cannot export %s/%s: it has other figures than before", s.Object, s.Name)
	}
	s.drop()
	s.table, s.plan, s.due = table, p, time.Now().Add(renewal)
	return nil
}

// sameNames says whether the metrics are still the same: others could be
// another map's.
func sameNames(a, b *plan) bool {
	if len(a.families) != len(b.families) {
		return false
	}
	for i, f := range a.families {
		if f.name != b.families[i].name || f.kind != b.families[i].kind {
			return false
		}
	}
	return true
}

// ready opens the map if that is due. An open one is used until somebody says
// no: a broker that can't be reached comes back.
func (s *source) ready(open func(context.Context, Map) (*client.Table, error)) {
	if time.Now().Before(s.due) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), openTime)
	defer cancel()
	err := s.renew(ctx, open)
	if err == nil {
		return
	}
	slog.Warn("cannot open a map again", "map", s.Object+"/"+s.Name, "error", err)
	s.due = time.Now().Add(retry)
	if !errors.Is(err, client.ErrUnreachable) {
		s.drop()
	}
}

// scrape is one reading of all maps.
type scrape struct {
	start            time.Time
	entries, samples int
}

// Gather reads the maps: a prometheus.Gatherer. There is no error: what couldn't
// be read is said by metrics.
func (e *Exporter) Gather() ([]*dto.MetricFamily, error) {
	g := &scrape{start: time.Now()}
	own := newOwn()
	families := own
	for _, s := range e.sources {
		read, entries, err := s.read(g, e.open)
		if entries > 0 { // a family without metrics can't be written
			families = append(families, read...)
		}
		up, complete := !errors.Is(err, errNotOpen), err == nil
		if err != nil && up && !errors.Is(err, errIncomplete) {
			slog.Warn("cannot read a map", "map", s.Object+"/"+s.Name, "error", err)
		}
		labels := []*dto.LabelPair{{Name: proto.String("map"), Value: proto.String(s.Name)}, {Name: proto.String("object"), Value: proto.String(s.Object)}}
		for i, v := range []float64{b2f(up), b2f(complete), float64(entries)} {
			own[i].Metric = append(own[i].Metric, &dto.Metric{Label: labels, Gauge: &dto.Gauge{Value: proto.Float64(v)}})
		}
	}
	return families, nil
}

// newOwn are the metrics about the maps themselves.
func newOwn() (own []*dto.MetricFamily) {
	for _, m := range [][2]string{
		{"bpfbroker_export_up", "Whether the map could be opened."},
		{"bpfbroker_export_complete", "Whether all of its entries are here."},
		{"bpfbroker_export_entries", "How many of its entries are here."},
	} {
		own = append(own, &dto.MetricFamily{Name: proto.String(m[0]), Help: proto.String(m[1]), Type: dto.MetricType_GAUGE.Enum()})
	}
	return own
}

func b2f(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

var (
	errNotOpen = errors.New("the map is not open")
	// errIncomplete says that a limit was reached, or two entries had the same
	// labels.
	errIncomplete = errors.New("some entries are left out")
)

// read makes metrics of the map's entries, as far as the limits go.
func (s *source) read(g *scrape, open func(context.Context, Map) (*client.Table, error)) (families []*dto.MetricFamily, n int, incomplete error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready(open)
	if s.table == nil {
		return nil, 0, errNotOpen
	}
	m := newMaker(s.plan)
	for entry, err := range typed.Entries(s.table.Map) {
		switch {
		case err != nil:
			return m.families, n, err
		case g.entries >= maxEntries, g.samples+m.samples > maxSamples, g.entries%256 == 255 && time.Since(g.start) > maxTime:
			return m.families, n, errIncomplete
		}
		g.entries++
		g.samples += m.samples
		if m.add(entry) {
			n++
		} else {
			incomplete = errIncomplete
		}
	}
	return m.families, n, incomplete
}

// maker makes metrics.
type maker struct {
	plan     *plan
	families []*dto.MetricFamily
	samples  int // lines of an entry
	names    []*string
	seen     map[string]struct{}
	key      []byte // labels' values of the entry that is being added
	indexes  []*dto.LabelPair
}

func newMaker(p *plan) *maker {
	m := &maker{plan: p, seen: make(map[string]struct{})}
	for _, l := range p.labels {
		m.names = append(m.names, proto.String(l.name))
	}
	for _, f := range p.families {
		family := &dto.MetricFamily{Name: &f.name, Help: &f.help, Type: f.kind.Enum()}
		if f.unit != "" {
			family.Unit = &f.unit
		}
		m.families = append(m.families, family)
		switch {
		case f.histogram != nil:
			m.samples += f.histogram.slots + 2
		default:
			m.samples += max(f.list, 1)
		}
		for i := len(m.indexes); i < f.list; i++ {
			m.indexes = append(m.indexes, &dto.LabelPair{Name: proto.String("index"), Value: proto.String(fmt.Sprint(i))})
		}
	}
	return m
}

// add makes metrics of an entry. It says no if there is one with its labels
// already: a scrape with both would be refused as a whole.
func (m *maker) add(e typed.Entry) bool {
	labels := m.labels(e.Key)
	if labels == nil {
		return false
	}
	for i, f := range m.plan.families {
		to := m.families[i]
		switch {
		case f.histogram != nil:
			to.Metric = append(to.Metric, &dto.Metric{Label: labels, Histogram: f.histogram.read(e.Values, f.divisor)})
		case f.list > 0:
			for i := range f.list {
				label := append(labels[:len(labels):len(labels)], m.indexes[i])
				to.Metric = append(to.Metric, f.number(label, e.Values, f.offset+i*f.typ.Size))
			}
		default:
			to.Metric = append(to.Metric, f.number(labels, e.Values, f.offset))
		}
	}
	return true
}

// labels are those of a key, nil if there were some like them.
func (m *maker) labels(key []byte) []*dto.LabelPair {
	m.key = m.key[:0]
	ends := make([]int, 0, maxLabels)
	for _, l := range m.plan.labels {
		start := len(m.key)
		m.key = l.typ.AppendText(m.key, key[l.offset:])
		if len(m.key)-start > maxLabel {
			cut := start + maxLabel
			for cut > start && !utf8.RuneStart(m.key[cut]) {
				cut--
			}
			m.key = m.key[:cut]
		}
		ends = append(ends, len(m.key))
		m.key = append(m.key, 0xff) // it is in no UTF-8
	}
	text := string(m.key)
	if _, ok := m.seen[text]; ok {
		return nil
	}
	m.seen[text] = struct{}{}
	// One allocation for what lives as long.
	pairs := make([]struct {
		pair  dto.LabelPair
		value string
	}, len(ends))
	labels := make([]*dto.LabelPair, len(ends), len(ends)+1)
	start := 0
	for i, end := range ends {
		p := &pairs[i]
		p.value = text[start:end]
		p.pair.Name, p.pair.Value = m.names[i], &p.value
		labels[i] = &p.pair
		start = end + 1
	}
	return labels
}

// number makes a metric of the sum of numbers at offset.
func (f *family) number(labels []*dto.LabelPair, values [][]byte, offset int) *dto.Metric {
	m := &struct {
		metric  dto.Metric
		counter dto.Counter
		gauge   dto.Gauge
		untyped dto.Untyped
		value   float64
	}{}
	m.metric.Label = labels
	m.value = total(f.typ, values, offset) / f.divisor
	switch f.kind {
	case dto.MetricType_COUNTER:
		m.counter.Value = &m.value
		m.metric.Counter = &m.counter
	case dto.MetricType_GAUGE:
		m.gauge.Value = &m.value
		m.metric.Gauge = &m.gauge
	default:
		m.untyped.Value = &m.value
		m.metric.Untyped = &m.untyped
	}
	return &m.metric
}

// total adds up what the processors have.
func total(t *typed.Type, values [][]byte, offset int) float64 {
	if t.Kind == typed.Float {
		var sum float64
		for _, v := range values {
			sum += t.Float(v[offset:])
		}
		return sum
	}
	sum := count(t, values, offset)
	if t.Signed {
		return float64(int64(sum))
	}
	return float64(sum)
}

func count(t *typed.Type, values [][]byte, offset int) (sum uint64) {
	for _, v := range values {
		sum += t.Uint(v[offset:])
	}
	return sum
}

func (h *histogram) read(values [][]byte, divisor float64) *dto.Histogram {
	out := &dto.Histogram{Bucket: make([]*dto.Bucket, len(h.bounds))}
	buckets := make([]struct {
		bucket dto.Bucket
		count  uint64
	}, h.slots)
	var n uint64
	for i := range buckets {
		n += count(h.slot, values, h.offset+i*h.slot.Size)
		b := &buckets[i]
		b.count = n
		if i == len(h.bounds) {
			break // the last slot has whatever is larger: +Inf
		}
		b.bucket.UpperBound, b.bucket.CumulativeCount = &h.bounds[i], &b.count
		out.Bucket[i] = &b.bucket
	}
	out.SampleCount = &buckets[len(buckets)-1].count
	sum := math.NaN()
	if h.sum != nil {
		sum = float64(count(h.sum, values, h.sumAt)) / divisor
	}
	out.SampleSum = &sum
	return out
}
