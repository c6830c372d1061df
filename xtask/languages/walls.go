// What of Go a plugin can reach: each completion names something to try.

package main

import (
	"errors"
	"fmt"
	"math/rand"
	"net"
	"os"
	"runtime"
	"time"
)

var (
	held  [][]byte
	tries = map[string]func() float64{
		"clock":       func() float64 { return float64(time.Now().Unix() - time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC).Unix()) },
		"monotonic":   func() float64 { began := time.Now(); return truth(time.Since(began) < time.Millisecond) },
		"sleep":       func() float64 { began := time.Now(); time.Sleep(time.Hour); return time.Since(began).Truncate(time.Second).Seconds() },
		"timeout":     func() float64 { <-time.After(time.Minute); return 1 },
		"chance":      func() float64 { return float64(rand.Int31()) / 4 },
		"file":        func() float64 { _, err := os.ReadFile("/etc/passwd"); return failed(err) },
		"write":       func() float64 { return failed(os.WriteFile("a", nil, 0o600)) },
		"environment": func() float64 { return float64(len(os.Environ()) + len(os.Args)) },
		"socket":      func() float64 { _, err := net.Dial("tcp", "127.0.0.1:80"); return failed(err) },
		"print":       func() float64 { fmt.Println("printed"); return 1 },
		"exit":        func() float64 { os.Exit(3); return 0 },
		"panic":       func() float64 { panic("as told") },
		"none":        func() float64 { var none []float64; return none[len(held)] },
		"garbage":     garbage,
		"goroutines":  goroutines,
		"hoard":       func() float64 { return float64(len(make([]byte, 300<<20))) },
		"deadlock":    func() float64 { select {} },
	}
)

func configure([]byte) error { return nil }

func score(_ []Question, samples []Sample) ([]Verdict, error) {
	verdicts := make([]Verdict, len(samples))
	for i, sample := range samples {
		try, known := tries[sample.Completion]
		if !known {
			return nil, errors.New("unknown")
		}
		verdicts[i] = Verdict{Total: try()}
	}
	return verdicts, nil
}

// Two gigabytes in pieces, of which little is alive: the collector has to run.
func garbage() float64 {
	for i := range 20000 {
		held = append(held, make([]byte, 100_000))
		if i%100 == 0 {
			held = held[len(held)-1:]
		}
	}
	return float64(len(held))
}

// Some go on after the call, with timers that are due during the next.
func goroutines() float64 {
	done := make(chan int)
	for i := range 10 {
		go func() {
			runtime.Gosched()
			done <- i
		}()
		go func() {
			for {
				time.Sleep(time.Microsecond)
				held = append(held[:0], make([]byte, 1000))
			}
		}()
	}
	sum := 0
	for range 10 {
		sum += <-done
	}
	return float64(sum)
}

func truth(so bool) float64 {
	if so {
		return 1
	}
	return 0
}

func failed(err error) float64 { return truth(err != nil) }
