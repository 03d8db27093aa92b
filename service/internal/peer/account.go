// SPDX-License-Identifier: Apache-2.0

package peer

import (
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
)

// Account returns the uid that the limits of a user's requests count by: its own,
// or for subordinate uids (subuid(5)), of which a user may have many, one of those
// for all that belong to the same user.
func Account(uid uint32) uint32 { return subordinates.account(uid) }

var subordinates = ranges{path: "/etc/subuid"}

// maxRanges bounds what is read of the file, in bytes.
const maxRanges = 1 << 20

// ranges are those of a file, as it was when it was last read.
type ranges struct {
	path string

	mu   sync.Mutex
	file fs.FileInfo // nil if it isn't there
	all  []uids
}

// uids are so many from the first on, that count by the account.
type uids struct{ first, count, account uint32 }

func (r *ranges) account(uid uint32) uint32 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refresh()
	for _, u := range r.all {
		if uid != 0 && uid >= u.first && uid-u.first < u.count {
			return u.account
		}
	}
	return uid
}

// refresh reads the file if it is another one than the last time.
func (r *ranges) refresh() {
	info, err := os.Stat(r.path)
	if err == nil && r.file != nil && os.SameFile(info, r.file) && info.ModTime().Equal(r.file.ModTime()) && info.Size() == r.file.Size() {
		return
	}
	r.file, r.all = nil, nil
	f, err := os.Open(r.path)
	if err != nil {
		return // nobody has any
	}
	defer f.Close()
	// Of the file that is read, and what can't be read is as good as not there.
	r.file, _ = f.Stat()
	data, _ := io.ReadAll(io.LimitReader(f, maxRanges))
	accounts := map[string]uint32{}
	for line := range strings.Lines(string(data)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) != 3 {
			continue
		}
		first, err := strconv.ParseUint(fields[1], 10, 32)
		if err != nil {
			continue
		}
		count, err := strconv.ParseUint(fields[2], 10, 32)
		if err != nil {
			continue
		}
		if _, ok := accounts[fields[0]]; !ok {
			accounts[fields[0]] = uint32(first)
		}
		r.all = append(r.all, uids{uint32(first), uint32(count), accounts[fields[0]]})
	}
}
