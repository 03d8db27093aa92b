// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"encoding/xml"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const policyDir = "../../../polkit"

type policyAction struct {
	ID          string     `xml:"id,attr"`
	Description string     `xml:"description"`
	Message     string     `xml:"message"`
	Icon        string     `xml:"icon_name"`
	Defaults    defaults   `xml:"defaults"`
	Annotations []struct{} `xml:"annotate"`
}

type defaults struct {
	Any      string `xml:"allow_any"`
	Inactive string `xml:"allow_inactive"`
	Active   string `xml:"allow_active"`
}

func readPolicy(t *testing.T) []policyAction {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(policyDir, "org.bpfbroker.policy"))
	if err != nil {
		t.Fatal(err)
	}
	var policy struct {
		XMLName xml.Name       `xml:"policyconfig"`
		Vendor  string         `xml:"vendor"`
		Actions []policyAction `xml:"action"`
	}
	if err := xml.Unmarshal(data, &policy); err != nil {
		t.Fatal(err)
	}
	if policy.Vendor == "" {
		t.Error("no vendor")
	}
	return policy.Actions
}

// constants gives the values of the constants of type Action.
func constants(t *testing.T) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "action.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var values []string
	ast.Inspect(file, func(node ast.Node) bool {
		spec, ok := node.(*ast.ValueSpec)
		if !ok {
			return true
		}
		for _, value := range spec.Values {
			text, err := strconv.Unquote(value.(*ast.BasicLit).Value)
			if err != nil {
				t.Error(err)
			}
			values = append(values, text)
		}
		return true
	})
	slices.Sort(values)
	return values
}

func TestPolicyHasTheActions(t *testing.T) {
	t.Parallel()
	var ids []string
	for _, action := range readPolicy(t) {
		ids = append(ids, action.ID)
	}
	slices.Sort(ids)
	if diff := cmp.Diff(constants(t), ids); diff != "" {
		t.Errorf("the constants, and the actions of the policy: %s", diff)
	}
}

func TestPolicyDefaults(t *testing.T) {
	t.Parallel()
	for _, action := range readPolicy(t) {
		want := defaults{"auth_admin", "auth_admin", "auth_admin"}
		if action.ID == string(TokenBasic) {
			want.Active = "yes"
		}
		if diff := cmp.Diff(want, action.Defaults); diff != "" {
			t.Errorf("%s: %s", action.ID, diff)
		}
		if len(action.Annotations) != 0 {
			t.Errorf("%s is annotated: an implied yes would evade a no", action.ID)
		}
	}
}

func TestPolicyTexts(t *testing.T) {
	t.Parallel()
	property := regexp.MustCompile(`\$\(([^)]*)\)`)
	for _, action := range readPolicy(t) {
		if action.Description == "" || action.Icon == "" {
			t.Errorf("%s has no description or icon", action.ID)
		}
		want := []string{DetailProfile}
		if strings.HasSuffix(action.ID, "-others") {
			want = []string{DetailTargetUID, DetailProfile}
		}
		if strings.HasPrefix(action.ID, string(OpenObject)) {
			want = []string{DetailObject}
		}
		if action.ID == string(ManageGrants) {
			want = nil
		}
		var got []string
		for _, match := range property.FindAllStringSubmatch(action.Message, -1) {
			got = append(got, match[1])
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("the message of %s: %s", action.ID, diff)
		}
	}
}

// The examples name only actions and details that exist, and never say yes
// without a look at who asks.
func TestExamples(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob(filepath.Join(policyDir, "examples", "*.rules"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	actions := constants(t)
	action := regexp.MustCompile(`"(org\.bpfbroker\.[^"]*)"`)
	detail := regexp.MustCompile(`action\.lookup\("([^"]*)"\) == "([^"]*)"`)
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text := string(data)
		for _, match := range action.FindAllStringSubmatch(text, -1) {
			if !slices.Contains(actions, match[1]) {
				t.Errorf("%s: there is no action %s", name, match[1])
			}
		}
		lookups := detail.FindAllStringSubmatch(text, -1)
		if len(lookups) != strings.Count(text, "lookup") {
			t.Errorf("%s: looks a detail up in a way that nobody checks", name)
		}
		for _, match := range lookups {
			if !slices.Contains(detailKeys, match[1]) {
				t.Errorf("%s: there is no detail %s", name, match[1])
			}
			if match[1] == DetailGuard && !slices.Contains([]string{"active", "absent", "unneeded"}, match[2]) {
				t.Errorf("%s: the guard is never %q", name, match[2])
			}
			if match[1] == DetailTier && !slices.Contains(actions, "org.bpfbroker.token-"+match[2]) {
				t.Errorf("%s: there is no tier %q", name, match[2])
			}
		}
		if strings.Contains(text, "Result.YES") && !strings.Contains(text, "subject.") {
			t.Errorf("%s: says yes to everybody", name)
		}
	}
}
