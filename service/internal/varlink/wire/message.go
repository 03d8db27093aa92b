// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"
)

// ErrInvalidMessage says that a message is not JSON, or not a Varlink request or reply.
var ErrInvalidMessage = errors.New("message is invalid")

// maxDepth bounds how deep objects and lists may be nested in a message.
const maxDepth = 32

// Request is one method call. Parameters is a JSON object, or empty.
type Request struct {
	Method     string          `json:"method"`
	Parameters json.RawMessage `json:"parameters,omitempty"`
	Oneway     bool            `json:"oneway,omitempty"`
	More       bool            `json:"more,omitempty"`
	Upgrade    bool            `json:"upgrade,omitempty"`
}

// Reply is the answer to a Request. Parameters is a JSON object, or empty; with Error they describe the error of that name.
type Reply struct {
	Parameters json.RawMessage `json:"parameters,omitempty"`
	Continues  bool            `json:"continues,omitempty"`
	Error      string          `json:"error,omitempty"`
}

// ParseRequest reads a request strictly: names are exact, and a name that is unknown or there twice, at any depth, is an error. The error is an
// ErrInvalidMessage.
func ParseRequest(data []byte) (*Request, error) {
	r := new(Request)
	if err := parse(data, r, &r.Parameters); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidMessage, err)
	}
	return r, nil
}

// ParseReply reads a reply, as strictly as ParseRequest.
func ParseReply(data []byte) (*Reply, error) {
	r := new(Reply)
	if err := parse(data, r, &r.Parameters); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidMessage, err)
	}
	return r, nil
}

func parse(data []byte, message any, parameters *json.RawMessage) error {
	if err := validate(data); err != nil {
		return err
	}
	if err := Decode(data, message); err != nil {
		return err
	}
	if len(*parameters) > 0 && (*parameters)[0] != '{' {
		return errors.New("parameters is not an object")
	}
	return nil
}

// FieldError says which field of an object Decode didn't take.
type FieldError struct {
	Field  string
	Reason string
}

func (e *FieldError) Error() string {
	return fmt.Sprintf("field %q %s", e.Field, e.Reason)
}

// Decode reads a JSON object into the struct that into points to. Unlike encoding/json it takes only the fields' exact json names, and wants every
// field that is neither a pointer nor omitempty. null, or no data, is an object without fields; a field that is null counts as missing.
// The fields are scalars and lists of scalars; the strictness doesn't reach into structs below. A field that is unknown, missing or of the wrong
// type gives a *FieldError.
func Decode(data []byte, into any) error {
	var members map[string]json.RawMessage
	if len(data) > 0 {
		if err := json.Unmarshal(data, &members); err != nil {
			return errors.New("not a JSON object")
		}
	}
	fields := reflect.ValueOf(into).Elem()
	for field, value := range fields.Fields() {
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		data, ok := members[name]
		delete(members, name)
		switch {
		case ok && string(data) != "null":
			if err := json.Unmarshal(data, value.Addr().Interface()); err != nil {
				return &FieldError{Field: name, Reason: "has the wrong type"}
			}
		case field.Type.Kind() != reflect.Pointer && options != "omitempty":
			return &FieldError{Field: name, Reason: "is missing"}
		}
	}
	if len(members) > 0 {
		return &FieldError{Field: slices.Min(slices.Collect(maps.Keys(members))), Reason: "is unknown"}
	}
	return nil
}

// validate refuses what encoding/json lets pass: wrong encoding, names that are there twice, and deep nesting.
func validate(data []byte) error {
	switch {
	case !utf8.Valid(data):
		return errors.New("not UTF-8")
	case !json.Valid(data):
		return errors.New("not JSON")
	}
	return walk(json.NewDecoder(bytes.NewReader(data)), maxDepth)
}

func walk(d *json.Decoder, depth int) error {
	token, err := d.Token()
	if err != nil {
		return fmt.Errorf("cannot read value: %w", err)
	}
	open, ok := token.(json.Delim)
	if !ok {
		return nil
	}
	if depth == 0 {
		return errors.New("nested too deeply")
	}
	names := make(map[json.Token]bool)
	for d.More() {
		if open == '{' {
			name, err := d.Token()
			if err != nil {
				return fmt.Errorf("cannot read name: %w", err)
			}
			if names[name] {
				return fmt.Errorf("%q is there twice", name)
			}
			names[name] = true
		}
		if err := walk(d, depth-1); err != nil {
			return err
		}
	}
	_, err = d.Token()
	return err
}
