// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var requests = map[string]struct {
	data string
	want *Request // nil: invalid
}{
	"plain":       {`{"method":"a.b.C"}`, &Request{Method: "a.b.C"}},
	"parameters":  {` {"method" : "a.b.C", "parameters" : {"x":[1,{"y":null}]} } `, &Request{Method: "a.b.C", Parameters: json.RawMessage(`{"x":[1,{"y":null}]}`)}},
	"everything":  {`{"method":"m","parameters":{},"oneway":true,"more":true,"upgrade":true}`, &Request{"m", json.RawMessage("{}"), true, true, true}},
	"all nothing": {`{"method":"m","parameters":null,"oneway":false,"more":null}`, &Request{Method: "m"}},
	"deepest":     {`{"method":"m","parameters":{"x":` + strings.Repeat("[", 30) + strings.Repeat("]", 30) + `}}`, &Request{Method: "m", Parameters: json.RawMessage(`{"x":` + strings.Repeat("[", 30) + strings.Repeat("]", 30) + `}`)}},

	"nothing":               {``, nil},
	"null":                  {`null`, nil},
	"list":                  {`["method"]`, nil},
	"no method":             {`{"parameters":{}}`, nil},
	"null method":           {`{"method":null}`, nil},
	"number method":         {`{"method":1}`, nil},
	"unknown key":           {`{"method":"m","x":1}`, nil},
	"other case":            {`{"Method":"m"}`, nil},
	"other case too":        {`{"method":"m","Method":"n"}`, nil},
	"twice":                 {`{"method":"m","method":"n"}`, nil},
	"twice, escaped":        {`{"method":"m","m\u0065thod":"n"}`, nil},
	"twice, deep":           {`{"method":"m","parameters":{"x":[{"y":1,"y":1}]}}`, nil},
	"list parameters":       {`{"method":"m","parameters":[]}`, nil},
	"string parameters":     {`{"method":"m","parameters":"{}"}`, nil},
	"string oneway":         {`{"method":"m","oneway":"true"}`, nil},
	"number oneway":         {`{"method":"m","oneway":1}`, nil},
	"half":                  {`{"method":"m"`, nil},
	"comma":                 {`{"method":"m",}`, nil},
	"behind":                {`{"method":"m"} x`, nil},
	"two":                   {`{"method":"m"}{"method":"m"}`, nil},
	"too deep":              {`{"method":"m","parameters":{"x":` + strings.Repeat("[", 31) + strings.Repeat("]", 31) + `}}`, nil},
	"far too deep":          {strings.Repeat("[", 60000), nil},
	"far too deep, closed":  {strings.Repeat("[", 30000) + strings.Repeat("]", 30000), nil},
	"encoding":              {"{\"method\":\"\xff\"}", nil},
	"encoding of a surplus": {"{\"method\":\"m\",\"parameters\":{\"\xc0\x80\":1}}", nil},
}

func TestParseRequest(t *testing.T) {
	t.Parallel()
	for name, test := range requests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := ParseRequest([]byte(test.data))
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if (test.want == nil) != errors.Is(err, ErrInvalidMessage) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestParseReply(t *testing.T) {
	t.Parallel()
	want := &Reply{Parameters: json.RawMessage(`{"x":1}`), Continues: true, Error: "e"}
	got, err := ParseReply([]byte(`{"parameters":{"x":1},"continues":true,"error":"e"}`))
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("error %v (-want +got):\n%s", err, diff)
	}
	for _, data := range []string{``, `1`, `{"Error":"e"}`, `{"error":1}`, `{"parameters":1}`, `{"error":"e","error":"f"}`} {
		if _, err := ParseReply([]byte(data)); !errors.Is(err, ErrInvalidMessage) {
			t.Errorf("%s: %v", data, err)
		}
	}
}

type parameters struct {
	Profile string   `json:"profile"`
	Index   int      `json:"index"`
	Lease   *int     `json:"lease"`
	Tags    []string `json:"tags,omitempty"`
}

func TestDecode(t *testing.T) {
	t.Parallel()
	lease := 3
	tests := map[string]struct {
		data  string
		want  parameters
		field string // that the error names
	}{
		"all":               {`{"profile":"p","index":2,"lease":3,"tags":["t"]}`, parameters{"p", 2, &lease, []string{"t"}}, ""},
		"required":          {`{"profile":"","index":0}`, parameters{}, ""},
		"null is nothing":   {`{"profile":"","index":0,"lease":null,"tags":null}`, parameters{}, ""},
		"nothing":           {``, parameters{}, "profile"},
		"missing":           {`{"profile":"p"}`, parameters{Profile: "p"}, "index"},
		"null":              {`{"profile":null,"index":1}`, parameters{}, "profile"},
		"unknown":           {`{"profile":"p","index":1,"x":1,"b":1}`, parameters{Profile: "p", Index: 1}, "b"},
		"unknown, null":     {`{"profile":"p","index":1,"x":null}`, parameters{Profile: "p", Index: 1}, "x"},
		"other case":        {`{"profile":"p","index":1,"Lease":1}`, parameters{Profile: "p", Index: 1}, "Lease"},
		"Go's name":         {`{"Profile":"p","index":1}`, parameters{}, "profile"},
		"string for number": {`{"profile":"p","index":"1"}`, parameters{Profile: "p"}, "index"},
		"number for string": {`{"profile":1,"index":1}`, parameters{}, "profile"},
		"fraction":          {`{"profile":"p","index":1.5}`, parameters{Profile: "p"}, "index"},
		"too big":           {`{"profile":"p","index":9223372036854775808}`, parameters{Profile: "p"}, "index"},
		"in a list":         {`{"profile":"p","index":1,"tags":[1]}`, parameters{Profile: "p", Index: 1, Tags: []string{""}}, "tags"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got parameters
			err := Decode([]byte(test.data), &got)
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			var field FieldError
			if e, ok := errors.AsType[*FieldError](err); ok {
				field = *e
			}
			if field.Field != test.field || (err == nil) != (test.field == "") {
				t.Errorf("got %v, want an error for %q", err, test.field)
			}
		})
	}
}

func FuzzParseRequest(f *testing.F) {
	for _, test := range requests {
		f.Add([]byte(test.data))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = ParseReply(data)
		_ = Decode(data, new(parameters))
		r, err := ParseRequest(data)
		if err != nil {
			return
		}
		_ = Decode(r.Parameters, new(parameters))
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		second, err := ParseRequest(again)
		if err != nil {
			t.Fatalf("%s doesn't parse as %s: %v", data, again, err)
		}
		if r.Method != second.Method || r.Oneway != second.Oneway || (len(r.Parameters) > 0) != (len(second.Parameters) > 0) {
			t.Errorf("%s became %s", data, again)
		}
	})
}
