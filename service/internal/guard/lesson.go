// SPDX-License-Identifier: Apache-2.0

package guard

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/bpfbroker/bpfbroker/bpf"
	"github.com/bpfbroker/bpfbroker/service/internal/profile"
)

// ErrLearning means that somebody learns from the grant already.
var ErrLearning = errors.New("somebody learns from the grant already")

// Learn has the guard write down from now on what a grant is used for, until
// Learnt. ErrLearning if it does already.
func (g *Guard) Learn(id uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.put(countLessons, g.maps.Lessons, id, bpf.GuardLesson{})
	if errors.Is(err, ebpf.ErrKeyExist) {
		err = ErrLearning
	}
	if err != nil {
		return fmt.Errorf("cannot learn what grant %d is used for: %w", id, err)
	}
	return nil
}

// Learnt returns what a grant was used for since Learn, and forgets it. ErrUnknown
// if nobody has called that.
func (g *Guard) Learnt(id uint64) (*profile.Lesson, error) {
	var l bpf.GuardLesson
	err := g.learnt(id, &l)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		err = ErrUnknown
	}
	if err != nil {
		return nil, fmt.Errorf("cannot tell what grant %d was used for: %w", id, err)
	}
	lesson := &profile.Lesson{
		Commands: profile.Mask(l.Commands), Maps: profile.Mask(l.Maps),
		Programs: profile.Mask(l.Programs), Attachments: profile.Mask(l.Attachments),
		ModuleKfuncs: l.ModuleKfuncs != 0,
		MaxPrograms:  int(l.ProgramsAtOnce), MaxMaps: int(l.MapsAtOnce), MaxMapBytes: l.MapBytes,
		Attach: profile.Attach{
			Interfaces: profile.Reach(l.Reach[0]), Cgroups: profile.Reach(l.Reach[1]), Processes: profile.Reach(l.Reach[2]),
		},
	}
	lesson.Short.Programs = profile.Mask(l.Programs &^ l.LongPrograms)
	lesson.Short.Attachments = profile.Mask(l.Attachments &^ l.LongAttachments)
	for i, name := range profile.HelperNames() {
		word, bit := (i+1)/64, uint64(1)<<((i+1)%64)
		if l.Helpers[word]&bit == 0 {
			continue
		}
		lesson.Helpers = append(lesson.Helpers, name)
		if l.LongHelpers[word]&bit == 0 {
			lesson.Short.Helpers = append(lesson.Short.Helpers, name)
		}
	}
	if l.KfuncCount == 0 {
		return lesson, nil
	}
	ids := l.Kfuncs[:min(int(l.KfuncCount), len(l.Kfuncs))]
	names, err := g.KfuncNames(ids)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if name := names[id]; name != "" { // else the kernel has refused the program
			lesson.Kfuncs = append(lesson.Kfuncs, name)
		}
	}
	return lesson, nil
}

func (g *Guard) learnt(id uint64, l *bpf.GuardLesson) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.maps.Lessons.LookupAndDelete(id, l); err != nil {
		return err
	}
	return g.count(countLessons, -1)
}
