// SPDX-License-Identifier: Apache-2.0

//go:build root

package export

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/bpfbroker/bpfbroker/service/client"
	"github.com/bpfbroker/bpfbroker/service/client/typed"
)

var (
	u16     = &btf.Int{Name: "unsigned short", Size: 2}
	u32     = &btf.Int{Name: "unsigned int", Size: 4}
	s32     = &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	u64     = &btf.Int{Name: "unsigned long", Size: 8}
	char    = &btf.Int{Name: "char", Size: 1, Encoding: btf.Signed}
	counter = &btf.Typedef{Name: "counter", Type: u64}
)

func array(t btf.Type, n uint32) btf.Type { return &btf.Array{Index: u32, Type: t, Nelems: n} }

func member(name string, t btf.Type, offset int) btf.Member {
	return btf.Member{Name: name, Type: t, Offset: btf.Bits(offset * 8)}
}

func structure(size uint32, members ...btf.Member) *btf.Struct {
	return &btf.Struct{Name: "s", Size: size, Members: members}
}

// table makes a map with types.
func table(t testing.TB, kind ebpf.MapType, entries uint32, key, value btf.Type) *client.Table {
	t.Helper()
	var sizes [2]uint32
	var types [2]*typed.Type
	for i, typ := range []btf.Type{key, value} {
		size, err := btf.Sizeof(typ)
		if err != nil {
			t.Fatal(err)
		}
		sizes[i] = uint32(size)
		if types[i], err = typed.New(typ, size); err != nil {
			t.Fatal(err)
		}
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: kind, KeySize: sizes[0], ValueSize: sizes[1], MaxEntries: entries})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return &client.Table{Map: m, Key: types[0], Value: types[1]}
}

// opener is a broker's way to hand tables out.
func opener(tables map[string]*client.Table) func(context.Context, Map) (*client.Table, error) {
	return func(_ context.Context, m Map) (*client.Table, error) {
		t := tables[m.Object+"/"+m.Name]
		if t == nil {
			return nil, &client.Error{Name: "NoSuchMap", Reason: "no such map", Layer: "request"}
		}
		clone, err := t.Clone()
		if err != nil {
			return nil, err
		}
		return &client.Table{Map: clone, Key: t.Key, Value: t.Value}, nil
	}
}

func newExporter(t testing.TB, tables map[string]*client.Table) *Exporter {
	t.Helper()
	var maps []Map
	for name := range tables {
		object, name, _ := strings.Cut(name, "/")
		maps = append(maps, Map{object, name})
	}
	slices.SortFunc(maps, func(a, b Map) int { return strings.Compare(a.Object+a.Name, b.Object+b.Name) })
	e, err := New(t.Context(), opener(tables), maps)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return e
}

const openMetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8"

func get(t testing.TB, url, accept string) (int, string, http.Header) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Accept", accept)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body), response.Header
}

// serve starts a server on a port of its own.
func serve(t testing.TB, e *Exporter) string {
	t.Helper()
	l, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- e.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String() + "/metrics"
}

var (
	flowKey = structure(24,
		member("color", &btf.Enum{Size: 4, Values: []btf.EnumValue{{Name: "RED", Value: 1}}}, 0),
		member("name", array(char, 4), 4),
		member("inner", structure(4, member("port", &btf.Typedef{Name: "__be16", Type: u16}, 0)), 8),
		member("le", s32, 12),
		member("padding", array(u32, 2), 16),
	)
	flowValue = structure(88,
		member("packets", counter, 0),
		member("packets_bytes_total", counter, 8),
		member("level", &btf.Typedef{Name: "gauge", Type: s32}, 16),
		member("port", u16, 20),
		member("state", &btf.Enum{Size: 2}, 22),
		member("duration_ns", structure(40, member("slots", array(u64, 4), 0), member("sum", u64, 32)), 24),
		member("queue", array(u32, 2), 64),
		member("comm", array(char, 16), 72),
	)
)

func flow(color uint32, name string, port uint16) []byte {
	key := make([]byte, 24)
	binary.NativeEndian.PutUint32(key, color)
	copy(key[4:], name)
	binary.BigEndian.PutUint16(key[8:], port)
	binary.NativeEndian.PutUint32(key[12:], math.MaxUint32)
	return key
}

func flowFigures(n uint64) []byte {
	value := make([]byte, 88)
	for offset, v := range map[int]uint64{0: n, 8: 2 * n, 24: 1, 32: 2, 40: 0, 48: 4, 56: 1000 * n} {
		binary.NativeEndian.PutUint64(value[offset:], v)
	}
	binary.NativeEndian.PutUint32(value[16:], uint32(0xfffffffb)) // -5
	binary.NativeEndian.PutUint16(value[20:], 443)
	binary.NativeEndian.PutUint32(value[68:], 9)
	copy(value[72:], "comm")
	return value
}

// TestScrape has a map scraped, and the answer read by client_golang's parser
// and linter.
func TestScrape(t *testing.T) {
	flows := table(t, ebpf.Hash, 10, flowKey, flowValue)
	perCPU := table(t, ebpf.PerCPUHash, 10, u32, counter)
	if err := flows.Put(flow(1, "a\"\n\\", 443), flowFigures(1<<40)); err != nil {
		t.Fatal(err)
	}
	if err := flows.Put(flow(7, "\xff\xfe", 80), flowFigures(3)); err != nil {
		t.Fatal(err)
	}
	cpus := make([]uint64, ebpf.MustPossibleCPU())
	for i := range cpus {
		cpus[i] = 5
	}
	if err := perCPU.Put(uint32(3), cpus); err != nil {
		t.Fatal(err)
	}
	empty := table(t, ebpf.Hash, 10, u32, u64)
	url := serve(t, newExporter(t, map[string]*client.Table{"net-flows/table": flows, "cpu/n": perCPU, "empty/n": empty}))

	status, body, header := get(t, url, openMetrics)
	if status != http.StatusOK || !strings.HasPrefix(header.Get("Content-Type"), "application/openmetrics-text") {
		t.Errorf("status %d, type %q", status, header.Get("Content-Type"))
	}
	sum := 5 * len(cpus)
	for _, want := range []string{
		"# TYPE net_flows_table_packets counter\n",
		`net_flows_table_packets_total{color="RED",name="a\"\n\\",inner_port="443",key_le="-1",padding="[0,0]"} 1.099511627776e+12` + "\n",
		`net_flows_table_packets_total{color="7",name="\\xff\\xfe",inner_port="80",key_le="-1",padding="[0,0]"} 3.0` + "\n",
		`net_flows_table_packets_bytes_total{color="7",name="\\xff\\xfe",inner_port="80",key_le="-1",padding="[0,0]"} 6.0` + "\n",
		"# TYPE net_flows_table_level gauge\n",
		`padding="[0,0]"} -5.0` + "\n",
		"# TYPE net_flows_table_port unknown\n",
		"# TYPE net_flows_table_duration_seconds histogram\n",
		`net_flows_table_duration_seconds_bucket{color="7",name="\\xff\\xfe",inner_port="80",key_le="-1",padding="[0,0]",le="1e-09"} 1` + "\n",
		`net_flows_table_duration_seconds_bucket{color="7",name="\\xff\\xfe",inner_port="80",key_le="-1",padding="[0,0]",le="3e-09"} 3` + "\n",
		`padding="[0,0]",le="+Inf"} 7` + "\n",
		`net_flows_table_duration_seconds_count{color="7",name="\\xff\\xfe",inner_port="80",key_le="-1",padding="[0,0]"} 7` + "\n",
		`net_flows_table_duration_seconds_sum{color="7",name="\\xff\\xfe",inner_port="80",key_le="-1",padding="[0,0]"} 3e-06` + "\n",
		`net_flows_table_queue{color="7",name="\\xff\\xfe",inner_port="80",key_le="-1",padding="[0,0]",index="1"} 9.0` + "\n",
		"cpu_n_total{key=\"3\"} " + fmt.Sprint(sum) + ".0\n",
		`bpfbroker_export_up{map="table",object="net-flows"} 1.0` + "\n",
		`bpfbroker_export_complete{map="n",object="empty"} 1.0` + "\n",
		`bpfbroker_export_entries{map="table",object="net-flows"} 2.0` + "\n",
		`bpfbroker_export_entries{map="n",object="empty"} 0.0` + "\n",
		"# EOF\n",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %q", want)
		}
	}
	for _, unwanted := range []string{"comm", "state", "empty_n"} {
		if strings.Contains(body, "net_flows_table_"+unwanted) || strings.Contains(body, "\n"+unwanted) {
			t.Errorf("there is a metric %s", unwanted)
		}
	}
	if t.Failed() {
		t.Log(body)
	}

	_, body, _ = get(t, url, "text/plain")
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if len(families) != 10 {
		t.Errorf("%d families", len(families))
	}
	for _, m := range families["net_flows_table_packets_total"].GetMetric() {
		if len(m.GetLabel()) != 5 || m.GetCounter() == nil {
			t.Errorf("got %v", m)
		}
	}
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for path, want := range map[string]int{"/": 404, "/metrics/x": 404} {
		if status, _, _ := get(t, strings.TrimSuffix(url, "/metrics")+path, ""); status != want {
			t.Errorf("%s: status %d, want %d", path, status, want)
		}
	}
}

func samples(t *testing.T, e *Exporter, name string) []*dto.Metric {
	t.Helper()
	families, err := e.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()
		}
	}
	return nil
}

// own returns the metrics about the first map: up, complete, entries.
func own(t *testing.T, e *Exporter) (values []float64) {
	t.Helper()
	for _, name := range []string{"up", "complete", "entries"} {
		values = append(values, samples(t, e, "bpfbroker_export_"+name)[0].GetGauge().GetValue())
	}
	return values
}

// What would make a scrape too long, or have it refused.
func TestHostileMaps(t *testing.T) {
	t.Run("entries", func(t *testing.T) {
		m := table(t, ebpf.Array, maxEntries+5, u32, u64)
		e := newExporter(t, map[string]*client.Table{"o/m": m, "o/n": m})
		if diff := cmp.Diff([]float64{1, 0, maxEntries}, own(t, e)); diff != "" {
			t.Error(diff)
		}
		if n := samples(t, e, "bpfbroker_export_entries")[1].GetGauge().GetValue(); n != 0 {
			t.Errorf("%v entries more", n)
		}
	})
	t.Run("samples", func(t *testing.T) {
		m := table(t, ebpf.Array, maxEntries, u32, array(u64, maxList))
		e := newExporter(t, map[string]*client.Table{"o/m": m})
		if diff := cmp.Diff([]float64{1, 0, maxSamples / maxList}, own(t, e)); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("labels that are the same", func(t *testing.T) {
		m := table(t, ebpf.Hash, 1000, array(char, 300), u64)
		for i := range 500 {
			key := []byte(strings.Repeat("é", 150))
			binary.NativeEndian.PutUint32(key[296:], uint32(i))
			if err := m.Put(key, uint64(1)); err != nil {
				t.Fatal(err)
			}
		}
		e := newExporter(t, map[string]*client.Table{"o/m": m})
		if diff := cmp.Diff([]float64{1, 0, 1}, own(t, e)); diff != "" {
			t.Error(diff)
		}
		if label := samples(t, e, "o_m")[0].GetLabel()[0].GetValue(); label != strings.Repeat("é", maxLabel/2) {
			t.Errorf("label %q", label)
		}
	})
	t.Run("types", func(t *testing.T) {
		deep := structure(4, member("a", u32, 0))
		for range 20 {
			deep = structure(deep.Size*2, member("a", deep, 0), member("b", deep, int(deep.Size)))
			if deep.Size > 1024 {
				break
			}
		}
		for name, m := range map[string]*client.Table{
			"labels":            table(t, ebpf.Hash, 1, deep, u64),
			"families":          table(t, ebpf.Hash, 1, u32, deep),
			"no figures":        table(t, ebpf.Hash, 1, u32, array(char, 8)),
			"names that meet":   table(t, ebpf.Hash, 1, structure(8, member("a_b", u32, 0), member("a", structure(4, member("b", u32, 0)), 4)), u64),
			"figures that meet": table(t, ebpf.Hash, 1, u32, structure(8, member("a_b", u32, 0), member("a", structure(4, member("b", u32, 0)), 4))),
		} {
			if e, err := New(t.Context(), opener(map[string]*client.Table{"o/m": m}), []Map{{"o", "m"}}); err == nil {
				e.Close()
				t.Errorf("%s: exported", name)
			}
		}
		same := table(t, ebpf.Hash, 1, u32, u64)
		for _, maps := range [][]Map{{{"a", "b_c"}, {"a_b", "c"}}, {{"a", "b"}, {"a", "b"}}, {{"bpfbroker", "export_up"}}} {
			tables := map[string]*client.Table{}
			for _, m := range maps {
				tables[m.Object+"/"+m.Name] = same
			}
			if e, err := New(t.Context(), opener(tables), maps); err == nil {
				e.Close()
				t.Errorf("exported %v", maps)
			}
		}
	})
}

// The map is opened again from time to time: it can be another one by then, or
// the right to it may be gone.
func TestRenewal(t *testing.T) {
	first, second := table(t, ebpf.Array, 1, u32, u64), table(t, ebpf.Array, 2, u32, u64)
	other := table(t, ebpf.Array, 1, u32, counter)
	synctest.Test(t, func(t *testing.T) {
		tables := map[string]*client.Table{"o/m": first}
		var failure error
		e, err := New(t.Context(), func(ctx context.Context, m Map) (*client.Table, error) {
			if failure != nil {
				return nil, failure
			}
			return opener(tables)(ctx, m)
		}, []Map{{"o", "m"}})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		for _, step := range []struct {
			wait    time.Duration
			table   *client.Table
			failure error
			want    []float64
		}{
			{renewal / 2, second, nil, []float64{1, 1, 1}},
			{renewal / 2, second, nil, []float64{1, 1, 2}},
			{renewal, first, client.ErrUnreachable, []float64{1, 1, 2}},
			{retry, first, nil, []float64{1, 1, 1}},
			{renewal, first, &client.Error{Name: "NotAuthorized"}, []float64{0, 0, 0}},
			{retry / 2, first, nil, []float64{0, 0, 0}},
			{retry / 2, other, nil, []float64{0, 0, 0}}, // it would be another kind of metric
			{retry, first, nil, []float64{1, 1, 1}},
		} {
			time.Sleep(step.wait)
			tables["o/m"], failure = step.table, step.failure
			if diff := cmp.Diff(step.want, own(t, e)); diff != "" {
				t.Error(diff)
			}
		}
	})
}

func TestServer(t *testing.T) {
	m := table(t, ebpf.Array, 1, u32, u64)
	e := newExporter(t, map[string]*client.Table{"o/m": m})
	handler := e.Handler(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9436})
	for host, want := range map[string]int{
		"127.0.0.1:9436": 200, "127.0.0.1": 200, "localhost": 200, "localhost:1": 200, "[::1]:9436": 200, "::1": 200,
		"attacker.example": 421, "attacker.example:9436": 421, "127.0.0.1.attacker.example": 421, "192.0.2.1:9436": 421,
	} {
		request := httptest.NewRequest(http.MethodGet, "/metrics", nil)
		request.Host = host
		recorder := httptest.NewRecorder()
		handler.ServeHTTP(recorder, request)
		if recorder.Code != want {
			t.Errorf("host %q: status %d, want %d", host, recorder.Code, want)
		}
	}

	socket := filepath.Join(t.TempDir(), "s")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	if status, err := os.Stat(socket); err != nil || status.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", status.Mode(), err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- e.Serve(ctx, l) }()
	dial := func() net.Conn {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	// Those who connect and say nothing hold nobody up for longer than it takes
	// to find that out.
	for range maxConnections + 5 {
		dial()
	}
	c := dial()
	_, _ = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: attacker.example\r\n\r\n")
	_ = c.SetReadDeadline(time.Now().Add(3 * requestTime))
	answer, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") {
		t.Errorf("got %.80q, %v", answer, err)
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// BenchmarkScrape compares a scrape over HTTP with a bare iteration of the map: it
// may cost 5 times as much.
func BenchmarkScrape(b *testing.B) {
	const entries = 10_000
	for _, bench := range []struct {
		name  string
		table *client.Table
		fill  func(i uint32) (key, value any)
	}{
		{"number", table(b, ebpf.Hash, entries, u32, u64), func(i uint32) (any, any) { return i, uint64(i) }},
		{"flow", table(b, ebpf.Hash, entries, structure(24,
			member("name", array(char, 16), 0), member("port", u32, 16), member("role", &btf.Enum{Size: 4}, 20)),
			structure(24, member("packets", counter, 0), member("bytes", counter, 8), member("last", u64, 16))),
			func(i uint32) (any, any) {
				return struct {
					Name       [16]byte
					Port, Role uint32
				}{[16]byte{'c', 'o', 'm'}, i, i % 3}, [3]uint64{uint64(i), uint64(i) * 1000, 5}
			}},
		{"percpu", table(b, ebpf.PerCPUHash, entries, u32, u64), func(i uint32) (any, any) {
			return i, make([]uint64, ebpf.MustPossibleCPU())
		}},
	} {
		for i := range uint32(entries) {
			key, value := bench.fill(i)
			if err := bench.table.Put(key, value); err != nil {
				b.Fatal(err)
			}
		}
		// What root would do with the map and two system calls an entry.
		iterate := func(b *testing.B) {
			n, key := 0, make([]byte, bench.table.KeySize())
			var value any = new([]byte)
			if bench.table.PerCPU() {
				value = new([]uint64)
			}
			for entries := bench.table.Iterate(); entries.Next(&key, value); n++ {
			}
			if n != entries {
				b.Fatal(n)
			}
		}
		b.Run(bench.name+"/iterate", func(b *testing.B) {
			for b.Loop() {
				iterate(b)
			}
		})
		b.Run(bench.name+"/batch", func(b *testing.B) {
			for b.Loop() {
				n := 0
				for _, err := range typed.Entries(bench.table.Map) {
					if err != nil {
						b.Fatal(err)
					}
					n++
				}
				if n != entries {
					b.Fatal(n)
				}
			}
		})
		b.Run(bench.name+"/scrape", func(b *testing.B) {
			url := serve(b, newExporter(b, map[string]*client.Table{"o/m": bench.table}))
			var bare time.Duration
			for b.Loop() {
				// Side by side, since others use the machine too.
				b.StopTimer()
				start := time.Now()
				iterate(b)
				bare += time.Since(start)
				b.StartTimer()
				if status, body, _ := get(b, url, openMetrics); status != http.StatusOK || strings.Count(body, "\n") < entries {
					b.Fatal(status, len(body))
				}
			}
			ratio := float64(b.Elapsed()) / float64(bare)
			b.ReportMetric(ratio, "iterations")
			if ratio > 5 {
				b.Errorf("a scrape costs %.1f times a bare iteration, want 5 at most", ratio)
			}
		})
	}
}
