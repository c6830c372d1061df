// The world `reward` of grpo:plugin@0.1.0: what Go makes of its records as the canonical ABI lays them out in wasm32, and
// the memory that the host puts them into. plugin.go has configure and score.

package main

import (
	"encoding/binary"
	"errors"
	"math"
	"unsafe"
)

// Question is what completions answer; wit/types.wit says what each field of a record is.
type Question struct {
	Row, Prompt string
}

// Finish is why a completion ended.
type Finish uint8

const (
	Stop Finish = iota
	Length
	Abort
)

// Telemetry has times in milliseconds.
type Telemetry struct {
	LatencyMs, QueueMs, PrefillMs, DecodeMs float64
	PromptTokens, CachedPromptTokens        uint32
	GeneratedTokens                         uint32
	DraftTokens, AcceptedTokens             uint32
	KVBytes                                 uint64
}

// Sample is one completion. Reasoning and Answer are nil where the formatter found none.
type Sample struct {
	Question          uint32
	Completion        string
	Reasoning, Answer *string
	Finish            Finish
}

// Part is a named component of a score.
type Part struct {
	Name  string
	Value float64
}

// Verdict is a reward with its parts, or why there is none if Skip is not empty.
type Verdict struct {
	Total float64
	Parts []Part
	Skip  string
}

// Failure is an error of the kinds that the host tells apart.
type Failure struct {
	kind    byte
	message string
}

func (f *Failure) Error() string { return f.message }

// ConfigError says what is wrong with the plugin's settings.
func ConfigError(message string) error { return &Failure{0, message} }

// InputError says what is wrong with a row.
func InputError(message string) error { return &Failure{1, message} }

// Level is how important a line of the log is.
type Level uint32

const (
	Debug Level = iota
	Info
	Warn
	Error
)

// Log writes a line to the run's log, as printing does without a level.
func Log(level Level, text string) {
	hostLog(level, unsafe.Pointer(unsafe.StringData(text)), uint32(len(text)))
}

//go:wasmimport grpo:plugin/host@0.1.0 log
func hostLog(level Level, text unsafe.Pointer, length uint32)

// SampleTelemetry is what the samples of the running score cost, in their order.
func SampleTelemetry() []Telemetry {
	list := allocate(8)
	hostSampleTelemetry(address(list))
	costs := make([]Telemetry, list.u32(4))
	for i := range costs {
		costs[i] = readTelemetry(bytesAt(list.u32(0)+uint32(64*i), 64))
	}
	return costs
}

//go:wasmimport grpo:plugin/host@0.1.0 sample-telemetry
func hostSampleTelemetry(list uint32)

// Memory that arguments and results lie in, until the call is over.
//
// While the host puts arguments here, the guest may not call it, and Go's scheduler and collector would (wasmtime issue
// 14318). So nothing of Go's runs then: realloc moves a mark, without a stack to grow or a value to collect. The first blocks
// are asked for while the runtime itself starts, by what translates WASI's first preview, and stay.
var (
	running          bool
	first, mark, end uintptr
)

const leastChunk = 1 << 20

func init() { running = true }

//go:nosplit
//go:wasmexport cabi_realloc
func realloc(old, oldSize, alignment, size uint32) uint32 {
	at := take(uintptr(size))
	for i := range uintptr(min(oldSize, size)) {
		*(*byte)(unsafe.Pointer(at + i)) = *(*byte)(unsafe.Pointer(uintptr(old) + i))
	}
	return uint32(at)
}

// take gives the address of memory that is aligned to 8 bytes. Even no bytes have one, as the canonical ABI wants it.
//
//go:nosplit
func take(size uintptr) uintptr {
	size = (max(size, 1) + 7) &^ 7
	if !running {
		return grow(size)
	}
	if size > end-mark {
		length := max(2*(end-first), size, leastChunk)
		first = grow(length)
		mark, end = first, first+length
	}
	at := mark
	mark += size
	return at
}

//go:nosplit
func grow(size uintptr) uintptr {
	at := uintptr(sbrk(size))
	if at == 0 {
		panic("out of memory")
	}
	return at
}

// What Go's own heap grows by.
//
//go:linkname sbrk runtime.sbrk
func sbrk(size uintptr) unsafe.Pointer

func allocate(size int) record {
	r := bytesAt(uint32(take(uintptr(size))), uint32(size))
	clear(r)
	return r
}

func address(r record) uint32 { return uint32(uintptr(unsafe.Pointer(unsafe.SliceData(r)))) }

func bytesAt(address, length uint32) record {
	return unsafe.Slice((*byte)(unsafe.Pointer(uintptr(address))), length)
}

// record is memory with a layout.
type record []byte

func (r record) u32(at int) uint32 { return binary.LittleEndian.Uint32(r[at:]) }

func (r record) u64(at int) uint64 { return binary.LittleEndian.Uint64(r[at:]) }

func (r record) f64(at int) float64 { return math.Float64frombits(r.u64(at)) }

// text copies, so that it may be kept.
func (r record) text(at int) string { return string(bytesAt(r.u32(at), r.u32(at+4))) }

func (r record) option(at int) *string {
	if r[at] == 0 {
		return nil
	}
	text := r.text(at + 4)
	return &text
}

func (r record) put(at int, value uint32) { binary.LittleEndian.PutUint32(r[at:], value) }

func (r record) putF64(at int, value float64) {
	binary.LittleEndian.PutUint64(r[at:], math.Float64bits(value))
}

func (r record) putText(at int, text string) {
	copied := allocate(len(text))
	copy(copied, text)
	r.put(at, address(copied))
	r.put(at+4, uint32(len(text)))
}

func readSample(r record) Sample {
	return Sample{
		Question:   r.u32(0),
		Completion: r.text(4),
		Reasoning:  r.option(12),
		Answer:     r.option(24),
		Finish:     Finish(r[36]),
	}
}

func readTelemetry(r record) Telemetry {
	return Telemetry{
		LatencyMs: r.f64(0), QueueMs: r.f64(8), PrefillMs: r.f64(16), DecodeMs: r.f64(24),
		PromptTokens: r.u32(32), CachedPromptTokens: r.u32(36), GeneratedTokens: r.u32(40),
		DraftTokens: r.u32(44), AcceptedTokens: r.u32(48), KVBytes: r.u64(56),
	}
}

func (v Verdict) write(r record) {
	if v.Skip != "" {
		r[0] = 1
		r.putText(8, v.Skip)
		return
	}
	parts := allocate(16 * len(v.Parts))
	for i, part := range v.Parts {
		at := parts[16*i:]
		at.putText(0, part.Name)
		at.putF64(8, part.Value)
	}
	r.putF64(8, v.Total)
	r.put(16, address(parts))
	r.put(20, uint32(len(v.Parts)))
}

// finish leaves a result, in which a list stands at 4 or an error.
func finish(err error) record {
	result := allocate(16)
	if err == nil {
		return result
	}
	var failure *Failure
	if !errors.As(err, &failure) {
		failure = &Failure{2, err.Error()}
	}
	result[0], result[4] = 1, failure.kind
	result.putText(8, failure.message)
	return result
}

//go:wasmexport grpo:plugin/scoring@0.1.0#configure
func exportConfigure(at, length uint32) uint32 {
	config := bytesAt(at, length)
	return address(finish(configure(config)))
}

//go:wasmexport grpo:plugin/scoring@0.1.0#score
func exportScore(questionsAt, questionsLen, samplesAt, samplesLen uint32) uint32 {
	questions := make([]Question, questionsLen)
	for i := range questions {
		r := bytesAt(questionsAt+uint32(16*i), 16)
		questions[i] = Question{r.text(0), r.text(8)}
	}
	samples := make([]Sample, samplesLen)
	for i := range samples {
		samples[i] = readSample(bytesAt(samplesAt+uint32(40*i), 40))
	}
	verdicts, err := score(questions, samples)
	result := finish(err)
	if err == nil {
		list := allocate(24 * len(verdicts))
		for i, verdict := range verdicts {
			verdict.write(list[24*i : 24*i+24])
		}
		result.put(4, address(list))
		result.put(8, uint32(len(verdicts)))
	}
	return address(result)
}

//go:nosplit
//go:wasmexport cabi_post_grpo:plugin/scoring@0.1.0#configure
func afterConfigure(uint32) { mark = first }

//go:nosplit
//go:wasmexport cabi_post_grpo:plugin/scoring@0.1.0#score
func afterScore(uint32) { mark = first }

func main() {}
